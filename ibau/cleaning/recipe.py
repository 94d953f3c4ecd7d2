"""I-BAU+: our recipe to remove a backdoor, which grew out of the paper's I-BAU and is not the paper's.

What it adds to `ibau.unlearn`: patches that replace pixels beside perturbations that are added, of another
size each round; a search that can aim at one class after another; recovery steps on clean images alone; and,
where clean images are few, the given model as a teacher. By default it leaves the implicit term out (K = 0).
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ibau.checks import not_negative, one_of, positive, within
from ibau.cleaning.perturbations import InnerProblem, perturbed
from ibau.hypergradient.implicit import Hypergradient, implicit_hypergradient
from ibau.hypergradient.layers import exact_float32
from ibau.measure.intervals import Rate
from ibau.networks.training import PRECISIONS, autocast, shifted
from ibau.unlearning.common import (
    COLLAPSE,
    Guard,
    Unlearned,
    accuracy,
    arranged,
    batches,
    cosine,
    line_of,
    prepare,
    set_rate,
)
from ibau.unlearning.ibau import cross_entropy, follow, second_order

SEARCHES = ("alternating", "class-targeted", "patch", "additive")


@dataclass(frozen=True)
class CleanSettings:
    """How to clean.

    An additive delta is far larger than any trigger that could hide and is shown on few images, because no
    classifier stays accurate under it (see IBAUSettings). A patch leaves the rest of the image to be seen,
    and is shown on more. The "alternating" search takes an additive delta and a patch by turns.

    The "class-targeted" search is for a network that can be fooled in so many ways that the worst one need
    not be the trigger. It alternates too, but two rounds look for what moves images to one class, as a
    trigger does, and not just away from their own. All classes have their turn, in an order that is drawn;
    what earlier rounds found is shown again, during recovery too.

    The labels of a hundred images are soon learnt by heart. With fewer than `few` images to learn from, and
    recovery steps, the outer steps aim at what the given model says of the images without delta, shift them
    by up to an eighth of their side, and halve the rate. With more, labels are the aim; where held-out
    accuracy ends more than `lost` lower and below its 95% interval, recovery is done once more in that way,
    twice as long.
    """

    rounds: int = 16  # inner solves
    outer_steps: int = 10  # Adam steps after each of them
    recovery_steps: int = 160  # after the last round, on clean images alone: they bring accuracy back
    batch_size: int = 100  # clean images of an outer step
    share: float = 0.02  # share of these that carries an additive delta
    patch_share: float = 0.04  # and of a patch, which leaves more of the image to be seen
    lr: float = 5e-4  # of Adam; it falls to 0 along a cosine
    search: str = "alternating"  # or "class-targeted"; "patch" and "additive" are one kind alone
    least_area: float = 0.008  # A, as a share of the image, is drawn each round between this ...
    most_area: float = 0.31  # ... and this, even on a logarithmic scale; 8 to 320 of 32x32 pixels
    radius: float = 10.0  # C: the l2 ball an additive delta may not leave; pixels in [0, 1]
    inner_steps: int = 20  # ascent steps of an inner solve
    inner_images: int = 50  # clean images a round's inner problem is posed on
    K: int = 0  # terms of the series of the implicit term, see IBAUSettings; 0 leaves it out
    phi_step: float = 1.0  # eta |d2H/ddelta2|, see IBAUSettings
    tol: float = 1e-2  # relative residual at which the linear solve stops early
    held_out: float = 0.2  # share of the clean images that is only watched, 500 at most; 0: none
    few: int = 300  # clean images to learn from; with fewer the given model is the teacher
    lost: float = 0.05  # held-out accuracy lost at the end that is worth a second recovery
    earlier: float = 2.0  # class-targeted: earlier perturbations are on so many times both shares
    precision: str = "auto"  # of the ascent and of steps with K = 0; gradients are float32 where K > 0

    def __post_init__(self):
        positive(self, "rounds", "outer_steps", "batch_size", "lr", "inner_steps", "inner_images", "phi_step")
        not_negative(self, "K", "tol", "recovery_steps", "few", "lost", "earlier")
        within(self, "(0, 1]", "share", "patch_share", "most_area")
        within(self, f"(0, {self.most_area}]", "least_area")
        within(self, "(0, inf)", "radius")
        within(self, "[0, 1)", "held_out")
        one_of(self, "search", SEARCHES)
        one_of(self, "precision", PRECISIONS)

    @property
    def work(self) -> int:
        """What its time is proportional to, nearly: outer and recovery steps."""
        return self.rounds * self.outer_steps + self.recovery_steps

    def scaled(self, share: float) -> "CleanSettings":
        """The same with this share of the rounds and of the recovery."""
        rounds = max(1, round(share * self.rounds))
        return replace(self, rounds=rounds, recovery_steps=round(share * self.recovery_steps))


@exact_float32()
@torch.enable_grad()
def clean(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: CleanSettings = CleanSettings(),
    seed: int = 0,
    *,
    progress: bool = False,
    on_round: Callable[[nn.Module, list[dict]], None] | None = None,
) -> Unlearned:
    """I-BAU+: remove a backdoor from a copy of `model`, without any knowledge of the trigger.

    Arguments, safety net, result, errors and warnings as of `ibau.unlearn`. A line of the history has "area"
    (pixels) where the perturbation is a patch, and "aim", a class, where the search is class-targeted
    (inner_loss is then minus its cross-entropy). A recovery has a line of its own, with the number of its
    steps as "recovery".
    """
    run = _Run(prepare(model, images, labels, settings.held_out, seed), settings)
    guard, history, deltas = run.guard, [], []
    with tqdm(total=settings.rounds, desc="I-BAU+", unit="round", disable=not progress) as bar:
        while len(history) < settings.rounds:
            with guard:
                line, delta = run.round(len(history))
            if guard.undone:
                continue
            if run.order:  # class-targeted: later steps show it again
                run.earlier.append(delta)
            history.append({"round": len(history) + 1, **line, **guard.line()})
            deltas.append(delta[0].cpu())
            bar.update()
            if on_round:
                on_round(run.model, history)
    if settings.recovery_steps:
        run.recover(history, on_round)
        if not run.teacher and run.lost_much():
            run.recover(history, on_round, teacher=run.given)
    guard.warn()
    return Unlearned(run.start.finished(), history, deltas)


class _Run:
    """What rounds and recoveries share: the weights, their optimiser, the batches, the teacher."""

    def __init__(self, start, settings: CleanSettings):
        self.start, self.settings, self.model = start, settings, start.model
        self.images, self.labels, self.generator = start.images, start.labels, start.generator
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.lr)
        self.guard = Guard(self.model, self.optimizer, start.watched, settings.lr)
        self.given = copy.deepcopy(self.model.state_dict())
        self.batches = batches(self.images, self.labels, settings.batch_size, self.generator)
        self.order, self.earlier, self.teacher = [], [], None
        if settings.search == "class-targeted":
            with torch.no_grad():
                classes = self.model(arranged(self.images[:1], self.model).clone()).shape[1]
            self.order = torch.randperm(classes, generator=self.generator).tolist()
        if settings.recovery_steps and len(self.images) < settings.few:
            self.learn_from(self.given)

    def learn_from(self, weights: dict) -> None:
        """The model with these weights is the teacher from now on, and the rate is halved."""
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)
        self.teacher.load_state_dict(weights)
        self.guard.rate /= 2

    def round(self, number: int) -> tuple[dict, Tensor]:
        """Solve the inner problem, take the outer steps; returns what it was like, and delta."""
        began, settings = time.perf_counter(), self.settings
        sample = torch.randperm(len(self.images), generator=self.generator)[: settings.inner_images]
        sample = sample.to(self.images.device)
        area, aim = self._area(number), self._aim(number)
        inner = InnerProblem(self.model, self.images[sample], self.labels[sample], settings, area, aim)
        found = inner.solve(self.generator)
        solved = time.perf_counter()
        steps, taken = [], number * settings.outer_steps
        in_all = settings.rounds * settings.outer_steps + settings.recovery_steps
        for step in range(settings.outer_steps):
            set_rate(self.optimizer, cosine(self.guard.rate, (taken + step) / in_all))
            h = _outer_step(inner, found.delta, *self._batch(), self.optimizer, self.generator)
            steps.append(h.numbers())
        line = line_of(found, steps, solved - began, time.perf_counter() - began)
        about = {"area": area, "aim": aim}
        return {**line, **{name: value for name, value in about.items() if value is not None}}, found.delta

    def recover(self, history: list[dict], on_round, teacher: dict | None = None) -> None:
        """Take recovery steps and note them; undo those that ruin held-out accuracy, or bring none back."""
        least = self.guard.accuracy if teacher else COLLAPSE * self.guard.accuracy
        self.guard.__enter__()
        line = self._recovery(teacher)
        recovered = accuracy(self.model, *self.start.watched)
        if not math.isfinite(line["outer_loss"]) or recovered < least:
            self.guard.restore()
            return
        self.guard.accuracy = recovered
        history.append({"round": len(history) + 1, **line, **self.guard.line()})
        if on_round:
            on_round(self.model, history)

    def _recovery(self, teacher: dict | None) -> dict:
        """The steps on clean images; with a teacher twice as many, at a rate that begins high again."""
        began, losses = time.perf_counter(), []
        steps, done = self.settings.recovery_steps, self.settings.rounds * self.settings.outer_steps
        if teacher:
            self.learn_from(teacher)
            steps, done = 2 * steps, 0
        for step in range(steps):
            set_rate(self.optimizer, cosine(self.guard.rate, (done + step) / (done + steps)))
            images, targets = self._batch()
            with autocast(images.device, self.settings.precision):
                logits = self.model(images.clone())
            loss = F.cross_entropy(logits.float(), targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        outer_loss = torch.stack(losses).cpu().double().mean().item()
        return {"recovery": steps, "outer_loss": outer_loss, "seconds": time.perf_counter() - began}

    def lost_much(self) -> bool:
        """Whether held-out accuracy ended more than `lost` lower, and below the 95% interval at first."""
        before, after, n = self.guard.before, self.guard.accuracy, len(self.start.watched[0])
        return before - after > self.settings.lost and after < Rate(round(before * n), n).low

    def _batch(self) -> tuple[Tensor, Tensor]:
        """The next outer step's images, and what it aims at: labels, or probabilities (N, classes)."""
        images, targets = next(self.batches)
        images = arranged(images, self.model)
        if self.teacher:
            most = images.shape[-2] // 8, images.shape[-1] // 8  # what comes in mirrors the edge
            images = shifted(images, most, "reflect", generator=self.generator).contiguous()
            images = arranged(images, self.model)
            with torch.no_grad(), autocast(images.device, self.settings.precision):
                targets = self.teacher(images.clone()).float().softmax(1)
        return self._with_earlier(images) if self.earlier else images, targets

    def _with_earlier(self, images: Tensor) -> Tensor:
        """A copy of the images, some of which carry what an earlier round found, drawn for each."""
        settings = self.settings
        count = round(settings.earlier * (settings.share + settings.patch_share) * len(images))
        chosen = torch.randperm(len(images), generator=self.generator)[:count]
        which = torch.randint(len(self.earlier), chosen.shape, generator=self.generator)
        images = images.clone()
        for i, k in zip(chosen.tolist(), which.tolist(), strict=True):
            images[i : i + 1] = perturbed(images[i : i + 1], self.earlier[k])
        return images

    def _area(self, number: int) -> float | None:
        """The pixels a patch of this round may cover; None for an additive perturbation."""
        search, least, most = self.settings.search, self.settings.least_area, self.settings.most_area
        if search == "additive" or search != "patch" and number % 2 == 0:
            return None
        share = least * (most / least) ** torch.rand(1, generator=self.generator).item()
        return max(1.0, share * self.images.shape[-2] * self.images.shape[-1])

    def _aim(self, number: int) -> int | None:
        """The class to which this round's perturbation is to move images; None: away from their own."""
        return self.order[number // 2 % len(self.order)] if self.order else None


def _outer_step(
    inner: InnerProblem, delta: Tensor, images: Tensor, targets: Tensor, optimizer, generator: torch.Generator
) -> Hypergradient:
    """One Adam step along the hypergradient of a batch's cross-entropy; a share of it carries delta."""
    settings = inner.settings
    share = settings.share if inner.area is None else settings.patch_share
    count = max(1, round(share * len(images)))
    chosen = torch.randperm(len(images), generator=generator)[:count].to(images.device)
    carries = torch.zeros(len(images), 1, 1, 1, device=images.device).index_fill_(0, chosen, 1)
    precision = "float32" if settings.K else settings.precision

    def outer(delta: Tensor, params) -> Tensor:
        theta = dict(zip(inner.names, params, strict=True))
        with autocast(images.device, precision):
            return cross_entropy(inner.model, theta, perturbed(images, delta, carries), targets)

    products = second_order(images.device, settings.precision)
    how = {"maxiter": settings.K, "tol": settings.tol, "products": products}
    h = implicit_hypergradient(outer, inner.phi, delta, inner.weights(), **how)
    follow(h, inner.model, optimizer)
    return h
