"""ACC, ASR, RA and DER: how good a classifier is, and how much of a backdoor is left in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from ibau.attacks import Trigger, target_labels
from ibau.models import device_of, takes_channels_last
from ibau.training import to_float


@dataclass(frozen=True)
class Rate:
    """A share `value` of `n` images, with its 95% Wilson interval [low, high]."""

    value: float
    n: int
    low: float
    high: float

    @classmethod
    def of(cls, hits: Tensor) -> "Rate":
        """The share of true entries. Raises ValueError when there is nothing to count."""
        n = hits.numel()
        if n == 0:
            raise ValueError("a rate over no images at all: every image was excluded")
        return cls._wilson(hits.float().mean().item(), n)

    @classmethod
    def pooled(cls, rates: Sequence["Rate"]) -> "Rate":
        """One rate over all that these were counted on."""
        n = sum(rate.n for rate in rates)
        return cls._wilson(sum(rate.value * rate.n for rate in rates) / n, n)

    @classmethod
    def _wilson(cls, p: float, n: int) -> "Rate":
        z = 1.959964
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        # At p = 0 or 1 the interval touches p; rounding must not push it past.
        return cls(p, n, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}] (n = {self.n})"


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, batch_size: int = 500) -> Tensor:
    """Predicted classes `(N,)`, on the CPU, for images `(N, 3, H, W)`, uint8 or in [0, 1]; in eval mode."""
    modes = [(module, module.training) for module in model.modules()]  # a part may be frozen in eval mode
    model.eval()
    device = device_of(model)
    layout = torch.contiguous_format
    if len(images) and takes_channels_last(model, images[:2].to(device)):
        layout = torch.channels_last
    parts = [
        model(to_float(x.to(device)).contiguous(memory_format=layout)).argmax(1).cpu()
        for x in images.split(batch_size)
    ]
    for module, training in modes:
        module.training = training
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


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


def attack_success_rate(
    model: nn.Module, images: Tensor, labels: Tensor, trigger: Trigger, target: int | str, num_classes: int
) -> Rate:
    """The ASR of `attack_rates`."""
    return attack_rates(model, images, labels, trigger, target, num_classes)[0]


def robust_accuracy(
    model: nn.Module, images: Tensor, labels: Tensor, trigger: Trigger, target: int | str, num_classes: int
) -> Rate:
    """The RA of `attack_rates`."""
    return attack_rates(model, images, labels, trigger, target, num_classes)[1]


def defence_effectiveness_rating(
    acc_before: Rate, acc_after: Rate, asr_before: Rate, asr_after: Rate
) -> Rate:
    """DER = (max(0, drop of ASR) - max(0, drop of ACC) + 1) / 2 (Zhu et al. 2023, FT-SAM), in [0, 1].

    Half means nothing was won. The interval adds the four binomial variances, as if they were independent and
    no `max` clipped, and is cut to [0, 1].
    """
    rates = (acc_before, acc_after, asr_before, asr_after)
    value = (max(0, asr_before.value - asr_after.value) - max(0, acc_before.value - acc_after.value) + 1) / 2
    half = 1.959964 / 2 * sqrt(sum(r.value * (1 - r.value) / r.n for r in rates))
    return Rate(value, min(r.n for r in rates), max(0.0, value - half), min(1.0, value + half))
