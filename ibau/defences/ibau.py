"""I-BAU among the other defences: the method itself is in `ibau.unlearning`."""

from torch import nn

from ibau.cleaning.recipe import IBAUSettings, unlearn
from ibau.data.images import ImageSet
from ibau.defences.base import Defended


def ibau(
    model: nn.Module,
    data: ImageSet,
    *,
    settings: IBAUSettings,
    seed: int = 0,
    progress: bool = False,
    on_round=None,
) -> Defended:
    """`unlearn` with the clean images; tensors: "delta 1" to "delta <rounds>". `on_round` is as there."""
    found = unlearn(model, data.images, data.labels, settings, seed, progress=progress, on_round=on_round)
    evidence = {"rounds": len(found.history), "stopped": found.stopped}
    deltas = {f"delta {i}": delta for i, delta in enumerate(found.deltas, start=1)}
    return Defended(found.model, found.history, evidence, deltas)
