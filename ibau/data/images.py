"""Images with labels (`ImageSet`), the four parts of a data set (`Splits`), and a class-balanced order."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


class DataError(Exception):
    """The data cannot be used as asked; the message names the file, folder or value, and the remedy."""


@dataclass(frozen=True)
class ImageSet:
    """images: (N, 3, H, W), uint8 or float in [0, 1]; labels: (N,) int64. Other shapes raise ValueError."""

    images: Tensor
    labels: Tensor

    def __post_init__(self):
        if self.images.ndim != 4 or self.images.shape[1] != 3 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"images {tuple(self.images.shape)} and labels {tuple(self.labels.shape)}: "
                "expected (N, 3, H, W) and (N,)"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices) -> "ImageSet":
        """The images at `indices` (integers in the wanted order, or a boolean mask), copied."""
        index = torch.as_tensor(indices)
        index = index if index.dtype == torch.bool else index.long()  # an empty list would be float
        return ImageSet(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Splits:
    """What one experiment draws its images from.

    clean is the first `clean_size` images of the defender's half; heldout is the rest of it and may be empty.
    fingerprint: 16 hex digits of a SHA-256 over the pixels, labels and class names of the whole data set. It
    does not depend on seed, train_size or clean_size: record those next to it. seed: that of the split.
    """

    name: str
    train: ImageSet
    clean: ImageSet
    heldout: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    fingerprint: str
    seed: int = 0


def check_whole(name: str, value: int, *, least: int, most: int | None = None, what: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise DataError(f"{name} must be a whole number of at least {least}, not {value!r}")
    if most is not None and value > most:
        raise DataError(f"{name} {value} is more than the {most} {what}")


def balanced_order(labels: Tensor, seed) -> np.ndarray:
    """A random order of all indices in which every prefix holds the classes very nearly in proportion.

    Each class is shuffled and spread evenly over [0, 1) from a random offset; then all are sorted by place.
    Prefixes of one order are nested, which is what makes sets of different sizes comparable.
    """
    random, labels = np.random.default_rng(seed), labels.numpy()
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        place[members] = (np.arange(len(members)) + random.random()) / len(members)
    return np.argsort(place, kind="stable")


def some(names) -> str:
    """The first five names, and how many there are, for a message."""
    names = [str(name) for name in names]
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "") or "none"
