"""The stranger's part of `python -m benchmarks.outside`: folders of signs, a poisoned network, its state
dict."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import outside
from ibau.data.folders import load_folder

VIT = "torchvision.models:VisionTransformer?image_size=64&patch_size=32&num_layers=1"


@pytest.fixture
def frames(tmp_path):
    """GTSRB's layout with 12 large frames and a small one of each of the eight classes, in either split."""
    rng, final = np.random.default_rng(0), []
    for number in outside.CLASSES:
        rows = []
        for split in ("Final_Training", "Final_Test"):
            folder = tmp_path / f"GTSRB/{split}/Images"
            folder = folder / f"{number:05d}" if split == "Final_Training" else folder
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(13):
                name, end = f"{number:02d}_{i:03d}.ppm", 20 if i == 12 else 52
                colour = rng.integers(0, 255, 3, dtype=np.uint8)
                Image.fromarray(np.broadcast_to(colour, (60, 60, 3)).copy()).save(folder / name)
                row = {"Filename": name, "Roi.X1": 2, "Roi.Y1": 2, "Roi.X2": end, "Roi.Y2": end}
                (rows if split == "Final_Training" else final).append({**row, "ClassId": number})
        write(tmp_path / f"GTSRB/Final_Training/Images/{number:05d}/GT-{number:05d}.csv", rows)
    write(tmp_path / "GT-final_test.csv", final)
    return tmp_path


def write(path, rows):
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0], delimiter=";")
        table.writeheader()
        table.writerows(rows)


@pytest.fixture
def made(frames, tmp_path, monkeypatch):
    monkeypatch.setenv("IBAU_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(outside, "CLEAN", 8)
    monkeypatch.setitem(outside.NETWORKS, "vit_tiny", (f"{VIT}&num_heads=1&hidden_dim=8&mlp_dim=8", 1, 1e-3))
    return outside.folders(frames)


def test_the_three_folders_share_no_image_and_leave_small_signs_out(made):
    for split, count in (("train", 12), ("clean", 8), ("test", 4)):
        folders = sorted((made / split).iterdir())
        assert [folder.name for folder in folders] == sorted(outside.CLASSES.values())
        assert {len(list(folder.iterdir())) for folder in folders} == {count}
    for name in outside.CLASSES.values():
        clean, test = ({file.name for file in (made / split / name).iterdir()} for split in ("clean", "test"))
        assert not clean & test
    image = load_folder(made / "clean", outside.SIZE).data.images
    assert image.shape[1:] == (3, outside.SIZE, outside.SIZE)


def test_the_target_is_the_folder_it_is_said_to_be():
    assert sorted(outside.CLASSES.values())[outside.TARGET] == "priority road"


def test_folders_that_are_there_are_not_made_again(made, frames):
    (made / "test" / "yield" / "mine.png").touch()
    assert outside.folders(frames) == made
    assert (made / "test" / "yield" / "mine.png").exists()


@pytest.mark.parametrize("attack", outside.ATTACKS)
def test_a_network_is_saved_as_a_bare_state_dict_and_measured(made, attack):
    outside.make("vit_tiny", attack)
    stem = made.parent / f"vit_tiny-{attack}"
    state = torch.load(stem.with_suffix(".pth"), weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    about = json.loads(stem.with_suffix(".json").read_text())
    assert about["images"] == 96 and about["poison_ratio"] == (0 if attack == "none" else 0.1)
    test = load_folder(made / "test", outside.SIZE).data
    found = outside.measured("vit_tiny", attack, stem.with_suffix(".pth"), test)
    assert found["acc"]["n"] == 32
    assert found["asr"] is None if attack == "none" else found["asr"]["n"] == 28
