"""What makes unlearning safe to call: the clean set is checked, part of it is watched, and harm is undone.

Nothing here is part of an algorithm. `ibau.unlearn`, the authors' recipe and `ibau.clean` all begin with
`prepare`.
"""

import copy
import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ibau.hypergradient.layers import cheapen, restore
from ibau.networks.models import device_of, takes_channels_last
from ibau.networks.training import to_float

COLLAPSE = 0.5  # held-out accuracy below this share of what it was: the round is undone
ROLLBACKS = 3  # and tried again at half the rate, this often in a row
LOST = 0.05  # loss of held-out accuracy at the end that is worth a warning
WATCHED = 500  # clean images that are held out, at most


class UnlearningError(Exception):
    """Unlearning cannot go on; the message says where and why. The model that was given is untouched."""


class UnlearningWarning(UserWarning):
    """The cleaned model is worse on held-out clean images than it should be; the message says by how much."""


@dataclass(frozen=True, eq=False)
class Unlearned:
    """The cleaned copy, and how it came about.

    history  one dict a round; its keys are those of the function that returned it
    deltas   the perturbation each round found, (C, H, W); one that replaces pixels is (1 + C, H, W)
    """

    model: nn.Module
    history: list[dict]
    deltas: list[Tensor]


@dataclass(frozen=True)
class Perturbation:
    """An inner solution and how good it is.

    delta         (1, C, H, W), or (1, 1 + C, H, W) for one that replaces pixels
    loss          the inner objective there
    stationarity  the share of the gradient that the constraint lets delta follow: 0 where no allowed step
                  can raise the objective, 1 inside the constraint. On a sphere it is the sine of the angle
                  between the gradient and delta
    """

    delta: Tensor
    loss: float
    stationarity: float


@dataclass(eq=False)
class Prepared:
    """A copy of the model to unlearn with, the clean images to learn from, those to watch, and random
    numbers."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    watched: tuple[Tensor, Tensor]
    generator: torch.Generator

    def finished(self) -> nn.Module:
        """The copy with torch's own layers again, in the usual memory format."""
        return restore(self.model).to(memory_format=torch.contiguous_format)


def prepare(model: nn.Module, images: Tensor, labels: Tensor, held_out: float, seed: int) -> Prepared:
    """Check the clean set, hold part of it out, and copy the model with layers that are fast to
    differentiate.

    held_out  share of the clean images that is only watched, WATCHED at most; 0: none

    Raises ValueError for a clean set that cannot be used.
    """
    images, labels = _checked(model, images, labels)
    generator = torch.Generator().manual_seed(seed)
    count = min(WATCHED, int(held_out * len(images)))
    watched = images[:0], labels[:0]
    if count:
        order = torch.randperm(len(images), generator=generator).to(images.device)
        watched = images[order[:count]], labels[order[:count]]
        images, labels = images[order[count:]], labels[order[count:]]
    cleaned = cheapen(copy.deepcopy(model).eval(), to_float(images[:2]))
    for weight in cleaned.parameters():
        weight.requires_grad_()
    if takes_channels_last(cleaned, images):
        cleaned.to(memory_format=torch.channels_last)
    return Prepared(cleaned, images, labels, watched, generator)


class Guard:
    """Undoes a round that ruins the model.

        with guard:
            ...  # a round: it changes the weights
        if guard.undone:
            continue

    A round is ruinous where it raises UnlearningError, or where held-out accuracy falls below COLLAPSE of
    what it was at first. The weights and their optimiser are then as they were before it, and `rate` is
    halved.

    Raises UnlearningError after ROLLBACKS ruinous rounds in a row.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, watched, lr: float):
        self.model, self.optimizer, self.watched = model, optimizer, watched
        self.lr = self.rate = lr
        self.before = self.accuracy = accuracy(model, *watched)
        self.undone, self.in_a_row, self.rounds = False, 0, 0

    def __enter__(self):
        self.kept = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
        return self

    def __exit__(self, kind, error, traceback) -> bool:
        if error is None:
            found = accuracy(self.model, *self.watched)
            if found < COLLAPSE * self.before:
                error = UnlearningError(f"held-out accuracy fell from {self.before:.1%} to {found:.1%}")
        elif not isinstance(error, UnlearningError):
            return False
        self.undone = error is not None
        if error is None:
            self.accuracy, self.in_a_row, self.rounds = found, 0, self.rounds + 1
            return False
        self.in_a_row += 1
        if self.in_a_row > ROLLBACKS:
            raise UnlearningError(
                f"round {self.rounds + 1}: {error}; undone, and the rate halved {ROLLBACKS} times in vain; "
                f"try a lower rate than lr={self.lr:g}"
            ) from None
        self.restore()
        return True

    def restore(self) -> None:
        """Go back to the state at the last `with`, at half the rate."""
        weights, optimizer = self.kept
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(optimizer)
        self.rate /= 2

    def warn(self) -> None:
        """Warn (UnlearningWarning) where held-out accuracy ended more than LOST below what it was."""
        if self.before - self.accuracy > LOST:
            warnings.warn(
                f"accuracy on the {len(self.watched[0])} held-out clean images fell from {self.before:.1%} "
                f"to {self.accuracy:.1%}; a lower rate, a smaller radius or more clean images help",
                UnlearningWarning,
                stacklevel=3,
            )

    def line(self) -> dict:
        """What the history says of it: held-out accuracy, where images are held out, and the rate."""
        found = {"held_out_acc": self.accuracy} if len(self.watched[0]) else {}
        return {**found, "rate": self.rate}


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def cosine(rate: float, done: float) -> float:
    """The rate when a share `done` of all steps is taken: it falls to 0 along a cosine."""
    return rate / 2 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of right answers; nan without images, which no comparison finds too low."""
    if len(images) == 0:
        return math.nan
    right = [
        (model(to_float(x).clone()).argmax(1) == y).sum()
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    ]
    return sum(right).item() / len(images)


