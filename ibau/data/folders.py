"""Image folders: find the files, decode them to one size, write them back; and what all data sets share."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.datasets.folder import make_dataset
from tqdm import tqdm

from ibau.data.cache import Source, Whole
from ibau.data.images import DataError, ImageSet, some

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".bmp", ".gif", ".tif", ".tiff", ".webp")
DOWNLOAD = "load with download=True (--download)"  # a remedy, for messages
DECODER = 1  # raise this when the same files come to be decoded differently: old caches are then stale


class Item(NamedTuple):
    """An image file, not read yet."""

    path: str
    label: int
    box: tuple[float, ...] | None = None  # left, upper, right, lower, as fractions of width and height
    track: int | None = None  # of GTSRB's training frames: the same for those of one physical sign


def stamp(*parts) -> str:
    """A hash of these, and of how images are decoded."""
    return hashlib.sha256(repr((DECODER, *parts)).encode()).hexdigest()


def state_of(path: str | Path) -> tuple[str, int, int]:
    """What shows that a file has changed: its path, its size in bytes, its time of modification in ns."""
    try:
        found = os.stat(path)
    except OSError as error:  # such as a link to nowhere
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    return str(path), found.st_size, found.st_mtime_ns


# Finding
def is_image(path: str | Path) -> bool:
    """Has this file the name of an image, and is it not hidden?"""
    name = os.path.basename(path)
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def labelled(root: Path, classes: tuple[str, ...] = ()) -> tuple[list[Item], tuple[str, ...]]:
    """The images in and below root/<class>/, none that is hidden, and the class names. See `load_folder`."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected class folders in it, each of one class's images")
    found = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes and len(found) < 2:
        raise DataError(f"{root}: it takes at least two class folders, found {some(found)}")
    classes = classes or tuple(found)
    strange = [name for name in found if name not in classes]
    if strange or not found:
        raise DataError(f"{root}: class folders {some(strange)}; expected some of {some(classes)}")
    try:
        files = make_dataset(root, {name: classes.index(name) for name in found}, is_valid_file=is_image)
    except FileNotFoundError as error:
        raise DataError(f"{root}: {error}Looked for {', '.join(IMAGE_SUFFIXES)}") from None
    return [Item(path, label) for path, label in files], classes


def class_folders(root: Path) -> tuple[list[Item], list[Item], tuple[str, ...]]:
    """Items of train/ and test/, and the class names: those of train's folders. See `labelled`."""
    train, classes = labelled(root / "train")
    test, _ = labelled(root / "test", classes)
    return train, test, classes


def missing(name: str, root: Path, expected: str, or_else: str = f", or {DOWNLOAD}") -> DataError:
    """The error to raise where a data set is not there."""
    remedy = f"give the folder that holds it as data_dir{or_else}"
    return DataError(f"{name}: not found in {root}; expected there: {expected}. To mend it, {remedy}")


class Folder(NamedTuple):
    """Images of one folder a class. skipped: those that do not decode, as (path, reason)."""

    data: ImageSet
    classes: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]


def load_folder(root: str | Path, image_size: int, classes: tuple[str, ...] = ()) -> Folder:
    """Read the images of root/<class>/ as uint8, (N, 3, image_size, image_size); nothing is cached.

    Class i is the i-th folder in sorted order, as in torchvision's ImageFolder, or `classes[i]` where
    `classes` names what the folders may be. Images are cut to their largest centred square and resized;
    image_size 0 keeps their size, which must then be the same for all.

    Raises DataError for a folder that is missing, has fewer than two class folders, one not in `classes` or
    one without images, and where nothing decodes.
    """
    items, classes = labelled(Path(root), classes)
    skipped, images, labels = [], [], []
    for item in items:
        try:
            images.append(read(item, image_size))
            labels.append(item.label)
        except DataError as error:
            reason = str(error.__cause__ or error).replace(repr(item.path), "it")
            skipped.append((item.path, reason.splitlines()[0] if reason else "damaged"))
    if not images:
        raise DataError(f"{root}: none of its {len(items)} images decodes ({skipped[0][0]}: {skipped[0][1]})")
    sizes = sorted({image.shape[1] for image in images})
    if len(sizes) > 1:
        raise DataError(f"{root}: images of {some(sizes)} pixels; give the model's own size as image_size")
    data = ImageSet(torch.from_numpy(np.stack(images)), torch.tensor(labels))
    return Folder(data, classes, tuple(skipped))


def save_folder(data: ImageSet, root: str | Path, classes: tuple[str, ...]) -> None:
    """Write uint8 images as root/<class>/<number>.png, which `load_folder` reads back as they were."""
    for i, (image, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
        folder = Path(root) / classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:05d}.png")


# Decoding
def source_of(train: list[Item], test: list[Item], classes: tuple[str, ...], image_size: int) -> Source:
    """The data set of these files. Where training images have tracks, so has what it decodes to."""

    def decode() -> Whole:
        tracks = [item.track for item in train]
        images = _decoded(train, image_size, "train"), _decoded(test, image_size, "test")
        return Whole(*images, classes, None if None in tracks else torch.tensor(tracks))

    return Source(stamp([(*item[1:], state_of(item.path)) for item in train + test], classes), decode)


def _decoded(items: list[Item], image_size: int, split: str) -> ImageSet:
    images = np.empty((len(items), 3, image_size, image_size), np.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL lets other threads run while it decodes
        decoded = pool.map(read, items, repeat(image_size))
        bar = tqdm(decoded, f"decoding {split} images", len(items), disable=None)  # None: only on a terminal
        for i, image in enumerate(bar):
            images[i] = image
    return ImageSet(torch.from_numpy(images), torch.tensor([item.label for item in items]))


def read(item: Item, image_size: int) -> np.ndarray:
    """(3, image_size, image_size) uint8, see `_square`. Raises DataError for a file that does not decode."""
    try:
        with Image.open(item.path) as image:
            return _square(image, image_size, item.box)
    except Exception as error:  # PIL's plug-ins raise errors of many kinds on damaged files
        raise DataError(f"cannot read image {item.path}: {error}; replace or remove it") from error


def resized(images: np.ndarray, labels, image_size: int) -> ImageSet:
    """images: (N, H, W, 3) uint8."""
    pixels = np.stack([_square(Image.fromarray(image), image_size) for image in images])
    pixels = torch.from_numpy(np.ascontiguousarray(pixels))
    return ImageSet(pixels, torch.as_tensor(labels, dtype=torch.int64))


def _square(image: Image.Image, size: int, box: tuple[float, ...] | None = None) -> np.ndarray:
    """(3, size, size) uint8 of the box, as fractions, or the largest centred square; size 0: unresized."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"mode {image.mode} has more than 8 bits a channel; convert it to 8-bit RGB")
    width, height = image.size
    if box is None:
        side = min(width, height)
        left, upper = (width - side) // 2, (height - side) // 2
        pixels = (left, upper, left + side, upper + side)
    else:
        pixels = tuple(round(edge * length) for edge, length in zip(box, (width, height) * 2, strict=True))
    # crop first: resize(box=...) would let the antialiasing filter read pixels outside the box
    square = image.convert("RGB").crop(pixels)
    if size:
        square = square.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(square).transpose(2, 0, 1)
