"""I-BAU: unlearn a backdoor by a minimax over weights and one shared perturbation (Zeng et al., ICLR 2022).

(1)    min over theta  max over |delta|_2 <= C   H(delta, theta),    H = mean_i L(f_theta(x_i + delta), y_i)

This is the paper's Algorithm 1, and nothing else. A round has two parts.

Inner: which one perturbation, added to every image, hurts most? delta is an approximate maximiser of
H( . , theta), found by projected gradient ascent. One plain step of such an ascent is

(2)    Phi(delta, theta) = project(delta + eta dH/ddelta),    eta = phi_step / |d2H/ddelta2|

Outer: Adam steps on theta along the hypergradient, which accounts for how delta moves with theta,

(3)    d psi / d theta = dH_out/dtheta + (dPhi/dtheta)^T v,   v = sum_{k < K} (dPhi/ddelta^T)^k dH_out/ddelta
                         direct term    implicit term         the first K terms of a Neumann series

Read `InnerProblem`, `outer_step`, `unlearn`, in this order. `implicit_hypergradient` is the formula (3), and
`ibau.hypergradient.solvers.fixed_point` sums the series. `ibau.unlearning.common` holds the checks, the
safety net and what the history reports.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from ibau.checks import not_negative, one_of, positive, within
from ibau.hypergradient.implicit import (
    Hypergradient,
    curvature,
    implicit_hypergradient,
    kkt_hypergradient,
    project_l2,
    unrolled_hypergradient,
)
from ibau.hypergradient.layers import exact_float32, reduced
from ibau.networks.training import PRECISIONS, autocast, native_bfloat16
from ibau.unlearning.common import (
    Guard,
    Perturbation,
    Unlearned,
    arranged,
    batches,
    cosine,
    line_of,
    measured,
    prepare,
    set_rate,
)

SOLVERS = ("fixed_point", "cg", "unrolled")


@dataclass(frozen=True)
class IBAUSettings:
    """How to unlearn with the paper's algorithm.

    The paper and its authors' code give K = 5, Adam, batches of 100 and (in the CIFAR-10 notebook) the
    radius 10 and delta on 1% of a batch; the other numbers are ours. Within such a radius delta can be far
    larger than any trigger that could hide (a white 4x4 square on mid-grey has l2 norm 3.5), so that
    whatever a trigger excites is within its reach. Few images carry it, because no classifier stays accurate
    under it.

    `solver` says how the implicit term is computed: by the series of (3), by conjugate gradients on the
    optimality conditions of the ball ("cg"), or by differentiating through K further ascent steps
    ("unrolled").
    """

    rounds: int = 20  # inner solves
    outer_steps: int = 10  # Adam steps after each of them
    batch_size: int = 100  # clean images of an outer step
    share: float = 0.02  # share of these that carries delta
    lr: float = 5e-4  # of Adam; it falls to 0 along a cosine
    radius: float = 10.0  # C: the l2 ball delta may not leave; pixels in [0, 1]
    inner_steps: int = 20  # T: ascent steps of an inner solve
    inner_images: int = 50  # clean images a round's inner problem is posed on
    K: int = 5  # terms of the series, iterations or unrolled steps; 0 leaves the implicit term out
    phi_step: float = 1.8  # eta |d2H/ddelta2|: the step of Phi, which contracts at a maximiser below 2
    solver: str = "fixed_point"
    tol: float = 1e-2  # relative residual at which the linear solve stops early
    held_out: float = 0.2  # share of the clean images that is only watched, 500 at most; 0: none
    precision: str = "auto"  # of the ascent and of steps with K = 0; gradients are float32 where K > 0

    def __post_init__(self):
        positive(self, "rounds", "outer_steps", "batch_size", "lr", "inner_steps", "inner_images", "phi_step")
        not_negative(self, "K", "tol")
        within(self, "(0, inf)", "radius")
        within(self, "(0, 1]", "share")
        within(self, "[0, 1)", "held_out")
        one_of(self, "solver", SOLVERS)
        one_of(self, "precision", PRECISIONS)

    @property
    def work(self) -> int:
        """What its time is proportional to."""
        return self.rounds

    def scaled(self, share: float) -> "IBAUSettings":
        """The same with this share of the rounds."""
        return replace(self, rounds=max(1, round(share * self.rounds)))


def cross_entropy(model: nn.Module, params: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """mean_i L(f_theta(x_i), y_i), with `params` as theta; labels (N,), or probabilities (N, classes)."""
    logits = functional_call(model, params, (images,))
    return F.cross_entropy(logits.float() if logits.dtype == torch.bfloat16 else logits, labels)


class InnerProblem:
    """max over |delta|_2 <= radius of H(delta, theta), on a fixed sample of clean images.

    The sample is fixed so that the problem has a solution that stays one: the implicit function theorem is
    about a stationary point of *this* objective, and Phi is evaluated on the images that `solve` used. As in
    the paper, x + delta is not cut to [0, 1]: cut, delta has no gradient on pixels that are black or white
    already, and a trigger there stays out of its sight.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, settings: IBAUSettings):
        self.model, self.settings = model, settings
        self.images, self.labels = arranged(images, model), labels
        self.names = [name for name, _ in model.named_parameters()]
        self.eta: Tensor | None = None  # the step of Phi: `solve` takes it from the curvature at delta

    def weights(self) -> list[Tensor]:
        """theta"""
        return [p.detach() for p in self.model.parameters()]

    def objective(self, delta: Tensor, params: Sequence[Tensor]) -> Tensor:
        """Eq. (1): H(delta, theta) on the sample."""
        theta = dict(zip(self.names, params, strict=True))
        return cross_entropy(self.model, theta, self.images + delta, self.labels)

    def phi(self, delta: Tensor, params: Sequence[Tensor]) -> Tensor:
        """Eq. (2): Phi(delta, theta) = project(delta + eta dH/ddelta), one projected gradient ascent step."""
        (gradient,) = torch.autograd.grad(self.objective(delta, params), delta, create_graph=True)
        return self.project(delta + self.eta * gradient)

    def project(self, delta: Tensor) -> Tensor:
        """The closest point to delta in the ball."""
        return project_l2(delta, self.settings.radius)

    def solve(self, generator: torch.Generator) -> Perturbation:
        """Ascend from a small random delta: at 0 the projection has no direction to keep."""
        settings, theta = self.settings, self.weights()

        def objective(delta: Tensor) -> Tensor:
            with autocast(self.images.device, settings.precision):
                return self.objective(delta, theta)

        start = torch.randn(1, *self.images.shape[1:], generator=generator)
        start = (start * (0.01 * settings.radius / start.norm())).to(self.images.device)
        delta = maximise(objective, start, radius=settings.radius, steps=settings.inner_steps)
        return self.solved(delta)

    def solved(self, delta: Tensor) -> Perturbation:
        """delta as the solution: how good it is, and the step of Phi there, where Phi is needed."""
        if self.settings.K:
            with second_order(self.images.device, self.settings.precision) or nullcontext():
                largest = curvature(self.objective, delta, self.weights())
            self.eta = self.settings.phi_step / largest.clamp_min(1e-12)
        return measured(self, delta)


