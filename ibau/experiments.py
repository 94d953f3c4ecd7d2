"""Settings -> record: train a victim, defend it, measure both, and keep what was found.

A victim (a poisoned or clean model with its trigger) is trained once and kept under `runs/models`, keyed by
a hash of everything that made it; the records of defences go to `runs/records` in the same way. Both are
written atomically, so an interrupted run loses nothing that was finished.
"""

import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import ibau
from ibau import metrics, models, unlearning
from ibau.attacks import ATTACKS, Trigger, make_trigger, needs_model, poison
from ibau.datasets import Splits
from ibau.training import TrainSettings, train

FORMAT = 1  # raise when records or victims of older code should not be taken for new ones


@dataclass(frozen=True)
class VictimSettings:
    """Everything that makes a victim model. `attack` "none" trains on clean data."""

    dataset: str = "mnist5k"
    attack: str = "badnets"
    target: int | str = 8  # the I-BAU authors' target class for BadNets; or "all-to-all"
    poison_ratio: float = 0.2  # share of the whole training set, the paper's
    architecture: str = "small_vgg"
    width: float = 1.0
    train_size: int | None = None  # None: the whole training set
    training: TrainSettings = TrainSettings()
    seed: int = 0

    def __post_init__(self):
        if self.attack not in ("none", *ATTACKS):
            raise ValueError(f"unknown attack {self.attack!r}; valid: none, {', '.join(ATTACKS)}")
        if self.architecture not in models.MODELS:
            raise ValueError(f"unknown architecture {self.architecture!r}; valid: {', '.join(models.MODELS)}")


@dataclass(frozen=True)
class Profile:
    """How much to compute: see the table in README.md."""

    dataset: str
    clean_size: int | None  # None: the data set's default, see datasets.CLEAN_SIZE
    width: float
    training: TrainSettings


PROFILES = {
    "quick": Profile("mnist5k", 500, 0.5, TrainSettings(epochs=10)),
    "desk": Profile("cifar10", 5000, 1.0, TrainSettings(epochs=10)),
    "paper": Profile("cifar10", 5000, 1.0, TrainSettings(epochs=50)),
}


def profile(name: str, dataset: str = "") -> Profile:
    """The named profile, on another data set if `dataset` names one. Raises ValueError for an unknown one."""
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}; valid: {', '.join(PROFILES)}")
    chosen = PROFILES[name]
    if dataset and dataset != chosen.dataset:
        # The profile's effort stays; how many clean images there are to have is the data set's matter.
        chosen = replace(chosen, dataset=dataset, clean_size=None)
    return chosen


@dataclass(frozen=True, eq=False)
class Victim:
    """A trained model, the trigger it obeys (None for a clean model), and the record of its making."""

    model: nn.Module
    trigger: Trigger | None
    record: dict


def runs_dir() -> Path:
    """Where runs leave their files: `$IBAU_RUNS`, or `runs/` in the checkout, whatever folder we are in."""
    if os.environ.get("IBAU_RUNS"):
        return Path(os.environ["IBAU_RUNS"]).resolve()
    checkout = Path(ibau.__file__).resolve().parent.parent
    return (checkout if (checkout / "notebooks").is_dir() else Path.cwd()) / "runs"


