"""GTSRB, the German traffic signs: frames cut to their signs, in tracks of one physical sign."""

import csv
import re
from functools import partial
from pathlib import Path

from torchvision.datasets import utils

from ibau.data.cache import Source
from ibau.data.cifar10 import fetch
from ibau.data.folders import Item, is_image, missing, source_of
from ibau.data.images import DataError, some

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


def gtsrb(root: Path, image_size: int, download: bool) -> Source:
    """GTSRB as published: 39,209 training and 12,630 test frames, each cut to the sign's box and made square.

    root holds GTSRB/, or is that folder, or holds gtsrb/GTSRB/ (as torchvision has it). GT-final_test.csv,
    which has its own archive, lies next to GTSRB/, in it, or with the test images.
    """
    try:
        return _gtsrb_frames(root, image_size)
    except DataError:
        if not download:
            raise
    for archive, md5 in GTSRB_ARCHIVES.items():  # one that is already there is unpacked, not fetched
        url = GTSRB_URL + archive
        fetch(partial(utils.download_and_extract_archive, url, root, md5=md5), root, url)
    return _gtsrb_frames(root, image_size)


def _gtsrb_frames(root: Path, image_size: int) -> Source:
    places = (root / "GTSRB", root, root / "gtsrb" / "GTSRB")
    base = next((place for place in places if (place / "Final_Training" / "Images").is_dir()), None)
    if base is None:
        files = "GTSRB/Final_Training/Images/000CC/*.ppm, GTSRB/Final_Test/Images/*.ppm and GT-final_test.csv"
        source = f"from {', '.join(GTSRB_ARCHIVES)} at {GTSRB_URL} (GTSRB/Training is another, smaller set)"
        raise missing("gtsrb", root, f"{files}, {source}")
    train_images, test_images = base / "Final_Training" / "Images", base / "Final_Test" / "Images"
    tables = [folder / "GT-final_test.csv" for folder in (base.parent, base, test_images.parent, test_images)]
    table = next((path for path in tables if path.is_file()), None)
    if not test_images.is_dir():
        raise missing("gtsrb", root, f"{test_images} (from GTSRB_Final_Test_Images.zip)")
    if table is None:
        raise missing("gtsrb", root, f"{tables[0]} (from GTSRB_Final_Test_GT.zip)")

    train = []
    for label in range(len(GTSRB_SIGNS)):
        folder = train_images / f"{label:05d}"
        items = _annotated(folder / f"GT-{folder.name}.csv", folder, range(label, label + 1))
        train += [item._replace(track=_track(item)) for item in items]
    test = _annotated(table, test_images, range(len(GTSRB_SIGNS)))
    classes = tuple(f"{i:02d} {sign}" for i, sign in enumerate(GTSRB_SIGNS))
    return source_of(train, test, classes, image_size)


def _track(item: Item) -> int:
    """A number for the track a training frame belongs to, from its name, TTTTT_FFFFF."""
    name = Path(item.path).stem
    if not re.fullmatch(r"\d{5}_\d{5}", name):
        raise DataError(f"{item.path}: a training frame is named by track and frame, as 00007_00012.ppm")
    return 100_000 * item.label + int(name[:5])


def _annotated(table: Path, folder: Path, labels: range) -> list[Item]:
    """The images of a GTSRB folder with class, one of `labels`, and Roi box, from its annotations."""
    lines = table.read_text().splitlines() if table.is_file() else []
    rows = list(csv.DictReader(lines, delimiter=";", skipinitialspace=True))
    if not rows:
        raise DataError(f"annotations {table} are missing or empty; unpack {folder.parent}'s archive again")
    files = {path.name for path in folder.iterdir() if is_image(path)}
    items, lost = [], []
    for line, row in enumerate(rows, start=2):
        try:
            name, label, box = row["Filename"], int(row["ClassId"]), _box(row)
            if label not in labels:
                raise ValueError(f"ClassId {label} is of another class")
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            wanted = f"Filename, ClassId {labels[0]} to {labels[-1]} and a Roi inside Width x Height"
            raise DataError(f"{table}, line {line}: needs {wanted}, got {row}") from error
        if name in files:
            files.remove(name)
            items.append(Item(str(folder / name), label, box))
        else:
            lost.append(name)
    if lost:
        raise DataError(
            f"{table}: {len(lost)} of {len(rows)} rows have no image of their own in {folder} "
            f"({some(lost)}); unpack its archive again"
        )
    if files:
        raise DataError(f"{folder}: {len(files)} images have no row in {table} ({some(sorted(files))})")
    return items


def _box(row: dict[str, str]) -> tuple[float, ...]:
    """The Roi as fractions of the annotated Width and Height: a file may have been saved at another size."""
    width, height = int(row["Width"]), int(row["Height"])
    sides = {"X1": width, "Y1": height, "X2": width, "Y2": height}
    box = tuple(int(row[f"Roi.{corner}"]) / side for corner, side in sides.items())
    if not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise ValueError(f"Roi box {box} is empty or outside the image")
    return box
