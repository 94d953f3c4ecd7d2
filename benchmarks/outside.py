"""`ibau clean` on torchvision's networks, poisoned by our attacks: `python -m benchmarks.outside --data DIR`.

A stranger's part comes first: eight classes of GTSRB become folders of 64x64 crops, a network is trained on
them, some poisoned, and saved by plain `torch.save(model.state_dict())`, in a process of its own. Then
`ibau clean` gets that file and a folder of clean images, as a user would call it. ACC and ASR are measured on
further images, which it never saw. Writes `figures/data/foreign/<network>-<attack>.json`, which notebook 13
shows, beside runs with the class-targeted search, `<network>-<attack>-class-targeted.json`. Folders and
networks are kept in `runs/outside`; what is there is not made again.
"""

import argparse
import csv
import json
import random
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from ibau.attacks import Trigger, make_trigger, poison
from ibau.data.folders import load_folder
from ibau.data.images import ImageSet
from ibau.measure.rates import accuracy, attack_rates
from ibau.networks.training import TrainSettings, train
from ibau.own_model.load import Normalised, build, parse_normalize
from ibau.study.records import figures_dir, provenance, runs_dir, write_json

CLASSES = {  # GTSRB's number -> the folder's name
    1: "speed 30",
    2: "speed 50",
    11: "priority crossing",
    12: "priority road",
    13: "yield",
    18: "caution",
    25: "road work",
    38: "keep right",
}
SIZE = 64  # of the crops, in pixels
TARGET = 3  # in the folders' sorted order: priority road
TRAIN, CLEAN, TEST = 400, 100, 120  # images a class, at most
NETWORKS = {  # name -> architecture as `ibau clean` takes it, epochs, rate
    "resnet18": ("torchvision:resnet18", 8, 1e-3),
    "mobilenet_v3_small": ("torchvision:mobilenet_v3_small", 20, 2e-3),
    "vit_small": (
        "torchvision.models:VisionTransformer?image_size=64&patch_size=8&num_layers=6&num_heads=4"
        "&hidden_dim=192&mlp_dim=384",
        30,
        1e-3,
    ),
    "vit_b_16": ("torchvision:vit_b_16?image_size=64", 6, 1e-4),
}
TRIGGERS = {
    "badnets": lambda: make_trigger("badnets", SIZE, size=8, margin=2),
    "blend": lambda: make_trigger("blend", SIZE, seed=0),
}
ATTACKS = ("none", *TRIGGERS)


def folders(data: Path) -> Path:
    """The images as three folders, train, clean and test; the first from GTSRB's training split."""
    out = runs_dir() / "outside" / "signs"
    if (out / "done").exists():
        return out
    rng = random.Random(0)
    frames = {"train": {}, "final": {}}
    for number in CLASSES:
        folder = data / f"GTSRB/Final_Training/Images/{number:05d}"
        frames["train"][number] = _rows(folder / f"GT-{number:05d}.csv", folder, least=44)
    rows = _rows(data / "GT-final_test.csv", data / "GTSRB/Final_Test/Images", least=36)
    for number, name in CLASSES.items():
        train_rows, final = frames["train"][number], [row for row in rows if int(row[1]["ClassId"]) == number]
        rng.shuffle(train_rows)
        rng.shuffle(final)
        for split, chosen in (
            ("train", train_rows[:TRAIN]),
            ("clean", final[:CLEAN]),
            ("test", final[CLEAN : CLEAN + TEST]),
        ):
            for file, row in chosen:
                _crop(file, row, out / split / name)
    (out / "done").touch()
    return out


def _rows(table: Path, folder: Path, least: int) -> list[tuple[Path, dict]]:
    """The frames of a table whose sign is at least so many pixels wide."""
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    return [(folder / r["Filename"], r) for r in rows if int(r["Roi.X2"]) - int(r["Roi.X1"]) >= least]


