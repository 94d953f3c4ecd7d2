"""I-BAU and I-BAU+ among the other defences: the methods are in `ibau.unlearning` and `ibau.cleaning`."""

from torch import nn

from ibau.cleaning.recipe import CleanSettings, clean
from ibau.data.images import ImageSet
from ibau.defences.base import Defended
from ibau.unlearning.common import Unlearned
from ibau.unlearning.ibau import IBAUSettings, unlearn


def ibau(
    model: nn.Module,
    data: ImageSet,
    *,
    settings: IBAUSettings,
    seed: int = 0,
    progress: bool = False,
    on_round=None,
) -> Defended:
    """`ibau.unlearn` with the clean images; tensors: "delta 1" to "delta <rounds>"."""
    return _defended(
        unlearn(model, data.images, data.labels, settings, seed, progress=progress, on_round=on_round)
    )


def ibau_plus(
    model: nn.Module,
    data: ImageSet,
    *,
    settings: CleanSettings,
    seed: int = 0,
    progress: bool = False,
    on_round=None,
) -> Defended:
    """`ibau.clean` with the clean images, as `ibau` above."""
    return _defended(
        clean(model, data.images, data.labels, settings, seed, progress=progress, on_round=on_round)
    )


def _defended(found: Unlearned) -> Defended:
    deltas = {f"delta {i}": delta for i, delta in enumerate(found.deltas, start=1)}
    return Defended(found.model, found.history, {"rounds": len(found.deltas)}, deltas)
