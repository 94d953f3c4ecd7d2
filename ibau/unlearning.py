"""I-BAU: unlearn a backdoor by a minimax over weights and one shared perturbation (Zeng et al., ICLR 2022).

    min over theta  max over |delta|_2 <= C   H(delta, theta),      H = mean_i L(f_theta(x_i + delta), y_i)

A round first solves the inner problem for the weights at hand: which single perturbation, added to every
image, hurts most? Then a few outer steps on the clean set follow the implicit hypergradient.
"""

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from ibau.hypergradient import Hypergradient, implicit_hypergradient, project_l2
from ibau.models import device_of
from ibau.training import to_float


class UnlearningError(Exception):
    """Unlearning cannot go on; the message says where and why. The model that was given is untouched."""


@dataclass(frozen=True)
class IBAUSettings:
    """How to unlearn.

    radius and share go together: delta is far larger than any trigger that could hide (a white 4x4 square on
    mid-grey has l2 norm 3.5), so that whatever a trigger excites is within its reach, and it is shown on few
    images, because no classifier stays accurate under such a perturbation. 10 is the radius of the authors'
    CIFAR-10 notebook, which shows delta on 1% of the images.
    """

    rounds: int = 10  # inner solves
    outer_steps: int = 10  # after each of them
    batch_size: int = 100  # clean images of an outer step
    share: float = 0.02  # share of these that carries delta
    lr: float = 5e-4  # of the outer Adam; falls to 0 along a cosine, so the last rounds mend accuracy
    radius: float = 10.0  # C: the l2 ball that delta may not leave; pixels are in [0, 1]
    inner_steps: int = 20  # ascent steps of an inner solve
    inner_images: int = 50  # clean images a round's inner problem is posed on
    phi_step: float = 1.0  # eta: step size of Phi, a projected gradient ascent step on the inner objective
    K: int = 5  # terms of the Neumann series; 0 leaves the implicit term out
    tol: float = 1e-2  # relative residual at which the linear solve stops early

    def __post_init__(self):
        for name in (
            "rounds",
            "outer_steps",
            "radius",
            "inner_steps",
            "inner_images",
            "phi_step",
            "lr",
            "batch_size",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("K", "tol"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; it must lie in (0, 1]")


@dataclass(frozen=True)
class Perturbation:
    """An inner solution and how good it is.

    delta         (1, 3, H, W), |delta|_2 <= radius
    loss          the inner objective there
    stationarity  |Phi(delta) - delta| / |delta|: 0 where no step inside the ball can raise the objective
    """

    delta: Tensor
    loss: float
    stationarity: float


@dataclass(frozen=True, eq=False)
class Unlearned:
    """`model` is the cleaned copy, `history` one dict a round, `deltas` (rounds, 3, H, W) what each found."""

    model: nn.Module
    history: list[dict]
    deltas: Tensor


def inner_objective(
    model: nn.Module, params: dict[str, Tensor], delta: Tensor, images: Tensor, labels: Tensor
):
    """H(delta, theta): mean cross-entropy of `labels` on images + delta, with `params` as the weights.

    As in the paper, images + delta is not cut to [0, 1]: cut, delta has no gradient on pixels that are black
    or white already, and a trigger there stays out of its sight.
    """
    logits = functional_call(model, params, (images + delta,))
    return F.cross_entropy(logits, labels)


def maximise(objective, delta: Tensor, *, radius: float, steps: int, phi) -> Perturbation:
    """Maximise `objective(delta)` over the l2 ball: normalised gradient ascent, its step falling to zero.

    The step shrinks linearly from radius / 5, so the path can cross the ball in a few steps and still come to
    rest. `phi(delta)` is the projected gradient step whose fixed points are the stationary points.
    """
    delta = delta.detach()
    for step in range(steps):
        delta.requires_grad_()
        (gradient,) = torch.autograd.grad(objective(delta), delta)
        length = radius / 5 * (1 - step / steps)
        delta = project_l2(delta.detach() + length * gradient / gradient.norm().clamp_min(1e-12), radius)
    with torch.enable_grad():
        moved = phi(delta.requires_grad_())
    stationarity = ((moved - delta).norm() / delta.norm().clamp_min(1e-12)).item()
    return Perturbation(delta.detach(), objective(delta).item(), stationarity)


@torch.enable_grad()
def unlearn(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: IBAUSettings = IBAUSettings(),
    seed: int = 0,
    *,
    progress: bool = False,
    on_round=None,
) -> Unlearned:
    """Remove a backdoor from a copy of `model`, with a small clean set and no knowledge of the trigger.

    model     any classifier of images in [0, 1], on any device; it is left as it was
    images    (N, 3, H, W), uint8 or float in [0, 1]: clean images the model was not trained on
    labels    (N,) int64: their true classes
    on_round  called after every round as on_round(model, history), to watch the cleaning

    Batch statistics stay fixed (eval mode), as in the authors' code. Raises ValueError for a clean set that
    cannot be used, UnlearningError when the loss is not finite.
    """
    device = device_of(model)
    images, labels = _checked(model, images, labels, device)
    cleaned = copy.deepcopy(model).eval()
    weights = dict(cleaned.named_parameters())
    for weight in weights.values():
        weight.requires_grad_()
    optimizer = torch.optim.Adam(weights.values(), lr=settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.rounds * settings.outer_steps)
    generator = torch.Generator().manual_seed(seed)
    batches = _batches(len(images), settings.batch_size, generator)
    history, deltas = [], []
    for number in tqdm(range(1, settings.rounds + 1), desc="I-BAU", unit="round", disable=not progress):
        started = time.perf_counter()
        sample = torch.randperm(len(images), generator=generator)[: settings.inner_images].to(device)
        inner = InnerProblem(cleaned, to_float(images[sample]), labels[sample], settings)
        found = inner.solve(generator)
        inner_seconds = time.perf_counter() - started
        steps = []
        for _ in range(settings.outer_steps):
            batch = next(batches).to(device)
            steps.append(outer_step(inner, found.delta, images[batch], labels[batch], optimizer, generator))
            schedule.step()
        history.append(
            {
                "round": number,
                "inner_loss": found.loss,
                "delta_norm": found.delta.norm().item(),
                "stationarity": found.stationarity,
                "outer_loss": _mean([s.loss for s in steps]),
                "implicit_over_direct": _mean([s.ratio for s in steps]),
                "residual": _mean([s.solution.residual for s in steps]),
                "contraction": _mean([s.solution.contraction for s in steps]),
                "inner_seconds": inner_seconds,
                "seconds": time.perf_counter() - started,
            }
        )
        deltas.append(found.delta[0].cpu())
        if on_round:
            on_round(cleaned, history)
    return Unlearned(cleaned, history, torch.stack(deltas))


class InnerProblem:
    """max over |delta| <= C of H(delta, theta) on a fixed sample of clean images, for the model's weights.

    The sample is fixed so that the problem has a solution that stays one: the implicit function theorem is
    about a stationary point of *this* objective, and `phi` is evaluated on the images `solve` used.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, settings: IBAUSettings):
        self.model, self.images, self.labels, self.settings = model, images, labels, settings
        self.names = [name for name, _ in model.named_parameters()]

    def weights(self) -> list[Tensor]:
        return [p.detach() for p in self.model.parameters()]

    def objective(self, delta: Tensor, params: Sequence[Tensor]) -> Tensor:
        """H(delta, theta) on the sample."""
        named = dict(zip(self.names, params, strict=True))
        return inner_objective(self.model, named, delta, self.images, self.labels)

    def phi(self, delta: Tensor, params: Sequence[Tensor]) -> Tensor:
        """Phi(delta, theta) = project(delta + eta dH/ddelta): one projected gradient ascent step."""
        (gradient,) = torch.autograd.grad(self.objective(delta, params), delta, create_graph=True)
        return project_l2(delta + self.settings.phi_step * gradient, self.settings.radius)

    def solve(self, generator: torch.Generator) -> Perturbation:
        """Ascend from a small random start: at 0 itself the projection has no direction to keep."""
        weights = self.weights()
        start = torch.randn(1, *self.images.shape[1:], generator=generator).to(self.images.device)
        return maximise(
            lambda delta: self.objective(delta, weights),
            start * (0.01 * self.settings.radius / start.norm()),
            radius=self.settings.radius,
            steps=self.settings.inner_steps,
            phi=lambda delta: self.phi(delta, weights),
        )


def outer_step(
    inner: InnerProblem, delta: Tensor, images: Tensor, labels: Tensor, optimizer, generator: torch.Generator
) -> Hypergradient:
    """One Adam step along the hypergradient of the batch's cross-entropy; `share` of it carries delta."""
    settings = inner.settings
    images = to_float(images)
    count = max(1, round(settings.share * len(images)))
    chosen = torch.randperm(len(images), generator=generator)[:count].to(images.device)
    carries = torch.zeros(len(images), 1, 1, 1, device=images.device).index_fill_(0, chosen, 1)

    def outer(delta: Tensor, params: Sequence[Tensor]) -> Tensor:
        named = dict(zip(inner.names, params, strict=True))
        return inner_objective(inner.model, named, carries * delta, images, labels)

    gradient = implicit_hypergradient(
        outer, inner.phi, delta, inner.weights(), maxiter=settings.K, tol=settings.tol
    )
    if not (math.isfinite(gradient.loss) and math.isfinite(gradient.ratio)):
        raise UnlearningError(
            f"the outer loss became {gradient.loss} and |implicit| / |direct| {gradient.ratio}; "
            f"try a lower rate than lr={settings.lr:g}"
        )
    for weight, step in zip(inner.model.parameters(), gradient.total, strict=True):
        weight.grad = step
    optimizer.step()
    return gradient


def _batches(n: int, size: int, generator: torch.Generator):
    """Endless batches of indices, passing over all n in a new order each time."""
    while True:
        yield from torch.randperm(n, generator=generator).split(size)


def _checked(model: nn.Module, images: Tensor, labels: Tensor, device) -> tuple[Tensor, Tensor]:
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


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
