"""The recipe of the I-BAU authors' script as it stands, for comparison with `ibau.unlearn`.

It differs in what matters to the theory: delta ascends by SGD in one pass over the clean set, neither
bounded nor clamped, against the model's own predictions; Phi is a step of 0.1 on one fixed batch; five terms
of the series are summed whether it converges or not; delta is on one image in a hundred. Nothing is held out.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ibau.checks import positive
from ibau.hypergradient.implicit import implicit_hypergradient
from ibau.hypergradient.layers import exact_float32
from ibau.hypergradient.solvers import neumann
from ibau.unlearning.common import Perturbation, Unlearned, arranged, batches, line_of, prepare
from ibau.unlearning.ibau import cross_entropy, follow

BATCH = 100
INNER_LR = 10.0
PENALTY = 1e-3  # weight of |delta|^2 that the inner objective loses
PHI_STEP = 0.1
SHARE = 0.01
LR = 1e-3
K = 5


@dataclass(frozen=True)
class AuthorsSettings:
    """How long to run the authors' recipe: their notebooks take 1 to 5 rounds, each a pass over the clean
    set."""

    rounds: int = 1

    def __post_init__(self):
        positive(self, "rounds")

    @property
    def work(self) -> int:
        """What its time is proportional to."""
        return self.rounds

    def scaled(self, share: float) -> "AuthorsSettings":
        """The same with this share of the rounds."""
        return AuthorsSettings(max(1, round(share * self.rounds)))


class _Inner:
    """The authors' inner problem: H against the model's own predictions, less PENALTY |delta|^2."""

    def __init__(self, model: nn.Module, images: Tensor):
        self.model, self.names = model, [name for name, _ in model.named_parameters()]
        self.images, self.labels = self.seen(images)

    def seen(self, images: Tensor) -> tuple[Tensor, Tensor]:
        images = arranged(images, self.model)
        with torch.no_grad():
            return images, self.model(images.clone()).argmax(1)

    def weights(self) -> list[Tensor]:
        return [p.detach() for p in self.model.parameters()]

    def on(self, delta: Tensor, params, images: Tensor, labels: Tensor) -> Tensor:
        theta = dict(zip(self.names, params, strict=True))
        return cross_entropy(self.model, theta, images + delta, labels) - PENALTY * delta.square().sum()

    def objective(self, delta: Tensor, params) -> Tensor:
        return self.on(delta, params, self.images, self.labels)

    def phi(self, delta: Tensor, params) -> Tensor:
        (gradient,) = torch.autograd.grad(self.objective(delta, params), delta, create_graph=True)
        return delta + PHI_STEP * gradient

    def solve(self, pool: list[Tensor]) -> Perturbation:
        """One step of plain ascent from 0 a batch."""
        delta = torch.zeros_like(self.images[:1])
        for images in pool:
            delta = delta.detach().requires_grad_()
            objective = self.on(delta, self.weights(), *self.seen(images))
            (gradient,) = torch.autograd.grad(objective, delta)
            delta = delta.detach() + INNER_LR * gradient
        with torch.enable_grad():
            delta.requires_grad_()
            loss = self.objective(delta, self.weights())
            moved = self.phi(delta, self.weights())
        stationarity = (moved - delta).norm() / delta.norm().clamp_min(1e-12)
        return Perturbation(delta.detach(), loss.item(), stationarity.item())


@exact_float32()
@torch.enable_grad()
def authors(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: AuthorsSettings = AuthorsSettings(),
    seed: int = 0,
    *,
    progress: bool = False,
    on_round: Callable[[nn.Module, list[dict]], None] | None = None,
) -> Unlearned:
    """Unlearn by the authors' recipe; arguments, result and history as of `ibau.unlearn`.

    Raises ValueError for a clean set that cannot be used, UnlearningError where a loss is not finite.
    """
    start = prepare(model, images, labels, 0.0, seed)
    theta, images, labels, generator = start.model, start.images, start.labels, start.generator
    optimizer = torch.optim.Adam(theta.parameters(), lr=LR)
    clean = batches(images, labels, BATCH, generator)
    a_pass = math.ceil(len(images) / BATCH)
    history, deltas = [], []
    numbers = tqdm(range(1, settings.rounds + 1), desc="I-BAU, authors", unit="round", disable=not progress)
    for number in numbers:
        began, steps = time.perf_counter(), []
        sample = torch.randperm(len(images), generator=generator)[:BATCH].to(images.device)
        inner = _Inner(theta, images[sample])
        order = batches(images, labels, BATCH, generator)
        found = inner.solve([next(order)[0] for _ in range(a_pass)])
        solved = time.perf_counter()
        for _ in range(a_pass):
            h = _outer_step(inner, found.delta, *next(clean), optimizer, generator)
            steps.append(h.numbers())
        line = line_of(found, steps, solved - began, time.perf_counter() - began)
        history.append({"round": number, **line, "rate": LR})
        deltas.append(found.delta[0].cpu())
        if on_round:
            on_round(theta, history)
    return Unlearned(start.finished(), history, deltas)


def _outer_step(inner: _Inner, delta: Tensor, images: Tensor, labels: Tensor, optimizer, generator):
    images = arranged(images, inner.model)
    chosen = torch.randperm(len(images), generator=generator)[: max(1, round(SHARE * len(images)))]
    carries = torch.zeros(len(images), 1, 1, 1, device=images.device)
    carries.index_fill_(0, chosen.to(images.device), 1)

    def outer(delta: Tensor, params) -> Tensor:
        theta = dict(zip(inner.names, params, strict=True))
        return cross_entropy(inner.model, theta, images + carries * delta, labels)

    h = implicit_hypergradient(outer, inner.phi, delta, inner.weights(), solve=neumann, maxiter=K)
    follow(h, inner.model, optimizer)
    return h
