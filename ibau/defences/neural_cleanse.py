"""Neural Cleanse (Wang et al., IEEE S&P 2019): a backdoor is a shortcut, so its class has a small trigger.

    for each class t:   min over m, Delta   CE(f((1 - m) x + m Delta), t) + lambda |m|_1

A class whose |m|_1 is an outlier on the small side is taken for the attacker's target, and the model
is fine-tuned to give images that carry the class's trigger their true label.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from ibau.datasets import ImageSet
from ibau.defences.protocol import Defended
from ibau.defences.reverse import Classify, ReverseSettings, cleanse, fooled


@dataclass(frozen=True)
class NeuralCleanseSettings(ReverseSettings):
    """The authors' settings of the search (their code, read at its source); see ReverseSettings."""

    @classmethod
    def quick(cls, **other) -> "NeuralCleanseSettings":
        """A budget of half a minute for ten classes on one core."""
        return cls(**{"steps": 150, "batches": 1, "batch_size": 16, "patch_epochs": 5, **other})


def objective(
    classify: Classify, x: Tensor, y: Tensor, m: Tensor, delta: Tensor, t: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Eq. (3) of the paper, a class: CE(f((1 - m) x + m Delta), t) + lambda |m|_1; and the ASR."""
    loss, asr = fooled(classify, x, m, delta, t)
    return loss + weight * m.sum((1, 2, 3)), asr


def neural_cleanse(
    model: nn.Module,
    clean: ImageSet,
    *,
    settings: NeuralCleanseSettings = NeuralCleanseSettings(),
    seed: int = 0,
    progress: bool = False,
) -> Defended:
    """Reverse a trigger for every class, flag the classes with an outlying |m|_1, patch their triggers away.

    model  any classifier of images in [0, 1]; it is left as it was
    clean  images it was not trained on, (N, 3, H, W) uint8 or in [0, 1], with their true labels

    What it returns is said in `reverse.cleanse`. Where no class is flagged, `settings.unflagged` says
    what to do. Raises ValueError for a clean set too small to hold images out of.
    """
    label = "Neural Cleanse" if progress else None
    return cleanse(
        model, clean, settings, objective, lambda *found: found[2].norms, seed=seed, progress=label
    )
