"""The poisoned models behind the tables, in half precision, each with its triggers: `zoo/` of the checkout.

    victim = zoo.load("cifar10-badnets")
    victim.model  # float32, in eval mode
    victim.attacks  # ((trigger, target), ...)
    victim.record  # how it was trained, and its ACC and ASR before it was rounded

A name is a data set and a label of STANDARD. `make zoo` writes the folder from `runs/models`. The weights
were trained here, from scratch; they come under the repository's licence.

`zoo/converged` has models that were trained for 50 epochs, as files of `runs/models`, in float32; copied
there they are not trained again. Those of seed 10 are development models: settings are chosen on them, and no
table shows them. `load(name, CONVERGED)` reads one.
"""

import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from ibau.attacks import Trigger
from ibau.networks import checkpoints, models
from ibau.study.experiment import Victim
from ibau.study.records import CHECKOUT, Records, read_record, runs, write_record
from ibau.study.settings import profile, standard_victims

ZOO = CHECKOUT / "zoo"
CONVERGED = ZOO / "converged"
KEPT = (("desk", "cifar10"), ("desk", "gtsrb"), ("quick", "mnist5k"))  # whose victims of seed 0 are kept
MOST = 25_000_000  # bytes, all files together


class ZooError(Exception):
    """There is no such model, or the zoo cannot be made; the message says what there is or is missing."""


def names(folder: Path = ZOO) -> list[str]:
    """What `load` can be asked for."""
    return sorted(path.stem for path in folder.glob("*.json"))


def load(name: str, folder: Path = ZOO) -> Victim:
    """The model of this name with its triggers, their targets, and its record, on the CPU.

    Raises ZooError for an unknown name, listing the valid ones.
    """
    record = read_record(folder / f"{name}.json") if name in names(folder) else None
    if record is None:
        raise ZooError(f"no model {name!r} in the zoo; there are {', '.join(names(folder)) or 'none'}")
    about, weights = record["settings"], folder / f"{name}.safetensors"
    classes = len(checkpoints.load_state(weights)["classifier.weight"])
    model = checkpoints.load(weights, models.build(about["architecture"], classes, about["width"]))
    attacks = [
        (Trigger.load(folder / f"{name}.{one['attack']}.trigger"), one["target"]) for one in record["attacks"]
    ]
    return Victim(model, tuple(attacks), record)


def standard() -> dict[str, dict]:
    """Name -> the published record of the victim that belongs in the zoo; the standard ones of seed 0."""
    published, found = Records().victims(), {}
    for effort, dataset in KEPT:
        for label, settings in standard_victims(profile(effort, dataset)).items():
            wanted = asdict(settings)
            same = [r for r in published if {name: r["settings"].get(name) for name in wanted} == wanted]
            if same:
                found[f"{dataset}-{label.lower().replace(' ', '-')}"] = same[0]
    return found


def make(folder: Path = ZOO) -> list[str]:
    """Write the zoo anew from `runs/models`; returns the names.

    Raises ZooError for a victim whose weights are not there, or do not fit half precision, and for a zoo
    that is too large; the old zoo then stays.
    """
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        for name, record in standard().items():
            _add(name, record, fresh)
        size = sum(file.stat().st_size for file in fresh.iterdir())
        if size > MOST:
            raise ZooError(f"the zoo would take {size:,} bytes; {MOST:,} at most")
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            if old.is_file():  # CONVERGED stays
                old.unlink()
        for file in fresh.iterdir():
            file.rename(folder / file.name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return names(folder)


def _add(name: str, record: dict, folder: Path) -> None:
    about = record["settings"]
    note = runs().path(about)
    if (read_record(note) or {}).get("measured") != record["measured"]:
        raise ZooError(f"{name}: the model of the published record is not in {note.parent}: {note.name}")
    state = checkpoints.load_state(note.with_suffix(".safetensors"))
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    if not all(torch.isfinite(value).all() for value in half.values()):
        raise ZooError(f"{name}: its weights do not fit half precision")
    model = models.build(about["architecture"], len(state["classifier.weight"]), about["width"]).half()
    model.load_state_dict(half)
    checkpoints.save(model, folder / f"{name}.safetensors", about)
    for one in record["attacks"]:
        trigger = note.with_suffix(f".{one['attack']}.trigger")
        shutil.copyfile(trigger, folder / f"{name}.{one['attack']}.trigger")
    write_record(folder / f"{name}.json", record)


if __name__ == "__main__":
    print(f"{len(make())} models are in {ZOO}")
