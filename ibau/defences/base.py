"""What every defence is given and what it gives back."""

import copy
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ibau.data.images import ImageSet
from ibau.networks.models import device_of
from ibau.networks.seeding import seeded
from ibau.networks.training import Watch, to_float

STATM = Path("/proc/self/statm")  # Linux: sizes of this process in pages, the second is the resident one


@dataclass(frozen=True, eq=False)
class Defended:
    """The defended model, and what the defence found on its way there.

    model     a new model; the one that was given is as it was
    history   one dict a step the defence reports: epoch, round, class, ...
    evidence  what its decision rests on: plain numbers, strings, lists and dicts of them
    tensors   the pictures behind the evidence, such as reversed triggers
    seconds, peak_memory_mb  what it took; filled in by `Defence`
    """

    model: nn.Module
    history: list[dict] = field(default_factory=list)
    evidence: dict = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory_mb: float | None = None


@dataclass(frozen=True)
class Defence:
    """A defence by its label, the function that runs it, its settings class, and what it may see.

    sees     "clean": a small clean set; "nothing": no data at all; "poisoned": the attacker's training set,
             from which it trains anew
    version  raised when the defence computes something else with the same settings; part of a record's key
    """

    label: str
    function: Callable[..., Defended]
    settings: type
    sees: str = "clean"
    version: int = 1

    def __call__(
        self,
        model: nn.Module,
        data: ImageSet | None,
        *,
        settings=None,
        seed: int = 0,
        progress: bool = False,
        watch: Watch | None = None,
    ) -> Defended:
        """Defend a copy of `model` with `data`, the set this defence `sees` (None where it sees nothing).

        `watch` is called with the model as it is, in eval mode, about LOOKS times along the run.
        Random numbers come from `seed` alone, and the caller's generators are left as they were. Raises
        ValueError for data this defence may not see or cannot do without, labels the model has no class for,
        and settings of another defence.
        """
        if (data is None) != (self.sees == "nothing"):
            raise ValueError(f"{self.label} sees {self.sees}; it was given {_what(data)}")
        settings = settings or self.settings()
        if not isinstance(settings, self.settings):
            wanted = self.settings.__name__
            raise ValueError(f"{self.label} takes settings of type {wanted}, not {type(settings).__name__}")
        started = time.perf_counter()
        with seeded(seed), torch.enable_grad(), PeakMemory() as peak:
            model = copy.deepcopy(model).eval().requires_grad_()
            if data is not None:
                check_labels(model, data)
            found = self.function(model, data, settings=settings, seed=seed, progress=progress, watch=watch)
        seconds = time.perf_counter() - started
        return Defended(found.model, found.history, found.evidence, found.tensors, seconds, peak.mb)


def _what(data: ImageSet | None) -> str:
    return "no data" if data is None else f"{len(data)} images"


@torch.no_grad()
def check_labels(model: nn.Module, data: ImageSet) -> None:
    """Raise ValueError for labels that `model`, in eval mode, has no class for."""
    classes = model(to_float(data.images[:1]).to(device_of(model), copy=True)).shape[1]
    low, high = int(data.labels.min()), int(data.labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"labels go from {low} to {high}; the model has {classes} classes")


def hold_out(data: ImageSet, share: float, seed: int, *, most: int = 500) -> tuple[ImageSet, ImageSet]:
    """Split a clean set at random: images to learn from, and `share` of them (at most `most`) to watch.

    Raises ValueError where either part would be empty.
    """
    count = min(most, int(share * len(data)))
    if not 0 < count < len(data):
        raise ValueError(f"a share of {share} of {len(data)} clean images cannot be held out")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return data.take(order[count:]), data.take(order[:count])


class PeakMemory:
    """A context that measures the largest this process becomes within it: `mb`, None where unknown.

    Device memory on a GPU; on Linux the resident memory, looked at a hundred times a second.
    """

    mb: float | None = None

    def __enter__(self):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif STATM.exists():
            self._look()
            self._done = threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error):
        if torch.cuda.is_available():
            self.mb = torch.cuda.max_memory_allocated() / 2**20
        elif STATM.exists():
            self._done.set()
            self._thread.join()
            self._look()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self._look()

    def _look(self) -> None:
        pages = int(STATM.read_text().split()[1])
        self.mb = max(self.mb or 0.0, pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
