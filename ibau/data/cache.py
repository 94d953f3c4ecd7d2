"""What a data set's function gives (`Source`), and the cache of decoded images, checked by stamp."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ibau.data.files import whole_file
from ibau.data.images import ImageSet


# The data sets: functions (root, image_size, download) -> Source. Each finds and checks the files, which is
# quick, and leaves the decoding for when the cache has nothing with this stamp.
class Whole(NamedTuple):
    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    tracks: Tensor | None = None  # int64, the track of each training image, where images come in tracks


class Source(NamedTuple):
    stamp: str  # differs whenever the decoded images could differ
    decode: Callable[[], Whole]


# The cache: one safetensors file per name, folder and image size. Metadata: stamp, class names, fingerprint.
def cache_dir() -> Path:
    """$IBAU_CACHE, or ~/.cache/ibau."""
    return Path(os.environ.get("IBAU_CACHE") or "~/.cache/ibau").expanduser().resolve()


def cached(name: str, root: Path, image_size: int, source: Source) -> tuple[Whole, str]:
    """The decoded data set and its fingerprint: from the cache if that is sound and fresh, else decoded."""
    place = hashlib.sha256(str(root).encode()).hexdigest()[:8]
    path = cache_dir() / f"{name}-{image_size}px-{place}.safetensors"
    found = _read_cache(path, source.stamp)
    if found is None:
        whole = source.decode()
        found = whole, _fingerprint(whole)
        _write_cache(path, source.stamp, *found)
    return found


def _fingerprint(whole: Whole) -> str:
    digest = hashlib.sha256(json.dumps(whole.classes).encode())
    for part in (whole.train, whole.test):
        digest.update(repr(tuple(part.images.shape)).encode())
        digest.update(part.images.contiguous().numpy().data)
        digest.update(part.labels.contiguous().numpy().data)
    return digest.hexdigest()[:16]


def _read_cache(path: Path, stamp: str) -> tuple[Whole, str] | None:
    """None if there is no such file, or it is stale, cut short or altered. The images are memory-mapped."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("stamp") != stamp:
                return None
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no __iter__)
        train, test = (ImageSet(tensors[f"{k}_images"], tensors[f"{k}_labels"]) for k in ("train", "test"))
        whole = Whole(train, test, tuple(json.loads(metadata["classes"])), tensors.get("train_tracks"))
        # 0.1 s for CIFAR-10, so the sum is taken afresh and guards the pixels too
        sound = _fingerprint(whole) == metadata["fingerprint"]
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return (whole, metadata["fingerprint"]) if sound else None


def _write_cache(path: Path, stamp: str, whole: Whole, fingerprint: str) -> None:
    """Written beside and then renamed: readers see the old file or the new one. To fail is only a warning."""
    tensors = {
        "train_images": whole.train.images,
        "train_labels": whole.train.labels,
        "test_images": whole.test.images,
        "test_labels": whole.test.labels,
    }
    if whole.tracks is not None:
        tensors["train_tracks"] = whole.tracks
    metadata = {"stamp": stamp, "classes": json.dumps(whole.classes), "fingerprint": fingerprint}
    try:
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata)
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"cannot keep decoded images in {path} ({error}); they will be decoded again next time. "
            "Set IBAU_CACHE to a folder with space",
            stacklevel=4,  # the call of load
        )
