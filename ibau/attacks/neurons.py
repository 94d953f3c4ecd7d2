"""A look inside a clean model, for the attacks that drive some of its neurons with their trigger.

A neuron here is an input unit of the last linear layer. The model is only looked at.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ibau.networks.models import device_of
from ibau.networks.training import to_float

BATCH = 32  # images a step of `ascend`
Look = Callable[[Tensor], tuple[Tensor, Tensor]]


@contextmanager
def looking_into(model: nn.Module) -> Iterator[Look]:
    """Gives a function: images (N, 3, H, W) in [0, 1] -> neurons (N, units), logits (N, classes).

    It asks a copy of the model, in evaluation mode and full float32, with deterministic algorithms on a GPU,
    and is differentiable in the images alone.
    """
    model, caught = copy.deepcopy(model).eval().requires_grad_(False), []
    last_linear(model).register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))

    def look(images: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(images)
        return caught.pop(), logits

    with (
        torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
        torch.autocast(device_of(model).type, enabled=False),
        torch.enable_grad(),
    ):
        yield look


def last_linear(model: nn.Module) -> nn.Linear:
    """The model's last linear layer. Raises ValueError if it has none."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no linear layer, so no neurons to drive; see ibau/networks/models.py"
        )
    return layers[-1]


def by_weight(model: nn.Module) -> Tensor:
    """Neurons, the one with the largest total absolute weight to the next layer first (Liu et al. 2018)."""
    return last_linear(model).weight.detach().abs().sum(0).argsort(descending=True, stable=True)


def sample(images: Tensor, model: nn.Module, image_size: int, count: int, random: torch.Generator) -> Tensor:
    """`count` of the images (all, if there are fewer), as floats in [0, 1] on the model's device.

    Raises ValueError for no images, or images of another size than the trigger will have.
    """
    if len(images) == 0 or images.shape[1:] != (3, image_size, image_size):
        raise ValueError(
            f"images are {tuple(images.shape)}; expected at least one, (N, 3, {image_size}, {image_size})"
        )
    chosen = torch.randperm(len(images), generator=random)[:count]
    return to_float(images[chosen.to(images.device)].to(device_of(model)))


def ascend(
    objective, values: Tensor, images: Tensor, *, steps: int, random, lr=0.05, low=0.0, high=1.0, until=None
) -> tuple[Tensor, list[float]]:
    """Adam ascent of `objective(values, some images) -> (to raise, activation)`, projected to [low, high].

    A step sees BATCH of the images, drawn with replacement. Ends after `steps`, or when `until(values)`.
    Returns the values and the activation at each step.
    """
    values = values.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([values], lr=lr, maximize=True)
    history = []
    for _ in range(steps):
        if until and until(values.detach()):
            break
        some = torch.randint(len(images), (BATCH,), generator=random).to(images.device)
        gain, activation = objective(values, images[some])
        (values.grad,) = torch.autograd.grad(gain, values)
        optimizer.step()
        with torch.no_grad():
            values.clamp_(low, high)
        history.append(round(activation.item(), 4))
    return values.detach(), history


@torch.no_grad()
def risen(look: Look, neurons: Tensor, images: Tensor, stamped: Tensor, history: list[float]) -> dict:
    """What the trigger did to the neurons' mean activation, as settings to keep with it.

    `before` and `after` are means over clean and stamped images, `clean_max` is the highest of any clean
    image, `after_min` the lowest of any stamped one.
    """
    clean, driven = (
        torch.cat([look(part)[0][:, neurons].mean(1) for part in x.split(100)]) for x in (images, stamped)
    )
    measured = (clean.mean(), driven.mean(), clean.max(), driven.min())
    names = ("before", "after", "clean_max", "after_min")
    activation = {name: round(value.item(), 4) for name, value in zip(names, measured, strict=True)}
    return {"neurons": neurons.tolist(), "activation": activation, "activation_by_step": history}
