"""CIFAR-10, from its batches, its archive or class folders; and `fetch`, the download that GTSRB shares."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ibau.data.cache import Source, Whole
from ibau.data.folders import class_folders, missing, resized, source_of, stamp, state_of
from ibau.data.images import DataError, some

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar10(root: Path, image_size: int, download: bool) -> Source:
    """CIFAR-10: cifar-10-batches-py/, or cifar-10-python.tar.gz, or train/<class>/ and test/<class>/."""
    batches, archive = root / "cifar-10-batches-py", root / "cifar-10-python.tar.gz"
    if download and not batches.is_dir() and not (root / "train").is_dir():
        from torchvision.datasets import CIFAR10

        fetch(partial(CIFAR10, root, download=True), root, CIFAR10.url)
    if batches.is_dir():
        states = [state_of(path) for path in sorted(batches.iterdir())]
        return Source(stamp(states), lambda: _cifar10_batches(root, image_size))
    if archive.is_file():
        return Source(stamp(state_of(archive)), lambda: _cifar10_archive(archive, image_size))
    if not (root / "train").is_dir():
        raise missing(
            "cifar10",
            root,
            "cifar-10-batches-py/, cifar-10-python.tar.gz, or the folders train/<class>/ and test/<class>/",
        )
    train, test, classes = class_folders(root)
    if classes != CIFAR10_CLASSES:
        raise DataError(
            f"{root / 'train'}: its class folders are not CIFAR-10's ({', '.join(CIFAR10_CLASSES)}) but "
            f"{some(classes)}; for other images choose the data set 'folder'"
        )
    return source_of(train, test, classes, image_size)


def _cifar10_batches(root: Path, image_size: int) -> Whole:
    from torchvision.datasets import CIFAR10

    try:  # the batches are pickles: torchvision opens them only after their MD5 sums have matched
        train, test = CIFAR10(root, train=True), CIFAR10(root, train=False)
    except RuntimeError as error:
        raise DataError(
            f"{root / 'cifar-10-batches-py'} is incomplete or damaged; delete it and load again with "
            "download=True (--download)"
        ) from error
    return Whole(
        resized(train.data, train.targets, image_size),
        resized(test.data, test.targets, image_size),
        CIFAR10_CLASSES,
    )


def _cifar10_archive(archive: Path, image_size: int) -> Whole:
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


def fetch(download: Callable[[], object], root: Path, url: str) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        download()
    except (OSError, RuntimeError) as error:  # no network, no space, or a wrong checksum
        raise DataError(f"download failed ({error}); fetch {url} by hand and unpack it in {root}") from error
