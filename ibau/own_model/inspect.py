"""How small a perturbation, the same for all images, moves them to one class: for each class, and compared.

A backdoor is a short cut to its target class, so the target tends to be reached with far less than the other
classes (Wang et al., S&P 2019, with a mask; here any change of the pixels counts, measured in l2).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibau.checks import positive, within
from ibau.hypergradient.implicit import project_l2
from ibau.measure.intervals import Rate
from ibau.networks.models import device_of
from ibau.networks.predict import predict
from ibau.networks.training import autocast, to_float

SUSPICIOUS = 3.5  # an index above it: the usual cut for modified z-scores (Iglewicz and Hoaglin 1993)
SPREAD = 0.25  # the least spread of log norms, so that a suspicious class is easier by at least a factor 2.4
ROOM = 1.4  # the radius of I-BAU+'s additive perturbation over the median class's norm, see `radius_from`


@dataclass(frozen=True)
class SearchSettings:
    """How to look for the smallest perturbations."""

    steps: int = 40  # of the descent
    images: int = 32  # clean images it is done on, the same for each class
    goal: float = 0.9  # share of the images of other classes that must move
    start: float = 0.25  # first radius, l2, for 32x32 RGB; see `radius_for`
    grow: float = 1.15  # factor on a class's radius after a step, until one has reached the goal
    shrink: float = 0.92  # factor after a step that has
    regrow: float = 1.03  # factor after one that has not, where an earlier one had
    batch: int = 512  # images that are computed at once
    precision: str = "auto"  # bfloat16 where the device multiplies it natively

    def __post_init__(self):
        positive(self, "steps", "images", "start", "batch")
        within(self, "(0, 1]", "goal")
        within(self, "(0, 1)", "shrink")
        within(self, "(1, inf)", "grow", "regrow")


@dataclass(frozen=True, eq=False)
class Perturbations:
    """For each class the smallest perturbation that was found to move the images of all others to it.

    deltas   (classes, 3, H, W)
    norms    (classes,) their l2 norms
    reached  (classes,) bool; where false the norm is the largest radius tried, and delta did not suffice
    """

    deltas: Tensor
    norms: Tensor
    reached: Tensor


def radius_for(images: Tensor, radius: float) -> float:
    """An l2 radius for 32x32 RGB images, scaled to `images` `(N, 3, H, W)`: the same change of a pixel."""
    return radius * (images.shape[-2] * images.shape[-1] / 1024) ** 0.5


def smallest_perturbations(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    settings: SearchSettings = SearchSettings(),
    seed: int = 0,
) -> Perturbations:
    """The smallest delta_t for each class t with argmax f(x + delta_t) = t on most images of other classes.

    images `(N, 3, H, W)`, uint8 or in [0, 1]; labels `(N,)`. All classes descend at once, each inside a ball
    of its own, which grows until its delta reaches the goal, then shrinks and grows around that. Images stay
    in [0, 1]; the gradient passes through that cut. An upper bound: a longer search may find a smaller one.
    """
    random = torch.Generator().manual_seed(seed)
    chosen = _balanced(labels, settings.images, random)
    x, y = to_float(images[chosen]), labels[chosen]
    parts = torch.arange(num_classes).split(max(1, settings.batch // len(chosen)))
    model = model.eval()
    found = [_search(model, x, y, part, settings, random) for part in parts]
    return Perturbations(*(torch.cat(same) for same in zip(*found, strict=True)))


def _search(model, x: Tensor, y: Tensor, targets: Tensor, settings: SearchSettings, random):
    """Deltas, norms and whether the goal was reached, for some of the classes."""
    device = device_of(model)
    x, y, targets = x.to(device), y.to(device), targets.to(device)
    counts = y != targets[:, None]  # (T, B): the images that have to move
    wanted = targets[:, None].expand_as(counts)
    others = counts.sum(1).clamp_min(1)
    radius = torch.full((len(targets),), radius_for(x, settings.start), device=device)
    delta = torch.randn((len(targets), *x.shape[1:]), generator=random).to(device)
    delta = 0.01 * radius.view(-1, 1, 1, 1) * _unit(delta)
    direction = torch.zeros_like(delta)
    best, norms = delta.clone(), torch.full_like(radius, torch.inf)
    for _ in range(settings.steps):
        delta.requires_grad_()
        seen = (x + delta[:, None]).flatten(0, 1)  # (T B, 3, H, W)
        seen = seen + (seen.clamp(0, 1) - seen).detach()
        with autocast(device, settings.precision):
            logits = model(seen).float()
        losses = F.cross_entropy(logits, wanted.flatten(), reduction="none").view_as(counts)
        (gradient,) = torch.autograd.grad((losses * counts).sum(), delta)
        delta = delta.detach()
        moved = ((logits.argmax(1).view_as(counts) == wanted) & counts).sum(1) / others
        length = delta.flatten(1).norm(dim=1)
        reached = moved >= settings.goal
        better = reached & (length < norms)
        best[better], norms[better] = delta[better], length[better]
        best[norms.isinf()] = delta[norms.isinf()]
        # a step of 0.3 radii crosses the ball within a few; half of the last direction damps its swings
        direction = _unit(0.5 * direction + _unit(gradient))
        delta = delta - 0.3 * radius.view(-1, 1, 1, 1) * direction
        tried = radius
        factor = torch.where(norms.isfinite(), settings.regrow, settings.grow)
        radius = torch.where(reached, torch.minimum(radius, length) * settings.shrink, radius * factor)
        delta = torch.stack([project_l2(d, r) for d, r in zip(delta, radius.tolist(), strict=True)])
    return best.cpu(), torch.where(norms.isinf(), tried, norms).cpu(), norms.isfinite().cpu()


def radius_from(norms: Tensor, most: float) -> float:
    """C, the l2 radius of I-BAU+'s additive perturbation, for a model whose classes take `norms` to reach.

    1.4 times their median, at most `most`: room enough for any class, a trigger's among them. In a ball many
    times that size every direction fools the model, and the worst of them says nothing of a backdoor. 1.4 is
    what the default radius of 10 comes to on the clean model of MNIST-5k, which needs 7.
    """
    return min(most, ROOM * norms.quantile(0.5).item())


def _unit(deltas: Tensor) -> Tensor:
    return deltas / deltas.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)


def _balanced(labels: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Indices of `count` images, as many of each class as can be, in a random order."""
    order = torch.randperm(len(labels), generator=random)
    turn = torch.empty(len(labels), dtype=torch.int64)  # an image's place among those of its class
    for label in labels.unique():
        members = order[labels[order] == label]
        turn[members] = torch.arange(len(members))
    return order[turn[order].argsort(stable=True)][:count]


