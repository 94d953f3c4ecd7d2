"""CIFAR-10, from its batches, its archive or class folders; and `fetch`, the download that GTSRB shares."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, extract_archive

from ibau.data.cache import Source, Whole
from ibau.data.folders import DOWNLOAD, class_folders, missing, resized, source_of, stamp, state_of
from ibau.data.images import DataError, some

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar10(root: Path, image_size: int, download: bool) -> Source:
    """CIFAR-10: cifar-10-batches-py/, or cifar-10-python.tar.gz, or train/<class>/ and test/<class>/."""
    batches, archive = root / "cifar-10-batches-py", root / "cifar-10-python.tar.gz"
    if download and not batches.is_dir() and not (root / "train").is_dir():
        fetch(partial(CIFAR10, root, download=True), root, CIFAR10.url)
    if batches.is_dir():
        states = [state_of(path) for path in sorted(batches.iterdir())]
        return Source(stamp(states), lambda: _cifar10_batches(root, image_size))
    if archive.is_file():
        return Source(stamp(state_of(archive)), lambda: _cifar10_archive(archive, image_size))
    if not (root / "train").is_dir():
        layouts = f"{batches.name}/, {archive.name}, or the folders train/<class>/ and test/<class>/"
        raise missing("cifar10", root, layouts)
    train, test, classes = class_folders(root)
    if classes != CIFAR10_CLASSES:
        raise DataError(
            f"{root / 'train'}: its class folders are not CIFAR-10's ({', '.join(CIFAR10_CLASSES)}) but "
            f"{some(classes)}; for other images choose the data set 'folder'"
        )
    return source_of(train, test, classes, image_size)


def _cifar10_batches(root: Path, image_size: int) -> Whole:
    try:  # the batches are pickles: torchvision opens them only after their MD5 sums have matched
        train, test = CIFAR10(root, train=True), CIFAR10(root, train=False)
    except RuntimeError as error:
        batches = root / "cifar-10-batches-py"
        raise DataError(f"{batches} is incomplete or damaged; delete it and {DOWNLOAD}") from error
    images = (resized(part.data, part.targets, image_size) for part in (train, test))
    return Whole(*images, CIFAR10_CLASSES)


def _cifar10_archive(archive: Path, image_size: int) -> Whole:
    if not check_integrity(archive, CIFAR10.tgz_md5):
        wanted = f"its MD5 sum is not {CIFAR10.tgz_md5}"
        raise DataError(f"{archive} is incomplete or damaged ({wanted}); delete it and {DOWNLOAD}")
    with tempfile.TemporaryDirectory() as folder:  # data_dir may be read-only
        extract_archive(str(archive), folder)
        return _cifar10_batches(Path(folder), image_size)


def fetch(download: Callable[[], object], root: Path, url: str) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        download()
    except (OSError, RuntimeError) as error:  # no network, no space, or a wrong checksum
        raise DataError(f"download failed ({error}); fetch {url} by hand and unpack it in {root}") from error
