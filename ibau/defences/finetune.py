"""Plain fine-tuning on the clean set: what every other defence must beat."""

from dataclasses import dataclass, replace

from torch import nn

from ibau.data.images import ImageSet
from ibau.defences.base import Defended, hold_out
from ibau.networks.predict import predict
from ibau.networks.training import TrainSettings, Watch, train


@dataclass(frozen=True)
class FinetuneSettings:
    """How to fine-tune: as the victims are trained, with the epochs, batches and augmentation of NAD.

    "crop-flip" mirrors images; use "crop" where a mirrored image is of another class (digits, road signs).
    """

    training: TrainSettings = TrainSettings(epochs=20, batch_size=64, augment="crop-flip")
    held_out: float = 0.2  # share of the clean images that is only watched, 500 at most, as in I-BAU

    @classmethod
    def quick(cls) -> "FinetuneSettings":
        """A budget of seconds, for the digits of mnist5k."""
        return cls(TrainSettings(epochs=20, batch_size=32, augment="crop"))

    @classmethod
    def desk(cls) -> "FinetuneSettings":
        """A budget of minutes on a CPU: 10 of the 20 epochs."""
        return cls(TrainSettings(epochs=10, batch_size=64, augment="crop-flip"))

    @property
    def work(self) -> int:
        """What its time is proportional to."""
        return self.training.epochs

    def scaled(self, share: float) -> "FinetuneSettings":
        """The same with this share of the epochs."""
        return replace(self, training=scaled_epochs(self.training, share))


def scaled_epochs(training: TrainSettings, share: float) -> TrainSettings:
    """The same schedule with this share of its epochs, at least one."""
    return replace(training, epochs=max(1, round(share * training.epochs)))


def finetune(
    model: nn.Module,
    data: ImageSet,
    *,
    settings: FinetuneSettings,
    seed: int = 0,
    progress: bool = False,
    watch: Watch | None = None,
) -> Defended:
    """Train `model`, which is changed, on the clean images but for the held-out ones.

    history: an epoch's loss and accuracy; evidence: held-out accuracy before and after. Raises ValueError for
    images the model has no class for, or too few of them.
    """
    learnt, watched = clean_split(model, data, settings.held_out, seed)
    before = held_out_accuracy(model, watched)
    label = "fine-tuning" if progress else None
    history = train(model, learnt, settings.training, seed=seed, progress=label, watch=watch)
    evidence = {
        "held_out_images": len(watched),
        "held_out_acc_before": before,
        "held_out_acc": held_out_accuracy(model, watched),
    }
    return Defended(model, history, evidence)


def clean_split(model: nn.Module, data: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """The clean images to learn from and those to watch, see `hold_out`.

    Raises ValueError where fewer than two images are left to learn from, which BatchNorm cannot do with.
    """
    learnt, watched = hold_out(data, share, seed)
    if len(learnt) < 2:
        raise ValueError(f"{len(learnt)} of {len(data)} clean images is left to learn from; needs at least 2")
    return learnt, watched


def held_out_accuracy(model: nn.Module, watched: ImageSet) -> float:
    """The share of held-out images that are classified as their label."""
    hits = predict(model, watched.images) == watched.labels.cpu()
    return hits.sum().item() / len(hits)
