"""TABOR (Guo et al. 2019, arXiv 1908.01763): Neural Cleanse with the triggers it should not find ruled out.

    min over m, Delta   CE(f((1 - m) x + m Delta), t) + R1 + R2 + R3 + R4

    R1  not large:        the elastic nets |m|_1 + |m|_2^2 and |(1 - m) Delta|_1 + |(1 - m) Delta|_2^2
    R2  not scattered:    the squared differences of neighbouring pixels of m and of (1 - m) Delta
    R3  not blocking:     CE(f((1 - m) x), y), the image without what the mask covers is still itself
    R4  not overlaying:   CE(f(m Delta), t), the trigger alone is of class t as well

A class's trigger is then scored by its size, its smoothness, and its success on images, alone, and cut down
to the pixels that explain it; the outlier test is on the score.

How sure this is: the four terms and their six first weights were read in two public ports (UsmannK/TABOR,
TrojanZoo), which agree. That the weights adapt, and the form of the score, are recalled from the paper and
were not read there: here R1 and R2 follow Neural Cleanse's schedule, R3 and R4 keep their weight, the parts
of the score weigh the same, and a pixel explains as much as the gradient of the class's logit says.
TABOR only detects; a flagged trigger is patched away as in Neural Cleanse.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibau.checks import not_negative
from ibau.data.images import ImageSet
from ibau.defences.base import Defended
from ibau.defences.inversion import Classify, ReverseSettings, Triggers, cleanse, fooled, stamp, success_rates
from ibau.networks.training import Watch, to_float

EXPLAINED = 0.5  # share of a mask, the pixels that explain most, that the last part of the score keeps


@dataclass(frozen=True)
class TaborSettings(ReverseSettings):
    """TABOR's six weights and, for the rest, the search and the patching of Neural Cleanse.

    R1 and R2 are multiplied by the scheduled weight, which begins at 1 instead of Neural Cleanse's 1e-3.
    """

    weight: float = 1.0
    r1_mask: float = 1e-6  # the elastic net of m
    r1_pattern: float = 1e-5  # and of (1 - m) Delta
    r2_mask: float = 1e-7  # the roughness of m
    r2_pattern: float = 1e-8  # and of (1 - m) Delta
    r3: float = 0.0  # blocking; 0 in the ports, which saves a pass over the images
    r4: float = 1e-2  # overlaying

    def __post_init__(self):
        super().__post_init__()
        not_negative(self, "r1_mask", "r1_pattern", "r2_mask", "r2_pattern", "r3", "r4")

    @classmethod
    def quick(cls, **other) -> "TaborSettings":
        """Half a minute for ten classes on one core.

        The mask weighs what it does in Neural Cleanse from the start, and the pattern a tenth of it: ten
        times as much, as in the ports, holds masks up for longer than this budget lasts.
        """
        return super().quick(**{"weight": 1e3, "r1_pattern": 1e-7, **other})


def elastic_net(v: Tensor) -> Tensor:
    """|v|_1 + |v|_2^2 of each (c, channels, H, W) -> (c,)"""
    return (v.abs() + v.square()).sum((1, 2, 3))


def roughness(v: Tensor) -> Tensor:
    """The sum of squared differences between neighbouring pixels of each (c, channels, H, W) -> (c,)"""
    return v.diff(dim=2).square().sum((1, 2, 3)) + v.diff(dim=3).square().sum((1, 2, 3))


def blocking(classify: Classify, x: Tensor, y: Tensor, m: Tensor) -> Tensor:
    """R3: mean CE(f((1 - m) x), y) under each of c masks -> (c,)"""
    logits = classify(stamp(x, m, torch.zeros_like(x[:1])).flatten(0, 1))
    return F.cross_entropy(logits, y.repeat(len(m)), reduction="none").view(len(m), len(x)).mean(1)


def overlaying(classify: Classify, m: Tensor, delta: Tensor, t: Tensor) -> Tensor:
    """R4: CE(f(m Delta), t) of each of c triggers -> (c,)"""
    return F.cross_entropy(classify(m * delta), t, reduction="none")


def objective_of(s: TaborSettings):
    """The objective with these weights."""

    def objective(
        classify: Classify, x: Tensor, y: Tensor, m: Tensor, delta: Tensor, t: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        loss, asr = fooled(classify, stamp(x, m, delta), t)
        rest = (1 - m) * delta
        r1 = s.r1_mask * elastic_net(m) + s.r1_pattern * elastic_net(rest)
        r2 = s.r2_mask * roughness(m) + s.r2_pattern * roughness(rest)
        r3 = s.r3 * blocking(classify, x, y, m) if s.r3 else 0.0
        r4 = s.r4 * overlaying(classify, m, delta, t) if s.r4 else 0.0
        return loss.mean(1) + weight * (r1 + r2) + r3 + r4, asr

    return objective


def score(classify: Classify, held_out: ImageSet, triggers: Triggers, asr: list[float]) -> Tensor:
    """How much each trigger looks like a backdoor's, (c,); the smaller, the more.

    log(|m|_1 / d^2) + log(roughness(m) / (d (d - 1))) - log ASR - log ASR alone - log ASR explained, d being
    the image's side; a rate counts as half an image where it is zero. m stands where the paper has m Delta:
    a black trigger on black images would measure nothing.
    """
    masks = triggers.masks
    d, least = masks.shape[-1], 0.5 / len(held_out)
    sizes = torch.log(triggers.norms / d**2) + torch.log(roughness(masks) / (d * (d - 1)))
    blank = ImageSet(torch.zeros_like(held_out.images[:1]), torch.full_like(held_out.labels[:1], -1))
    alone = success_rates(classify, blank, triggers)
    important = triggers._replace(masks=explanation(classify, held_out, triggers))
    for rates in (asr, alone, success_rates(classify, held_out, important)):
        sizes = sizes - torch.tensor(rates).clamp_min(least).log()
    return sizes


def explanation(classify: Classify, data: ImageSet, triggers: Triggers) -> Tensor:
    """The masks cut down to the pixels that explain most, EXPLAINED of their |m|_1: (c, 1, H, W).

    A pixel explains |gradient of the class's logit times what the trigger changes|, the mean over images.
    """
    x = to_float(data.images[:100])
    kept = []
    for t, m, delta in zip(triggers.classes, triggers.masks.to(x), triggers.patterns.to(x), strict=True):
        stamped = stamp(x, m[None], delta[None])[0].requires_grad_()
        (gradient,) = torch.autograd.grad(classify(stamped)[:, t].sum(), stamped)
        explains = (gradient * (stamped.detach() - x)).sum(1).abs().mean(0).flatten()
        order = explains.argsort(descending=True)
        weight = m.flatten()[order]
        within = weight.cumsum(0) <= EXPLAINED * weight.sum()
        cut = torch.zeros_like(weight)
        cut[order] = weight * within
        kept.append(cut.view_as(m).cpu())
    return torch.stack(kept)


def tabor(
    model: nn.Module,
    clean: ImageSet,
    *,
    settings: TaborSettings,
    seed: int = 0,
    progress: bool = False,
    watch: Watch | None = None,
) -> Defended:
    """Patch away the triggers of classes with an outlying score: see `inversion.cleanse`."""
    return cleanse("TABOR", objective_of(settings), score, model, clean, settings, seed, progress, watch)