def easiness(norms: Tensor) -> Tensor:
    """For each class how far below the others its log norm lies, in robust standard deviations of theirs.

    log(median of the others / norm) / max(1.4826 MAD of their log norms, SPREAD). Logarithms because norms
    are ratios; the others only, so that with few classes an outlier does not hide in its own spread; a least
    spread, so that classes that happen to be alike do not make a small difference look large.
    """
    if len(norms) < 3:
        return torch.zeros(len(norms))
    logs, found = norms.log(), []
    for i in range(len(logs)):
        others = _without(logs, i)
        middle = others.quantile(0.5)
        spread = 1.4826 * (others - middle).abs().quantile(0.5)
        found.append((middle - logs[i]) / spread.clamp_min(SPREAD))
    return torch.stack(found)


def _without(values: Tensor, i: int) -> Tensor:
    return torch.cat([values[:i], values[i + 1 :]])


def moved_share(model: nn.Module, images: Tensor, labels: Tensor, delta: Tensor, target: int) -> Rate:
    """The share of images of other classes that the model takes for `target` once delta is added."""
    return Rate.of(predict(model, (to_float(images[labels != target]) + delta).clamp(0, 1)) == target)


def likely_target(predicted: Tensor, labels: Tensor) -> int:
    """The most common wrong answer. Raises ValueError where every answer is right."""
    wrong = predicted[predicted != labels]
    if len(wrong) == 0:
        raise ValueError("every triggered image is classified as its true class: there is no target to infer")
    return int(wrong.bincount().argmax())


@dataclass(frozen=True, eq=False)
class Findings:
    """What is known of a model.

    acc    on held-out images
    norms  (classes,) of the smallest perturbations
    asr    where there are triggered images
    """

    acc: Rate
    norms: Tensor
    asr: Rate | None = None

    @property
    def easy(self) -> list[int]:
        """The classes whose `easiness` is suspicious."""
        return (easiness(self.norms) > SUSPICIOUS).nonzero().squeeze(1).tolist()

    def as_record(self) -> dict:
        """Plain values, for a JSON file."""
        return {
            "acc": self.acc.as_dict(),
            "asr": self.asr.as_dict() if self.asr else None,
            "norms": self.norms.tolist(),
            "index": easiness(self.norms).tolist(),
            "suspicious": self.easy,
        }


def in_words(before: Findings, after: Findings, classes: tuple[str, ...]) -> list[str]:
    """What the evidence supports, sentence by sentence in Markdown, and what it cannot."""
    change = 100 * (after.acc.value - before.acc.value)
    where = "within" if before.acc.low <= after.acc.value <= before.acc.high else "outside"
    return [
        *_about_classes(before, after, classes),
        f"**Accuracy on held-out images: {before.acc} before, {after.acc} after**: {change:+.1f} points, "
        f"{where} the first one's 95% interval.",
        *_about_attack(before.asr, after.asr),
        "Either model may hold backdoors that none of this finds. The figures hold for images like the clean "
        "ones; they say nothing of other images.",
    ]


def _about_classes(before: Findings, after: Findings, classes: tuple[str, ...]) -> list[str]:
    def others(norms: Tensor, i: int) -> str:
        return f"{_without(norms, i).quantile(0.5):.2f}"

    said = [
        f"**{classes[i]} was suspiciously easy to reach**: with a perturbation of {before.norms[i]:.2f}, "
        f"where the other classes need {others(before.norms, i)} (median). That is what a backdoor "
        f"with this target looks like, but a class can also be easy by nature. After cleaning it takes "
        f"{after.norms[i]:.2f}, the others {others(after.norms, i)}."
        for i in before.easy
    ]
    if not said:
        index = easiness(before.norms)
        top = int(index.argmax())
        said.append(
            f"**No class stood out before cleaning.** {classes[top]} came nearest to it, with an index of "
            f"{index[top]:.1f}; above {SUSPICIOUS} would be suspicious. That does not show that the model "
            "was clean: backdoors with a large trigger or with many target classes do not stand out here."
        )
    return said + [
        f"**{classes[i]} is suspiciously easy to reach after cleaning**: {after.norms[i]:.2f}, where the "
        f"others need {others(after.norms, i)}. Treat the cleaned model with suspicion."
        for i in after.easy
    ]


def _about_attack(before: Rate | None, after: Rate | None) -> list[str]:
    if not (before and after):
        return [
            "**There is no attack success rate.** No images with a trigger were given, so nothing here "
            "measures whether a backdoor was there, or is gone."
        ]
    said = [f"**Attack success rate on the triggered images: {before} before, {after} after.**"]
    if after.low > 0.1:
        said.append("**The backdoor is still there: do not use the cleaned model.**")
    return said