def batches(images: Tensor, labels: Tensor, size: int, generator: torch.Generator):
    """Endless batches of images with their labels, passing over all of them in a new order each time."""
    while True:
        for batch in torch.randperm(len(images), generator=generator).split(size):
            batch = batch.to(images.device)
            yield images[batch], labels[batch]


def arranged(images: Tensor, model: nn.Module) -> Tensor:
    """The images as floats in the memory format of the model's convolutions."""
    images = to_float(images)
    kernels = [p for p in model.parameters() if p.dim() == 4 and not p.is_contiguous()]
    last = any(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    return images.contiguous(memory_format=torch.channels_last) if last else images


def measured(inner, delta: Tensor) -> Perturbation:
    """What the ascent found, with its loss and how far it is from stationary: see Perturbation."""
    delta = delta.detach().requires_grad_()
    loss = inner.objective(delta, inner.weights())
    (gradient,) = torch.autograd.grad(loss, delta)
    delta = delta.detach()
    length = delta.norm() / 100  # short, so that a sphere is nearly flat
    step = gradient * (length / gradient.norm().clamp_min(1e-30))
    allowed = (inner.project(delta + step) - delta).norm() / step.norm().clamp_min(1e-30)
    return Perturbation(delta, loss.item(), allowed.item())


def line_of(found: Perturbation, steps: list[Tensor], inner_seconds: float, seconds: float) -> dict:
    """A round's line of the history: the inner solution, and the means over the outer steps.

    `steps` holds `Hypergradient.numbers()` of each of them. Raises UnlearningError where a loss or a
    hypergradient was not finite.
    """
    if not math.isfinite(found.loss):
        raise UnlearningError(f"the inner loss became {found.loss}")
    table = torch.stack(steps).cpu()  # the one wait for the device in a round's outer steps
    ruined = table[~table[:, :2].isfinite().all(1)]
    if len(ruined):
        loss, ratio = ruined[0, :2].tolist()
        raise UnlearningError(f"the outer loss became {loss} and |implicit| / |direct| {ratio}")
    names = ("outer_loss", "implicit_over_direct", "residual", "contraction")
    return {
        "inner_loss": found.loss,
        "delta_norm": found.delta.norm().item(),
        "stationarity": found.stationarity,
        **dict(zip(names, table.double().mean(0).tolist(), strict=True)),
        "kept": (table[:, 1] > 0).double().mean().item(),
        "inner_seconds": inner_seconds,
        "seconds": seconds,
    }


def _checked(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    device = device_of(model)
    if images.dim() != 4 or labels.shape != (len(images),):
        raise ValueError(
            f"images {tuple(images.shape)} and labels {tuple(labels.shape)} must be (N, C, H, W) and (N,)"
        )
    if len(images) < 2:
        raise ValueError(f"the clean set has {len(images)} images; unlearning needs at least 2")
    in_range = images.is_floating_point() and images.min() >= 0 and images.max() <= 1
    if images.dtype != torch.uint8 and not in_range:
        raise ValueError(
            f"images are {images.dtype} in [{images.min():.3g}, {images.max():.3g}]; expected uint8, "
            "or floats in [0, 1] (put a normalisation into the model, as its first layer)"
        )
    with torch.inference_mode():
        # A copy of the two: a model may work in place on what it is given.
        logits = copy.deepcopy(model).eval()(to_float(images[:2]).to(device, copy=True))
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 2:
        raise ValueError(f"the model's output for 2 images is {found}; expected (2, classes)")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels go from {labels.min()} to {labels.max()}; the model has {logits.shape[1]} classes"
        )
    return images.to(device), labels.to(device)