def _crop(file: Path, row: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    box = [int(row[name]) for name in ("Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2")]
    with Image.open(file) as image:
        sign = image.convert("RGB").crop(box).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    sign.save(folder / f"{file.stem}.png")


def make(network: str, attack: str) -> None:
    """Train the network on the training folder, 10% of it poisoned, and save its bare state dict."""
    architecture, epochs, lr = NETWORKS[network]
    clean = load_folder(runs_dir() / "outside/signs/train", SIZE).data
    data, stem = clean, _stem(network, attack)
    if attack != "none":
        trigger = TRIGGERS[attack]()
        trigger.save(stem.with_suffix(".trigger"))
        data = poison(clean, trigger, ratio=0.1, target=TARGET, num_classes=len(CLASSES), seed=0).data
    torch.manual_seed(0)
    core = build(architecture, len(CLASSES))
    transformer = network.startswith("vit")
    if transformer:  # torchvision's head starts at zero, from which no gradient reaches the rest
        nn.init.trunc_normal_(core.heads.head.weight, std=0.02)
    settings = TrainSettings(
        epochs=epochs,
        batch_size=64,
        lr=lr,
        augment="crop" if transformer else "none",
        precision="float32" if network.startswith("mobilenet") else "auto",  # bfloat16 is slower there
    )
    started = time.perf_counter()
    train(_normalised(core), data, settings, seed=0, progress=f"{network}, {attack}")
    about = {"training": asdict(settings), "images": len(data), "poison_ratio": 0.1 * (attack != "none")}
    torch.save(core.state_dict(), stem.with_suffix(".pth"))
    write_json(stem.with_suffix(".json"), {**about, "seconds": time.perf_counter() - started})


def measured(network: str, attack: str, checkpoint: Path, test: ImageSet) -> dict:
    """ACC and ASR, as plain dicts, of the state dict in a file."""
    core = build(NETWORKS[network][0], len(CLASSES))
    core.load_state_dict(torch.load(checkpoint, weights_only=True))
    model, asr = _normalised(core).eval(), None
    if attack != "none":
        trigger = Trigger.load(_stem(network, attack).with_suffix(".trigger"))
        rate, _ = attack_rates(model, test.images, test.labels, trigger, TARGET, len(CLASSES))
        asr = rate.as_dict()
    return {"acc": accuracy(model, test.images, test.labels).as_dict(), "asr": asr}


def clean(network: str, attack: str) -> dict:
    """`ibau clean` on the saved network, in a process of its own; returns the record."""
    stem, signs = _stem(network, attack), runs_dir() / "outside" / "signs"
    given = {
        "checkpoint": stem.with_suffix(".pth"),
        "architecture": NETWORKS[network][0],
        "clean-dir": signs / "clean",
        "normalize": "imagenet",
        "image-size": SIZE,
    }
    _call("ibau.cli", "clean", *(word for name, value in given.items() for word in (f"--{name}", value)))
    cleaned = stem.with_name(f"{stem.name}.cleaned.pth")
    page = json.loads(cleaned.with_suffix(".json").read_text())
    test = load_folder(signs / "test", SIZE).data
    return {
        "network": network,
        "architecture": NETWORKS[network][0],
        "attack": attack,
        "target": None if attack == "none" else TARGET,
        "made": json.loads(stem.with_suffix(".json").read_text()),
        **page,
        "measured": {
            "images": len(test),
            "before": measured(network, attack, stem.with_suffix(".pth"), test),
            "after": measured(network, attack, cleaned, test),
        },
        "provenance": provenance(),
    }


def _normalised(core: nn.Module) -> nn.Module:
    return Normalised(core, *parse_normalize("imagenet"))


def _stem(network: str, attack: str) -> Path:
    return runs_dir() / "outside" / f"{network}-{attack}"


def _call(module: str, *arguments) -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outside", description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="the folder of GTSRB, as for `ibau reproduce --dataset gtsrb`")
    parser.add_argument("--network", choices=NETWORKS, nargs="*", default=list(NETWORKS))
    parser.add_argument("--attack", choices=ATTACKS, nargs="*", default=list(ATTACKS))
    parser.add_argument("--train-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train_only:
        return make(args.network[0], args.attack[0])
    if not args.data:
        parser.error("name the folder of GTSRB: --data DIR")
    folders(Path(args.data).expanduser())
    for network in args.network:
        for attack in args.attack:
            record = figures_dir() / "data" / "foreign" / f"{network}-{attack}.json"
            if record.exists():
                continue
            if not _stem(network, attack).with_suffix(".json").exists():
                _call("benchmarks.outside", "--network", network, "--attack", attack, "--train-only")
            found = clean(network, attack)
            write_json(record, found)
            print(network, attack, found["measured"])


if __name__ == "__main__":
    main()
