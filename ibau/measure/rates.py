"""ACC, ASR, RA and DER: how good a classifier is, and how much of a backdoor is left in it."""

from dataclasses import dataclass
from math import sqrt

from torch import Tensor, nn

from ibau.attacks import Trigger, target_labels
from ibau.measure.intervals import Rate, Z
from ibau.networks.predict import predict


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> Rate:
    """ACC: the share of clean images that are classified as their label."""
    return Rate.of(predict(model, images) == labels)


def attack_rates(
    model: nn.Module, images: Tensor, labels: Tensor, trigger: Trigger, target: int | str, num_classes: int
) -> tuple[Rate, Rate]:
    """ASR and RA: the shares of triggered images that get the attacker's label, and their true class.

    Images that have the attacker's label anyway are left out: a perfect model counts as attacked on them.
    """
    wanted = target_labels(labels, target, num_classes)
    eligible = wanted != labels
    predicted = predict(model, trigger(images[eligible]))
    return Rate.of(predicted == wanted[eligible]), Rate.of(predicted == labels[eligible])


@dataclass(frozen=True)
class Rating:
    """DER, a number in [0, 1] with its 95% interval. It weighs four rates and is none itself."""

    value: float
    low: float
    high: float


def defence_effectiveness_rating(
    acc_before: Rate, acc_after: Rate, asr_before: Rate, asr_after: Rate
) -> Rating:
    """DER = (max(0, drop of ASR) - max(0, drop of ACC) + 1) / 2 (Zhu et al. 2023, FT-SAM), in [0, 1].

    Half means nothing was won. The interval adds the four binomial variances, as if they were independent and
    no `max` clipped, and is cut to [0, 1].
    """
    rates = (acc_before, acc_after, asr_before, asr_after)
    value = (max(0, asr_before.value - asr_after.value) - max(0, acc_before.value - acc_after.value) + 1) / 2
    half = Z / 2 * sqrt(sum(r.value * (1 - r.value) / r.n for r in rates))
    return Rating(value, max(0.0, value - half), min(1.0, value + half))
