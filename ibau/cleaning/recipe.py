"""I-BAU: unlearn a backdoor by a minimax over weights and one shared perturbation (Zeng et al., ICLR 2022).

    min over theta  max over |delta|_2 <= C   H(delta, theta),      H = mean_i L(f_theta(x_i + delta), y_i)

A round first solves the inner problem for the weights at hand: which single perturbation, put on every
image, hurts most? Then a few outer steps on the clean set follow the implicit hypergradient.

The paper's perturbation is added: x + delta, |delta|_2 <= C. Most triggers *replace*: delta = (m, p), a mask
and a picture, turns x into (1 - m) x + m p, the form Neural Cleanse gives to triggers; m and p lie in [0, 1],
and sum(m) <= A pixels. The default takes the two in turn, see `IBAUSettings`.
"""

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from ibau.hypergradient.implicit import (
    Hypergradient,
    implicit_hypergradient,
    kkt_hypergradient,
    project_l2,
    unrolled_hypergradient,
)
from ibau.hypergradient.layers import cheapen, reduced, restore
from ibau.hypergradient.solvers import fixed_point, neumann
from ibau.measure.intervals import Rate
from ibau.networks.models import device_of, takes_channels_last
from ibau.networks.training import PRECISIONS, autocast, native_bfloat16, to_float

PERTURBATIONS = ("in turn", "aimed", "replacing", "additive")
HYPERGRADIENTS = ("fixed_point", "cg", "unrolled", "neumann")
COLLAPSE = 0.5  # held-out accuracy below this share of what it was: the round is undone
ROLLBACKS = 3  # and tried again at half the rate, this often in a row
EARLIER = 2  # where perturbations are aimed, earlier ones are shown on so many times both shares
FAINT = 1e-3  # the least mask at which the ascent looks for colours
FEW = 300  # clean images to learn from; with fewer the model itself is the teacher, see IBAUSettings
LOST = 0.05  # held-out accuracy lost at the end that is worth more mending, then a warning


class UnlearningError(Exception):
    """Unlearning cannot go on; the message says where and why. The model that was given is untouched."""


class UnlearningWarning(UserWarning):
    """The cleaned model is worse on held-out clean images than it should be; the message says by how much."""