def maximise(objective, delta: Tensor, *, radius: float, steps: int) -> Tensor:
    """Maximise `objective(delta)` over the l2 ball: normalised gradient ascent, its step falling to zero.

    The step shrinks linearly from radius / 5, so that the path can cross the ball in a few steps and still
    comes to rest.
    """
    delta = delta.detach()
    for step in range(steps):
        delta.requires_grad_()
        (gradient,) = torch.autograd.grad(objective(delta), delta)
        length = radius / 5 * (1 - step / steps)
        delta = project_l2(delta.detach() + length * gradient / gradient.norm().clamp_min(1e-12), radius)
    return delta.detach()


def outer_step(
    inner: InnerProblem, delta: Tensor, images: Tensor, labels: Tensor, optimizer, generator: torch.Generator
) -> Hypergradient:
    """Eq. (3): one Adam step along the hypergradient of a batch's loss; `share` of the batch carries delta.

    Stricter than the authors' script: delta is bounded, how far it is from a stationary point is reported,
    and of a series that diverges the best partial sum counts, none where even that is worse than v = 0.

    Where K > 0 gradients are float32's. Where `precision` allows, the products with second derivatives at
    that float32 point, and the implicit term itself, multiply in bfloat16.
    """
    settings, theta = inner.settings, inner.weights()
    images = arranged(images, inner.model)
    count = max(1, round(settings.share * len(images)))
    chosen = torch.randperm(len(images), generator=generator)[:count].to(images.device)
    carries = torch.zeros(len(images), 1, 1, 1, device=images.device).index_fill_(0, chosen, 1)
    precision = "float32" if settings.K else settings.precision

    def outer(delta: Tensor, params: Sequence[Tensor]) -> Tensor:
        weights = dict(zip(inner.names, params, strict=True))
        with autocast(images.device, precision):
            return cross_entropy(inner.model, weights, images + carries * delta, labels)

    how = {"maxiter": settings.K, "tol": settings.tol}
    if settings.solver == "unrolled" and settings.K:
        h = unrolled_hypergradient(outer, inner.phi, delta, theta, steps=settings.K)
    elif settings.solver == "cg":
        h = kkt_hypergradient(outer, inner.objective, delta, theta, radius=settings.radius, **how)
    else:
        products = second_order(images.device, settings.precision)
        h = implicit_hypergradient(outer, inner.phi, delta, theta, **how, products=products)
    follow(h, inner.model, optimizer)
    return h


