"""Neural Cleanse (Wang et al., IEEE S&P 2019): a backdoor is a shortcut, so its class has a small trigger.

    for each class t:   min over m, Delta   CE(f((1 - m) x + m Delta), t) + lambda |m|_1

A class whose |m|_1 is an outlier on the small side is taken for the attacker's target, and the model
is fine-tuned to give images that carry the class's trigger their true label.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from ibau.data.images import ImageSet
from ibau.defences.base import Defended
from ibau.defences.inversion import Classify, ReverseSettings, Triggers, cleanse, fooled


@dataclass(frozen=True)
class NeuralCleanseSettings(ReverseSettings):
    """The authors' settings of the search (their code, read at its source); see ReverseSettings."""

    @classmethod
    def quick(cls, **other) -> "NeuralCleanseSettings":
        """A budget of half a minute for ten classes on one core."""
        return cls(**{"steps": 150, "batches": 1, "batch_size": 16, "patch_epochs": 5, **other})

    @classmethod
    def desk(cls, **other) -> "NeuralCleanseSettings":
        """Minutes on a CPU for ten or 43 classes: 300 of the 1,000 steps, of 8 images each and not of 992."""
        return cls(**{"steps": 300, "batches": 1, "batch_size": 8, **other})


def objective(
    classify: Classify, x: Tensor, y: Tensor, m: Tensor, delta: Tensor, t: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Eq. (3) of the paper, a class: CE(f((1 - m) x + m Delta), t) + lambda |m|_1; and the ASR."""
    loss, asr = fooled(classify, x, m, delta, t)
    return loss + weight * m.sum((1, 2, 3)), asr


def sizes(classify: Classify, held_out: ImageSet, triggers: Triggers, asr: list[float]) -> Tensor:
    """|m|_1 of each trigger, (c,): what the outlier test is on"""
    return triggers.norms


def neural_cleanse(
    model: nn.Module,
    clean: ImageSet,
    *,
    settings: NeuralCleanseSettings = NeuralCleanseSettings(),
    seed: int = 0,
    progress: bool = False,
) -> Defended:
    """Patch away the triggers of classes with an outlying |m|_1: see `reverse.cleanse`."""
    return cleanse("Neural Cleanse", objective, sizes, model, clean, settings, seed, progress)