def key(settings: dict) -> str:
    """16 hex digits that name these settings."""
    text = json.dumps({"format": FORMAT, **settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def default_device() -> torch.device:
    """The first CUDA device, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def victim(settings: VictimSettings, splits: Splits, *, progress: bool = False) -> Victim:
    """The model these settings describe, trained now or read from an earlier run.

    `splits` must be the data set that the settings name, with its whole training set or the first
    `train_size` images of it. An interrupted training goes on where it stopped.
    """
    described = {**asdict(settings), "data": splits.fingerprint, "train_images": len(splits.train)}
    folder = runs_dir() / "models"
    stem = f"{settings.dataset}-{settings.attack}-{key(described)}"
    weights, trigger_file, note = (folder / f"{stem}{end}" for end in (".safetensors", ".trigger", ".json"))
    model = models.build(settings.architecture, len(splits.classes), settings.width, settings.seed)
    device = default_device()
    if note.exists():  # written last, so the other two are whole
        trigger = Trigger.load(trigger_file) if settings.attack != "none" else None
        return Victim(models.load(weights, model).to(device), trigger, json.loads(note.read_text()))

    started = time.perf_counter()
    data, trigger = splits.train, None
    if settings.attack != "none":
        trigger = _trigger(settings, splits, progress=progress)
        data = poison(
            data,
            trigger,
            ratio=settings.poison_ratio,
            target=settings.target,
            num_classes=len(splits.classes),
            seed=settings.seed,
        ).data
        folder.mkdir(parents=True, exist_ok=True)
        trigger.save(trigger_file)
    trigger_seconds = time.perf_counter() - started
    history = train(
        model.to(device),
        data,
        settings.training,
        seed=settings.seed,
        checkpoint=folder / f"{stem}.checkpoint",
        progress=f"training ({settings.dataset}, {settings.attack})" if progress else None,
    )
    models.save(model, weights, described)
    record = {
        "settings": described,
        "measured": measure(model, splits, trigger, settings.target),
        "trigger_seconds": trigger_seconds,
        "training_seconds": sum(epoch["seconds"] for epoch in history),
        "training": history,
        "provenance": provenance(),
    }
    write_json(note, record)
    return Victim(model, trigger, record)


def _trigger(settings: VictimSettings, splits: Splits, *, progress: bool) -> Trigger:
    """The trigger these settings ask for; one that is optimised gets the clean model trained the same way."""
    clean_model = None
    if needs_model(settings.attack):
        clean_model = victim(replace(settings, attack="none", target=0), splits, progress=progress).model
    return make_trigger(
        settings.attack,
        splits.train.images.shape[-1],
        model=clean_model,
        images=splits.train.images,
        labels=splits.train.labels,
        target=settings.target,
        seed=settings.seed,
    )


def measure(model: nn.Module, splits: Splits, trigger: Trigger | None, target: int | str) -> dict:
    """ACC, ASR and RA on the test images, as plain dicts; ASR and RA are None without a trigger."""
    images, labels, n = splits.test.images, splits.test.labels, len(splits.classes)
    rates = {"acc": metrics.accuracy(model, images, labels), "asr": None, "ra": None}
    if trigger is not None:
        rates["asr"] = metrics.attack_success_rate(model, images, labels, trigger, target, n)
        rates["ra"] = metrics.robust_accuracy(model, images, labels, trigger, target, n)
    return {name: rate and asdict(rate) for name, rate in rates.items()}


def unlearn_record(
    settings: VictimSettings,
    splits: Splits,
    ibau_settings: unlearning.IBAUSettings,
    *,
    seed: int = 0,
    progress: bool = False,
) -> dict:
    """Clean the victim of `settings` with I-BAU; record ACC, ASR, RA and DER, before and after.

    Everything is measured on `splits.test`, which the defence never sees; the curve over the rounds on its
    first 1,000 images. The cleaned model and each round's delta are kept beside the record, as
    `<record>.safetensors` and `<record>.deltas`. A record that exists already is read instead.
    """
    described = {
        "victim": {**asdict(settings), "data": splits.fingerprint, "train_images": len(splits.train)},
        "defence": "ibau",
        "defence_settings": asdict(ibau_settings),
        "clean_images": len(splits.clean),
        "seed": seed,
    }
    path = kept({"settings": described}, ".json")
    if path.exists():  # written last, so what lies beside it is whole
        return json.loads(path.read_text())
    attacked = victim(settings, splits, progress=progress)
    before = attacked.record["measured"]
    few = replace(splits, test=splits.test.take(torch.arange(min(1000, len(splits.test)))))
    curve = [{"round": 0, **measure(attacked.model, few, attacked.trigger, settings.target)}]

    def watch(model: nn.Module, history: list[dict]) -> None:
        measured = measure(model, few, attacked.trigger, settings.target)
        curve.append({"round": history[-1]["round"], **measured})

    images, labels = splits.clean.images, splits.clean.labels
    result = unlearning.unlearn(
        attacked.model, images, labels, ibau_settings, seed, progress=progress, on_round=watch
    )
    after = measure(result.model, splits, attacked.trigger, settings.target)
    record = {
        "settings": described,
        "before": before,
        "after": {**after, "der": rating(before, after)},
        "seconds": sum(round_["seconds"] for round_ in result.history),
        "training_seconds": attacked.record["training_seconds"],
        "peak_memory_mb": peak_memory_mb(),
        "history": result.history,
        "curve": curve,
        "provenance": provenance(),
        "victim_provenance": attacked.record["provenance"],
    }
    models.save(result.model, path.with_suffix(".safetensors"), described)
    save_file({"deltas": result.deltas}, path.with_suffix(".deltas"))
    write_json(path, record)
    return record


def kept(record: dict, suffix: str) -> Path:
    """The file kept beside a record: ".safetensors", the cleaned model, or ".deltas"."""
    about = record["settings"]
    stem = f"{about['victim']['dataset']}-{about['victim']['attack']}-{about['defence']}-{key(about)}"
    return runs_dir() / "records" / f"{stem}{suffix}"


def recorded(folder: Path | None = None) -> list[dict]:
    """The records in `figures/data`, which the tables in README.md and the notebooks are drawn from."""
    paths = sorted((folder or figures_dir() / "data").glob("*-ibau-*.json"))
    return [json.loads(path.read_text()) for path in paths]


def publish(record: dict) -> Path:
    """Write a record to `figures/data`, under the name of its settings."""
    return write_json(figures_dir() / "data" / kept(record, ".json").name, record)


def figures_dir() -> Path:
    """`figures/` of the checkout."""
    return Path(ibau.__file__).resolve().parent.parent / "figures"


def rating(before: dict, after: dict) -> dict | None:
    """DER of two measurements that `measure` made; None without a trigger."""
    if before["asr"] is None:
        return None
    rates = [metrics.Rate(**m[name]) for name in ("acc", "asr") for m in (before, after)]
    return asdict(metrics.defence_effectiveness_rating(*rates))


def write_headline(profile_name: str, records: list[dict]) -> Path:
    """Write the means over `records` to `runs/<profile>/headline.json`, which `ibau reproduce` prints."""
    mean = {
        f"{name}_{when}": sum(r[when][name]["value"] for r in records) / len(records)
        for name in ("acc", "asr")
        for when in ("before", "after")
    }
    about = records[0]["settings"]["victim"]
    head = {"dataset": about["dataset"], "attack": about["attack"], "n_seeds": len(records), **mean}
    return write_json(runs_dir() / profile_name / "headline.json", head)


def write_json(path: Path, content: dict) -> Path:
    """Write `content` so that the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def peak_memory_mb() -> float:
    """The largest this process has been: device memory on a GPU, resident memory on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


@cache
def provenance() -> dict:
    """What computed a record: device, versions, commit and day."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ibau": ibau.__version__,
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if (info.exists())
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The checkout's commit, with a + where the package differs from it; "unknown" outside a checkout."""
    root = Path(ibau.__file__).resolve().parent.parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "ibau") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