def second_order(device: torch.device, precision: str):
    """The context for products with second derivatives; None: as everything else."""
    low = precision == "auto" and native_bfloat16(device) or precision == "bfloat16"
    return reduced() if low else None


def follow(gradient: Hypergradient, model: nn.Module, optimizer) -> None:
    """Take the optimiser's step along a hypergradient."""
    for weight, step in zip(model.parameters(), gradient.total, strict=True):
        weight.grad = step
    optimizer.step()


@exact_float32()
@torch.enable_grad()
def unlearn(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: IBAUSettings = IBAUSettings(),
    seed: int = 0,
    *,
    progress: bool = False,
    on_round: Callable[[nn.Module, list[dict]], None] | None = None,
) -> Unlearned:
    """The paper's I-BAU: remove a backdoor from a copy of `model`, without any knowledge of the trigger.

    model     any classifier of images in [0, 1], on any device; it is left as it was
    images    (N, 3, H, W), uint8 or float in [0, 1]: clean images the model was not trained on
    labels    (N,) int64: their true classes
    on_round  called after every round as on_round(model, history), to watch

    Batch statistics stay fixed (eval mode), as in the authors' code. Part of the clean images is held out: a
    round after which accuracy on it has collapsed, or whose loss is not finite, is undone and tried again at
    half the rate.

    Returns Unlearned; a line of its history has round, inner_loss, delta_norm, stationarity, outer_loss,
    implicit_over_direct (|implicit| / |direct|), residual and contraction of the linear system, kept (the
    share of the outer steps whose implicit term was kept), inner_seconds, seconds, held_out_acc, rate: means
    over the round's outer steps.

    Raises ValueError for a clean set that cannot be used, UnlearningError when the rate was halved in vain.
    Warns (UnlearningWarning) when held-out accuracy ends more than 5 points below what it was.
    """
    start = prepare(model, images, labels, settings.held_out, seed)
    theta, images, labels, generator = start.model, start.images, start.labels, start.generator
    optimizer = torch.optim.Adam(theta.parameters(), lr=settings.lr)
    guard = Guard(theta, optimizer, start.watched, settings.lr)
    clean = batches(images, labels, settings.batch_size, generator)
    history, deltas, in_all = [], [], settings.rounds * settings.outer_steps
    with tqdm(total=settings.rounds, desc="I-BAU", unit="round", disable=not progress) as bar:
        while len(history) < settings.rounds:
            with guard:  # a round: what it changes is undone where it does harm
                began, steps = time.perf_counter(), []
                sample = torch.randperm(len(images), generator=generator)[: settings.inner_images]
                sample = sample.to(images.device)
                inner = InnerProblem(theta, images[sample], labels[sample], settings)
                found = inner.solve(generator)
                solved = time.perf_counter()
                for step in range(settings.outer_steps):
                    done = (len(history) * settings.outer_steps + step) / in_all
                    set_rate(optimizer, cosine(guard.rate, done))
                    h = outer_step(inner, found.delta, *next(clean), optimizer, generator)
                    steps.append(h.numbers())  # not h: it holds gradients as large as the weights
                line = line_of(found, steps, solved - began, time.perf_counter() - began)
            if guard.undone:
                continue
            history.append({"round": len(history) + 1, **line, **guard.line()})
            deltas.append(found.delta[0].cpu())
            bar.update()
            if on_round:
                on_round(theta, history)
    guard.warn()
    return Unlearned(start.finished(), history, deltas)
