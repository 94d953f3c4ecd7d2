"""I-BAU, its authors' recipe and I-BAU+ as defences; they are in `ibau.unlearning` and `ibau.cleaning`."""

from collections.abc import Callable

from torch import nn

from ibau.cleaning.recipe import clean
from ibau.data.images import ImageSet
from ibau.defences.base import Defended
from ibau.networks.training import Watch
from ibau.unlearning.authors import authors
from ibau.unlearning.common import Unlearned
from ibau.unlearning.ibau import unlearn


def _defence(algorithm: Callable[..., Unlearned]) -> Callable[..., Defended]:
    """The algorithm with a defence's arguments and result; tensors: "delta 1" to "delta <rounds>"."""

    def defend(
        model: nn.Module,
        data: ImageSet,
        *,
        settings,
        seed: int = 0,
        progress: bool = False,
        watch: Watch | None = None,
    ) -> Defended:
        on_round = (lambda model, history: watch(model)) if watch else None
        clean_set = data.images, data.labels
        found = algorithm(model, *clean_set, settings, seed, progress=progress, on_round=on_round)
        deltas = {f"delta {i}": delta for i, delta in enumerate(found.deltas, start=1)}
        return Defended(found.model, found.history, {"rounds": len(found.deltas)}, deltas)

    return defend


ibau, ibau_authors, ibau_plus = _defence(unlearn), _defence(authors), _defence(clean)