@dataclass(frozen=True)
class IBAUSettings:
    """How to unlearn.

    The default looks in turn, round by round, for a perturbation to add and for one that replaces pixels, of
    another number each time, and leaves the implicit term out. `IBAUSettings.paper()` is the paper's
    algorithm, an additive delta and five terms of the series; `IBAUSettings.authors()` the authors' script.
    Notebook 04 compares them.

    An additive delta is far larger than any trigger that could hide (a white 4x4 square on mid-grey has l2
    norm 3.5), so that whatever a trigger excites is within its reach, and it is shown on few images, because
    no classifier stays accurate under it. 10 is the radius of the authors' CIFAR-10 notebook, which shows
    delta on 1% of the images. One that replaces pixels leaves the rest of the image to be seen, and is shown
    on more.

    Perturbations that are "aimed" are for a network that can be fooled in so many ways that the worst one
    need not be the trigger. They too are taken in turn, but a pair of rounds looks for what moves images to
    one class, as a trigger does, and not just away from their own. All classes have their turn, in an order
    that is drawn, which takes two rounds each; what earlier rounds found is shown again, in the mending too.

    The labels of a hundred images are soon learnt by heart. With fewer than 300 to learn from (FEW), recipes
    that mend aim their outer steps at what the given model says of the images without delta, shift them by up
    to an eighth of their side, and halve the rate. With more, labels are the aim; where held-out accuracy
    ends more than 5 points lower (LOST) and below its 95% interval, they mend once more in that way, twice as
    long.
    """

    rounds: int = 16  # inner solves, at most: see patience
    outer_steps: int = 10  # after each of them; 0: a pass over the clean set
    mending: int = 160  # outer steps after the last round, on clean images alone: they bring accuracy back
    batch_size: int = 100  # clean images of an outer step
    share: float = 0.02  # share of these that carries an additive delta
    replacing_share: float = 0.04  # and of a replacing one, which leaves more of the image to be seen
    lr: float = 5e-4  # of the outer Adam
    cosine: bool = True  # the rate falls to 0 along a cosine
    perturbation: str = "in turn"  # additive and replacing by turns, aimed at a class or not; or one alone
    least_area: float = 0.008  # A, as a share of the image, is drawn each round between this ...
    most_area: float = 0.31  # ... and this, even on a logarithmic scale; 8 to 320 of 32x32 pixels
    radius: float = 10.0  # C: the l2 ball an additive delta may not leave; pixels in [0, 1]; inf: no bound
    inner_steps: int = 20  # ascent steps of an inner solve; 0: a pass over the clean set
    inner_images: int = 50  # clean images a round's inner problem is posed on
    inner_lr: float = 0.0  # 0: normalised ascent; else plain ascent at this rate, in batches (additive only)
    penalty: float = 0.0  # weight of |delta|^2 that the inner objective loses
    own_labels: bool = False  # the inner objective takes the model's own predictions for labels
    persistent: bool = False  # the ascent starts from the last round's delta, not afresh
    hypergradient: str = "fixed_point"  # how the implicit term is computed, see `hypergradient_of`
    K: int = 0  # terms, iterations or unrolled steps of that, the paper's is 5; 0 leaves the term out
    phi_step: float = 1.0  # eta: step size of Phi, a projected gradient ascent step on the inner objective
    tol: float = 1e-2  # relative residual at which the linear solve stops early
    held_out: float = 0.2  # share of the clean images that is only watched, 500 at most; 0: nothing is
    patience: int = 10  # rounds without a lower held-out objective after which to stop
    precision: str = "auto"  # of the ascent and of steps with K = 0; float32 where K > 0

    @classmethod
    def paper(cls, K: int = 5, **other) -> "IBAUSettings":
        """The paper's algorithm: one additive perturbation in an l2 ball, and the implicit hypergradient.

        `other` settings as usual. K = 0 leaves the implicit term out.
        """
        paper = {"rounds": 20, "mending": 0, "perturbation": "additive", "K": K}
        return cls(**{**paper, **other})

    @classmethod
    def authors(cls, rounds: int = 1) -> "IBAUSettings":
        """The recipe of the authors' script as it stands, for comparison.

        delta ascends by SGD in one pass over the clean set, neither bounded nor clamped, against the model's
        own predictions; Phi is a step of 0.1 on one batch; five terms of the series are summed whether it
        converges or not; delta is shown on one image in a hundred. Nothing is held out.
        """
        return cls(
            rounds=rounds,
            outer_steps=0,
            mending=0,
            share=0.01,
            lr=1e-3,
            cosine=False,
            perturbation="additive",
            radius=math.inf,
            inner_steps=0,
            inner_images=100,
            inner_lr=10.0,
            penalty=1e-3,
            own_labels=True,
            hypergradient="neumann",
            K=5,
            phi_step=0.1,
            held_out=0.0,
            precision="float32",
        )

    def __post_init__(self):
        for name in ("rounds", "radius", "inner_images", "phi_step", "lr", "batch_size", "patience"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("K", "tol", "outer_steps", "mending", "inner_steps", "inner_lr", "penalty"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("share", "replacing_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in (0, 1]")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; it must lie in [0, 1)")
        if not 0 < self.least_area <= self.most_area <= 1:
            raise ValueError(
                f"least_area is {self.least_area} and most_area {self.most_area}; "
                "0 < least_area <= most_area <= 1 must hold"
            )
        for name, valid in (
            ("perturbation", PERTURBATIONS),
            ("hypergradient", HYPERGRADIENTS),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}; valid: {', '.join(valid)}")
        additive = self.perturbation == "additive"
        if not additive and (self.inner_lr or self.penalty or self.hypergradient == "cg"):
            raise ValueError(
                f"inner_lr is {self.inner_lr}, penalty {self.penalty}, hypergradient {self.hypergradient!r}; "
                "0, 0 and not 'cg' go with replacing perturbations, others need perturbation='additive'"
            )
        if self.perturbation != "replacing" and math.isinf(self.radius) and not self.inner_lr:
            raise ValueError("radius is inf; normalised ascent needs a finite one, or set inner_lr")
        if self.hypergradient == "cg" and (math.isinf(self.radius) or self.penalty):
            raise ValueError("hypergradient 'cg' needs a finite radius and no penalty")


@dataclass(frozen=True)
class Perturbation:
    """An inner solution and how good it is.

    delta         (1, C, H, W), |delta|_2 <= radius; replacing: (1, 1 + C, H, W), the mask, then the picture
    loss          the inner objective there
    stationarity  |Phi(delta) - delta| / |delta|: 0 where no step inside the ball can raise the objective
    """

    delta: Tensor
    loss: float
    stationarity: float


@dataclass(frozen=True, eq=False)
class Unlearned:
    """The cleaned copy, and how it came about.

    history  one dict a round: what the inner solve and the outer steps were like, with "aim", a class, where
             perturbations are aimed (inner_loss is then minus its cross-entropy); with images held out, also
             held_out_objective (what the outer steps minimise, for the weights the round began with and the
             delta it found) and held_out_acc (after the round). The mending at the end has a line of its
             own, with the number of its steps as "mending"; a second mending has another
    deltas   the perturbation each round found, (C, H, W) or, where it replaces, (1 + C, H, W)
    stopped  why it ended: "rounds", or "patience"
    """

    model: nn.Module
    history: list[dict]
    deltas: list[Tensor]
    stopped: str


def perturbed(images: Tensor, delta: Tensor, carries: Tensor | None = None) -> Tensor:
    """`images` (N, C, H, W) under delta: x + delta, or (1 - m) x + m p for a delta of one channel more.

    carries (N, 1, 1, 1), of 0 and 1, says which images carry it; None: all.
    """
    if delta.shape[1] == images.shape[1]:
        return images + (delta if carries is None else carries * delta)
    mask, picture = delta[:, :1], delta[:, 1:]
    return images + (mask if carries is None else carries * mask) * (picture - images)


def inner_objective(
    model: nn.Module,
    params: dict[str, Tensor],
    delta: Tensor,
    images: Tensor,
    labels: Tensor,
    carries: Tensor | None = None,
):
    """H(delta, theta): mean cross-entropy of `labels` on perturbed images, with `params` as the weights.

    As in the paper, x + delta is not cut to [0, 1]: cut, delta has no gradient on pixels that are black or
    white already, and a trigger there stays out of its sight.
    """
    logits = functional_call(model, params, (perturbed(images, delta, carries),))
    return F.cross_entropy(logits.float() if logits.dtype == torch.bfloat16 else logits, labels)


def maximise(objective, delta: Tensor, *, radius: float, steps: int) -> Tensor:
    """Maximise `objective(delta)` over the l2 ball: normalised gradient ascent, its step falling to zero.

    The step shrinks linearly from radius / 5, so the path can cross the ball in a few steps and still come to
    rest.
    """
    delta = delta.detach()
    for step in range(steps):
        delta.requires_grad_()
        (gradient,) = torch.autograd.grad(objective(delta), delta)
        length = radius / 5 * (1 - step / steps)
        delta = project_l2(delta.detach() + length * gradient / gradient.norm().clamp_min(1e-12), radius)
    return delta.detach()


def maximise_replacing(objective, delta: Tensor, *, area: float, steps: int) -> Tensor:
    """Maximise `objective(delta)` over delta = (m, p) with m, p in [0, 1] and sum(m) <= area, in pixels.

    The mask steps along its gradient, by a third of the largest norm a binary mask of that area has; the
    picture by 0.5 along the signs of its own, whose size says more about the mask than about the colour.
    Both steps fall to zero. A mask that is zero would hide what colour its pixel should have: it is taken a
    little above.
    """
    delta = project_replacing(delta.detach(), area)
    for step in range(steps):
        delta = torch.cat([delta[:, :1].clamp_min(FAINT), delta[:, 1:]], dim=1).requires_grad_()
        (gradient,) = torch.autograd.grad(objective(delta), delta)
        mask, picture = gradient[:, :1], gradient[:, 1:]
        mask = math.sqrt(area) / 3 * mask / mask.norm().clamp_min(1e-12)
        move = torch.cat([mask, 0.5 * picture.sign()], dim=1)
        delta = project_replacing(delta.detach() + (1 - step / steps) * move, area)
    return delta.detach()


def project_replacing(delta: Tensor, area: float) -> Tensor:
    """The closest (m, p) to delta with m, p in [0, 1] and sum(m) <= area; differentiable almost everywhere.

    The mask loses one number tau throughout before it is cut to [0, 1]. Bisection finds which pixels end
    strictly between; on them tau is what their sum says, which is what is differentiated.
    """
    mask, picture = delta[:, :1], delta[:, 1:].clamp(0, 1)
    values = mask.detach()
    if values.clamp(0, 1).sum() <= area:
        return torch.cat([mask.clamp(0, 1), picture], dim=1)
    low, high = torch.zeros_like(values.max()), values.max()
    for _ in range(30):
        middle = (low + high) / 2
        too_much = (values - middle).clamp(0, 1).sum() > area
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    between = (values > high) & (values < 1 + high)
    if between.any():
        full = (values >= 1 + high).sum()
        high = (mask[between].sum() + full - area) / between.sum()
    return torch.cat([(mask - high).clamp(0, 1), picture], dim=1)


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
    """Remove a backdoor from a copy of `model`, with a small clean set and no knowledge of the trigger.

    model     any classifier of images in [0, 1], on any device; it is left as it was
    images    (N, 3, H, W), uint8 or float in [0, 1]: clean images the model was not trained on
    labels    (N,) int64: their true classes
    on_round  called after every round as on_round(model, history), to watch the cleaning

    Batch statistics stay fixed (eval mode), as in the authors' code. Part of the clean images is held out:
    it decides when to stop, and a round after which accuracy on it has collapsed, or whose loss is not
    finite, is undone and tried again at half the rate.

    Raises ValueError for a clean set that cannot be used, UnlearningError when the rate was halved in vain.
    Warns (UnlearningWarning) when held-out accuracy ends more than 5 points below what it was.
    """
    device = device_of(model)
    images, labels = _checked(model, images, labels, device)
    generator = torch.Generator().manual_seed(seed)
    (images, labels), watched = _hold_out(images, labels, settings, generator)
    cleaned = cheapen(copy.deepcopy(model).eval())
    for weight in cleaned.parameters():
        weight.requires_grad_()
    if takes_channels_last(cleaned, images):
        cleaned.to(memory_format=torch.channels_last)
    run = _Run(cleaned, images, labels, settings, generator)
    given = run.state()[0]
    accuracy = before = _accuracy(cleaned, *watched)
    history, deltas, objectives, rollbacks, stopped = [], [], [], 0, "rounds"
    bar = tqdm(total=settings.rounds, desc="I-BAU", unit="round", disable=not progress)
    with bar:
        while len(history) < settings.rounds:
            kept = run.state()
            try:
                line, delta = run.round()
                accuracy = _accuracy(cleaned, *watched)
                if accuracy < COLLAPSE * before:
                    raise UnlearningError(f"held-out accuracy fell from {before:.1%} to {accuracy:.1%}")
            except UnlearningError as error:
                rollbacks += 1
                if rollbacks > ROLLBACKS:
                    raise UnlearningError(
                        f"round {len(history) + 1}: {error}; undone, and the rate halved {ROLLBACKS} times "
                        f"in vain; try a lower rate than lr={settings.lr:g}"
                    ) from None
                run.restart(kept)
                continue
            rollbacks, found = 0, {}
            if len(watched[0]):
                objectives.append(run.held_out_objective(kept[0], delta, *watched))
                found = {"held_out_objective": objectives[-1], "held_out_acc": accuracy}
                bar.set_postfix(held_out=f"{accuracy:.1%}")
            history.append({"round": len(history) + 1, **line, **found, "rate": run.rate})
            deltas.append(delta[0].cpu())
            bar.update()
            if on_round:
                on_round(cleaned, history)
            if len(objectives) - 1 - _first_lowest(objectives) >= settings.patience:
                stopped = "patience"
                break
    if settings.mending:
        accuracy = _mended(run, watched, accuracy, history, on_round)
        if not run.teacher and _badly_lost(before, accuracy, len(watched[0])):
            accuracy = _mended(run, watched, accuracy, history, on_round, teacher=given)
    restore(cleaned).to(memory_format=torch.contiguous_format)
    _warn_if_lost(before, accuracy, len(watched[0]))
    return Unlearned(cleaned, history, deltas, stopped)


def _mended(
    run: "_Run", watched, accuracy: float, history: list, on_round, teacher: dict | None = None
) -> float:
    """Mend, and note it in `history`; what ruins held-out accuracy, or brings none back, is undone."""
    kept = run.state()
    line, least = run.mend(teacher), accuracy if teacher else COLLAPSE * accuracy
    mended = _accuracy(run.model, *watched)
    if not math.isfinite(line["outer_loss"]) or mended < least:
        run.restart(kept)
        return accuracy
    found = {"held_out_acc": mended} if len(watched[0]) else {}
    history.append({"round": len(history) + 1, **line, **found, "rate": run.rate})
    if on_round:
        on_round(run.model, history)
    return mended


class _Run:
    """The state that rounds change: weights, their optimiser, the rate, the last delta, the batches."""

    def __init__(self, model, images: Tensor, labels: Tensor, settings: IBAUSettings, generator):
        self.model, self.images, self.labels = model, images, labels
        self.settings, self.generator = settings, generator
        self.optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
        self.batches = _batches(len(images), settings.batch_size, generator)
        a_pass = math.ceil(len(images) / settings.batch_size)
        self.outer_steps = settings.outer_steps or a_pass
        self.inner_steps = settings.inner_steps or a_pass
        self.rate, self.taken, self.deltas = settings.lr, 0, {}
        self.order, self.earlier = [], []
        if settings.perturbation == "aimed":
            with torch.no_grad():
                classes = model(_arranged(to_float(images[:1]), model).clone()).shape[1]
            self.order = torch.randperm(classes, generator=generator).tolist()
        self.teacher = None
        if settings.mending and len(images) < FEW:
            self.learn_from(model.state_dict())

    def learn_from(self, weights: dict) -> None:
        """The model with these weights is the teacher from now on."""
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)
        self.teacher.load_state_dict(weights)
        self.rate /= 2

    def state(self) -> tuple:
        return copy.deepcopy(
            (self.model.state_dict(), self.optimizer.state_dict(), self.rate, self.taken, self.deltas)
        )

    def restart(self, state: tuple) -> None:
        """Go back to `state`, at half the rate."""
        weights, optimizer, _, self.taken, self.deltas = state
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(optimizer)
        self.rate /= 2
        del self.earlier[self.taken // self.outer_steps :]

    def round(self) -> tuple[dict, Tensor]:
        """Solve the inner problem, take the outer steps; returns what it was like, and delta."""
        started = time.perf_counter()
        sample = torch.randperm(len(self.images), generator=self.generator)[: self.settings.inner_images]
        sample = sample.to(self.images.device)
        area, aim = self._area(), self._aim()
        inner = InnerProblem(self.model, self.images[sample], self.labels[sample], self.settings, area, aim)
        start = self.deltas.get(area is None)
        found = inner.solve(self.generator, start=start, steps=self.inner_steps, batches=self._pool())
        if not math.isfinite(found.loss):
            raise UnlearningError(f"the inner loss became {found.loss}")
        if self.settings.persistent:
            self.deltas[area is None] = found.delta
        inner_seconds = time.perf_counter() - started
        steps, steps_in_all = [], self.settings.rounds * self.outer_steps + self.settings.mending
        for _ in range(self.outer_steps):
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate(self.taken / steps_in_all)
            steps.append(outer_step(inner, found.delta, *self._batch(), self.optimizer, self.generator))
            self.taken += 1
        if self.order:
            self.earlier.append(found.delta)
        line = {
            "inner_loss": found.loss,
            "delta_norm": found.delta.norm().item(),
            **({} if area is None else {"area": area}),
            **({} if aim is None else {"aim": aim}),
            "stationarity": found.stationarity,
            "outer_loss": _mean([s.loss for s in steps]),
            "implicit_over_direct": _mean([s.ratio for s in steps]),
            "residual": _mean([s.solution.residual for s in steps]),
            "contraction": _mean([s.solution.contraction for s in steps]),
            "inner_seconds": inner_seconds,
            "seconds": time.perf_counter() - started,
        }
        return line, found.delta

    def mend(self, teacher: dict | None = None) -> dict:
        """Take the last outer steps, on clean images; returns what they were like.

        With the weights of a `teacher`, twice as many that learn from it, at a rate that begins high again.
        """
        started, losses = time.perf_counter(), []
        steps, done = self.settings.mending, self.settings.rounds * self.outer_steps  # needed or not
        if teacher:
            self.learn_from(teacher)
            steps, done = 2 * steps, 0
        for step in range(steps):
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate((done + step) / (done + steps))
            images, targets = self._batch()
            with autocast(images.device, self.settings.precision):
                logits = self.model(images.clone())
            loss = F.cross_entropy(logits.float(), targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        seconds = time.perf_counter() - started
        return {"mending": len(losses), "outer_loss": _mean(losses), "seconds": seconds}

    def _batch(self) -> tuple[Tensor, Tensor]:
        """The next outer step's images, and what it aims at: labels, or probabilities (N, classes)."""
        batch = next(self.batches).to(self.images.device)
        images, targets = to_float(self.images[batch]), self.labels[batch]
        images = _arranged(images, self.model)
        if self.teacher:
            images = _arranged(_shifted(images, self.generator), self.model)
            with torch.no_grad(), autocast(images.device, self.settings.precision):
                targets = self.teacher(images.clone()).float().softmax(1)
        return self._with_earlier(images) if self.earlier else images, targets

    def _with_earlier(self, images: Tensor) -> Tensor:
        """A copy of the images, some of which carry what an earlier round found, drawn for each."""
        count = round(EARLIER * (self.settings.share + self.settings.replacing_share) * len(images))
        chosen = torch.randperm(len(images), generator=self.generator)[:count]
        which = torch.randint(len(self.earlier), chosen.shape, generator=self.generator)
        images = images.clone()
        for i, k in zip(chosen.tolist(), which.tolist(), strict=True):
            images[i : i + 1] = perturbed(images[i : i + 1], self.earlier[k])
        return images

    @torch.no_grad()
    def held_out_objective(self, weights: dict, delta: Tensor, images: Tensor, labels: Tensor) -> float:
        """The outer objective on held-out images, for these weights: share of it under delta."""
        share, losses = _share(self.settings, delta, images), []
        named = {name: weights[name] for name, _ in self.model.named_parameters()}
        for x, y in zip(images.split(500), labels.split(500), strict=True):
            x = to_float(x)
            clean = inner_objective(self.model, named, torch.zeros_like(delta), x, y)  # no mask, no change
            hurt = inner_objective(self.model, named, delta, x, y)
            losses.append(((1 - share) * clean + share * hurt).item() * len(x))
        return sum(losses) / len(images)

    def _area(self) -> float | None:
        """The pixels a replacing perturbation of this round may cover; None for an additive one."""
        in_turn = self.settings.perturbation in ("in turn", "aimed")
        if self.settings.perturbation == "additive" or in_turn and self.taken // self.outer_steps % 2 == 0:
            return None
        least, most = self.settings.least_area, self.settings.most_area
        share = least * (most / least) ** torch.rand(1, generator=self.generator).item()
        return max(1.0, share * self.images.shape[-2] * self.images.shape[-1])

    def _aim(self) -> int | None:
        """The class to which this round's perturbation is to move images; None: away from their own."""
        pair = self.taken // self.outer_steps // 2
        return self.order[pair % len(self.order)] if self.order else None

    def _rate(self, done: float) -> float:
        """The rate when a share `done` of all steps is taken."""
        return self.rate / 2 * (1 + math.cos(math.pi * done)) if self.settings.cosine else self.rate

    def _pool(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the clean set, endlessly."""
        for batch in _batches(len(self.images), self.settings.batch_size, self.generator):
            batch = batch.to(self.images.device)
            yield self.images[batch], self.labels[batch]


class InnerProblem:
    """max over delta of H(delta, theta) on a fixed sample of clean images, for the model's weights.

    Over |delta|_2 <= radius, or over replacing perturbations of at most `area` pixels (None: the most that
    the settings allow). With a class to `aim` at, the images of other classes alone count, and the objective
    is minus the cross-entropy of that class.

    The sample is fixed so that the problem has a solution that stays one: the implicit function theorem is
    about a stationary point of *this* objective, and `phi` is evaluated on the images `solve` used.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        settings: IBAUSettings,
        area: float | None = None,
        aim: int | None = None,
    ):
        self.model, self.settings, self.area, self.aim = model, settings, area, aim
        if settings.perturbation == "replacing" and area is None:
            self.area = settings.most_area * images.shape[-2] * images.shape[-1]
        self.names = [name for name, _ in model.named_parameters()]
        if aim is not None:
            others = labels != aim
            others |= ~others.any()  # all of them, where there are none
            images, labels = images[others], labels[others]
        self.images, self.labels = self._ready(images, labels)

    def weights(self) -> list[Tensor]:
        return [p.detach() for p in self.model.parameters()]

    def objective(self, delta: Tensor, params: Sequence[Tensor]) -> Tensor:
        """H(delta, theta) on the sample."""
        return self._objective(delta, params, self.images, self.labels)

    def phi(self, delta: Tensor, params: Sequence[Tensor]) -> Tensor:
        """Phi(delta, theta) = project(delta + eta dH/ddelta): one projected gradient ascent step."""
        (gradient,) = torch.autograd.grad(self.objective(delta, params), delta, create_graph=True)
        return self.project(delta + self.settings.phi_step * gradient)

    def project(self, delta: Tensor) -> Tensor:
        """The closest perturbation that is allowed."""
        if self.area is None:
            return project_l2(delta, self.settings.radius)
        return project_replacing(delta, self.area)

    def solve(
        self, generator: torch.Generator, *, start: Tensor | None = None, steps: int = 0, batches=None
    ) -> Perturbation:
        """Ascend from `start`, or from a small random one: at 0 the projection has no direction to keep.

        With `inner_lr` the ascent is plain, from 0, and each step takes its images from `batches`.
        """
        settings, weights = self.settings, self.weights()
        _, channels, height, width = self.images.shape
        if settings.inner_lr:
            shape = (1, channels, height, width)
            delta = torch.zeros(shape, device=self.images.device) if start is None else start
            for _, (x, y) in zip(range(steps), batches, strict=False):
                x, y = self._ready(x, y)
                delta = delta.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(self._objective(delta, weights, x, y), delta)
                delta = project_l2(delta.detach() + settings.inner_lr * gradient, settings.radius)
        else:

            def low_precision(delta: Tensor) -> Tensor:
                with autocast(self.images.device, settings.precision):
                    return self.objective(delta, weights)

            steps = steps or settings.inner_steps
            if self.area is None:
                if start is None:
                    start = torch.randn(1, channels, height, width, generator=generator)
                    start *= 0.01 * settings.radius / start.norm()
                start = start.to(self.images.device)
                delta = maximise(low_precision, start, radius=settings.radius, steps=steps)
            else:
                if start is None:  # a faint mask, on average as large as it may be, over noise
                    start = torch.rand(1, 1 + channels, height, width, generator=generator)
                    start[:, :1] *= 2 * self.area / (height * width)
                start = start.to(self.images.device)
                delta = maximise_replacing(low_precision, start, area=self.area, steps=steps)
        delta = delta.detach().requires_grad_()
        loss = self.objective(delta, weights)
        (gradient,) = torch.autograd.grad(loss, delta)
        delta = delta.detach()
        moved = self.project(delta + settings.phi_step * gradient)
        stationarity = ((moved - delta).norm() / delta.norm().clamp_min(1e-12)).item()
        return Perturbation(delta, loss.item(), stationarity)

    def _objective(self, delta: Tensor, params: Sequence[Tensor], images: Tensor, labels: Tensor) -> Tensor:
        named = dict(zip(self.names, params, strict=True))
        if self.aim is not None:
            return -inner_objective(self.model, named, delta, images, torch.full_like(labels, self.aim))
        value = inner_objective(self.model, named, delta, images, labels)
        return value - self.settings.penalty * delta.square().sum() if self.settings.penalty else value

    def _ready(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images as floats, with the labels the inner objective takes."""
        images = _arranged(to_float(images), self.model)
        if self.settings.own_labels:
            with torch.no_grad():
                labels = self.model(images.clone()).argmax(1)
        return images, labels


def outer_step(
    inner: InnerProblem, delta: Tensor, images: Tensor, labels: Tensor, optimizer, generator: torch.Generator
) -> Hypergradient:
    """One Adam step along the hypergradient of the batch's cross-entropy; a share of it carries delta.

    labels  (N,) int64, or probabilities (N, classes)
    """
    settings = inner.settings
    images = _arranged(to_float(images), inner.model)
    count = max(1, round(_share(settings, delta, images) * len(images)))
    chosen = torch.randperm(len(images), generator=generator)[:count].to(images.device)
    carries = torch.zeros(len(images), 1, 1, 1, device=images.device).index_fill_(0, chosen, 1)
    precision = "float32" if settings.K else settings.precision

    def outer(delta: Tensor, params: Sequence[Tensor]) -> Tensor:
        named = dict(zip(inner.names, params, strict=True))
        with autocast(images.device, precision):
            return inner_objective(inner.model, named, delta, images, labels, carries)

    gradient = hypergradient_of(outer, inner, delta)
    if not (math.isfinite(gradient.loss) and math.isfinite(gradient.ratio)):
        raise UnlearningError(
            f"the outer loss became {gradient.loss} and |implicit| / |direct| {gradient.ratio}"
        )
    for weight, step in zip(inner.model.parameters(), gradient.total, strict=True):
        weight.grad = step
    optimizer.step()
    return gradient


def _share(settings: IBAUSettings, delta: Tensor, images: Tensor) -> float:
    """The share of a batch that carries this delta."""
    return settings.share if delta.shape[1] == images.shape[1] else settings.replacing_share


def hypergradient_of(outer, inner: InnerProblem, delta: Tensor) -> Hypergradient:
    """d psi / d theta at delta, as the settings' `hypergradient` says.

    fixed_point  the Neumann series of Phi, kept to its best partial sum
    cg           conjugate gradients on the optimality conditions of the ball
    unrolled     differentiates through K more steps of Phi
    neumann      the first K terms of the series, whatever they come to: the authors'

    Gradients are float32's. Where `precision` allows, the series' products with second derivatives at that
    float32 point, and the implicit term itself, multiply in bfloat16.
    """
    settings, weights = inner.settings, inner.weights()
    if settings.hypergradient == "unrolled" and settings.K:
        return unrolled_hypergradient(outer, inner.phi, delta, weights, steps=settings.K)
    how = {"maxiter": settings.K, "tol": settings.tol}
    if settings.hypergradient == "cg":
        return kkt_hypergradient(outer, inner.objective, delta, weights, radius=settings.radius, **how)
    solve = neumann if settings.hypergradient == "neumann" else fixed_point
    low = settings.precision == "auto" and native_bfloat16(delta.device) or settings.precision == "bfloat16"
    how["products"] = reduced() if low else None
    return implicit_hypergradient(outer, inner.phi, delta, weights, solve=solve, **how)


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to an eighth of its side along either axis; what comes in mirrors the edge."""
    n, _, height, width = images.shape
    high, wide = height // 8, width // 8
    padded = F.pad(images, (wide, wide, high, high), mode="reflect")
    rows = torch.randint(0, 2 * high + 1, (n, 1), generator=generator) + torch.arange(height)
    columns = torch.randint(0, 2 * wide + 1, (n, 1), generator=generator) + torch.arange(width)
    index, rows, columns = (t.to(images.device) for t in (torch.arange(n)[:, None, None], rows, columns))
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _hold_out(images: Tensor, labels: Tensor, settings: IBAUSettings, generator: torch.Generator):
    """The images to learn from, and those to watch (none where the share comes to less than one)."""
    count = min(500, int(settings.held_out * len(images)))
    if count == 0:
        return (images, labels), (images[:0], labels[:0])
    order = torch.randperm(len(images), generator=generator).to(images.device)
    used, watched = order[count:], order[:count]
    return (images[used], labels[used]), (images[watched], labels[watched])


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of right answers; nan without images, which no comparison finds too low."""
    if len(images) == 0:
        return math.nan
    right = [
        (model(to_float(x).clone()).argmax(1) == y).sum().item()
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    ]
    return sum(right) / len(images)


def _badly_lost(before: float, after: float, n: int) -> bool:
    """Whether accuracy on n images fell by more than LOST, and further than chance among so few explains."""
    return before - after > LOST and after < Rate.of(torch.arange(n) < round(before * n)).low


def _warn_if_lost(before: float, after: float, n: int) -> None:
    if before - after > LOST:
        warnings.warn(
            f"accuracy on the {n} held-out clean images fell from {before:.1%} to {after:.1%}; "
            "a lower rate, a smaller radius, or more clean images keep more of it",
            UnlearningWarning,
            stacklevel=3,
        )


def _first_lowest(values: list[float]) -> int:
    return values.index(min(values)) if values else -1


def _arranged(images: Tensor, model: nn.Module) -> Tensor:
    """The images in the memory format of the model's convolutions."""
    kernels = [p for p in model.parameters() if p.dim() == 4 and not p.is_contiguous()]
    last = any(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    return images.contiguous(memory_format=torch.channels_last) if last else images


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
