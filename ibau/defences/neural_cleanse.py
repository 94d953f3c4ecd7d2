"""Neural Cleanse (Wang et al., IEEE S&P 2019): a backdoor is a shortcut, so its class has a small trigger.

    for each class t:   min over m, Delta   CE(f((1 - m) x + m Delta), t) + lambda |m|_1

A class whose |m|_1 is an outlier on the small side is taken for the attacker's target, and the model
is fine-tuned to give images that carry the class's trigger their true label.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from ibau.data.images import ImageSet
from ibau.defences.base import Defended
from ibau.defences.inversion import Classify, ReverseSettings, Triggers, cleanse, fooled, stamp
from ibau.networks.training import Watch


@dataclass(frozen=True)
class NeuralCleanseSettings(ReverseSettings):
    """The authors' settings of the search (their code, read at its source); see ReverseSettings."""


def objective(
    classify: Classify, x: Tensor, y: Tensor, m: Tensor, delta: Tensor, t: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Eq. (3) of the paper, a class: CE(f((1 - m) x + m Delta), t) + lambda |m|_1; and the ASR."""
    loss, asr = fooled(classify, stamp(x, m, delta), t)
    return loss.mean(1) + weight * m.sum((1, 2, 3)), asr


def neural_cleanse(
    model: nn.Module,
    clean: ImageSet,
    *,
    settings: ReverseSettings,
    seed: int = 0,
    progress: bool = False,
    watch: Watch | None = None,
) -> Defended:
    """Patch away the triggers of classes with an outlying |m|_1: see `inversion.cleanse`."""

    def norms(classify: Classify, held_out: ImageSet, triggers: Triggers, asr: list[float]) -> Tensor:
        return triggers.norms

    return cleanse("Neural Cleanse", objective, norms, model, clean, settings, seed, progress, watch)
