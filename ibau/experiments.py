"""Settings -> record: train a victim, defend it, measure both, and keep what was found.

A victim (a poisoned or clean model with its trigger) is trained once and kept under `runs/models`, keyed by
a hash of everything that made it; the records of defences go to `runs/records` in the same way. Both are
written atomically, so an interrupted run loses nothing that was finished, and bear a checksum, so a record
that was cut short or edited is noticed and made again. Of several processes that ask for the same one, one
makes it and the others wait (see `once`).
"""

import fcntl
import hashlib
import inspect
import json
import os
import platform
import socket
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import ibau
from ibau import defences, metrics, models, unlearning
from ibau.attacks import (
    ALL_TO_ALL,
    ATTACKS,
    Poisoned,
    Trigger,
    make_trigger,
    needs_model,
    poison,
    poison_several,
    stealth,
    strength_of,
)
from ibau.datasets import ImageSet, Splits
from ibau.defences.protocol import Defence, Defended
from ibau.files import whole_file
from ibau.training import TrainSettings, train

WATCHED = 500  # test images of a defence's curve
FORMAT = 2  # raise when records or victims of older code should not be taken for new ones


@dataclass(frozen=True)
class VictimSettings:
    """Everything that makes a victim model, but for the data set's own content and split.

    `attack` is one of ATTACKS, several of them joined by "+", each of which then has a target class of its
    own (`target`, target + 1, ... modulo the classes), or "none", which trains on clean data.
    """

    dataset: str = "mnist5k"
    attack: str = "badnets"
    target: int | str = 8  # the I-BAU authors' target class for BadNets; or "all-to-all"
    poison_ratio: float = 0.2  # share of the whole training set, the paper's; several triggers divide it
    strength: float | None = None  # of a single attack, see attacks.STRENGTHS; None: the attack's default
    architecture: str = "small_vgg"
    width: float = 1.0
    train_size: int | None = None  # None: the whole training set
    training: TrainSettings = TrainSettings()
    seed: int = 0

    def __post_init__(self):
        unknown = [name for name in self.attacks if name not in ATTACKS]
        if unknown:
            valid = f"none, {', '.join(ATTACKS)}, or several of these joined by +"
            raise ValueError(f"unknown attack {unknown[0]!r}; valid: {valid}")
        if self.strength is not None and len(self.attacks) != 1:
            raise ValueError(f"strength is of one attack; {self.attack!r} takes None")
        if len(self.attacks) > 1 and self.target == ALL_TO_ALL:
            raise ValueError(f"several attacks have a target class each; {ALL_TO_ALL!r} takes one attack")
        if self.architecture not in models.MODELS:
            raise ValueError(f"unknown architecture {self.architecture!r}; valid: {', '.join(models.MODELS)}")
        if not self.attacks:  # nothing is poisoned, so all ratios share one model
            object.__setattr__(self, "poison_ratio", VictimSettings.poison_ratio)

    @property
    def attacks(self) -> tuple[str, ...]:
        """The names of the attacks; none for a clean model."""
        return () if self.attack == "none" else tuple(self.attack.split("+"))

    def targets(self, num_classes: int) -> tuple[int | str, ...]:
        """The target of each of the attacks."""
        if len(self.attacks) < 2:
            return (self.target,) * len(self.attacks)
        return tuple((self.target + i) % num_classes for i in range(len(self.attacks)))


@dataclass(frozen=True)
class Profile:
    """How much to compute: see the table in README.md."""

    dataset: str
    clean_size: int | None  # None: the data set's default, see datasets.CLEAN_SIZE
    width: float
    training: TrainSettings


PROFILES = {
    "quick": Profile("mnist5k", 500, 0.5, TrainSettings(epochs=12, batch_size=32, lr=2e-3)),
    "desk": Profile("cifar10", 5000, 1.0, TrainSettings(epochs=5)),
    "paper": Profile("cifar10", 5000, 1.0, TrainSettings(epochs=50)),
}


# The settings every table has: label -> attack and target. The targets are the I-BAU authors' where known.
STANDARD: dict[str, tuple[str, int | str]] = {
    "BadNets": ("badnets", 8),
    "Blend": ("blend", 1),
    "Trojan square": ("trojan_square", 2),
    "Trojan watermark": ("trojan_watermark", 2),
    "l0-inv": ("l0_inv", 0),
    "l2-inv": ("l2_inv", 0),
    "Smooth": ("smooth", 6),
    "all-to-all": ("badnets", ALL_TO_ALL),
    "seven triggers": ("+".join(ATTACKS), 0),
}


def standard_victims(effort: Profile, **other) -> dict[str, VictimSettings]:
    """The clean model and the STANDARD attacks at this effort; `other` settings hold for all of them."""
    common = {"dataset": effort.dataset, "width": effort.width, "training": effort.training, **other}
    attacked = {label: VictimSettings(attack=a, target=t, **common) for label, (a, t) in STANDARD.items()}
    return {"clean": VictimSettings(attack="none", target=0, **common), **attacked}


def profile(name: str, dataset: str = "") -> Profile:
    """The named profile, on another data set if `dataset` names one. Raises ValueError for an unknown one."""
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}; valid: {', '.join(PROFILES)}")
    chosen = PROFILES[name]
    if dataset and dataset != chosen.dataset:
        # The profile's effort stays; how many clean images there are to have is the data set's matter.
        chosen = replace(chosen, dataset=dataset, clean_size=None)
    return chosen


Attacks = tuple[tuple[Trigger, int | str], ...]  # triggers and their targets


@dataclass(frozen=True, eq=False)
class Victim:
    """A trained model, the triggers it obeys with their targets, and the record of its making."""

    model: nn.Module
    attacks: Attacks  # empty for a clean model
    record: dict

    @property
    def trigger(self) -> Trigger | None:
        """The first trigger; None for a clean model."""
        return self.attacks[0][0] if self.attacks else None


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
    described = describe(settings, splits)
    note = victim_path(described)
    record = once(note, lambda: _make_victim(note, settings, described, splits, progress=progress))
    triggers = [Trigger.load(file) for file in _trigger_files(note, settings)]
    attacks = tuple(zip(triggers, settings.targets(len(splits.classes)), strict=True))
    model = models.load(note.with_suffix(".safetensors"), _untrained(settings, splits))
    return Victim(model.to(default_device()), attacks, record)


def victim_path(described: dict) -> Path:
    """Where a victim's record is kept, from what `describe` gave; its weights and triggers lie beside it."""
    return runs_dir() / "models" / f"{victim_stem(described)}.json"


def _trigger_files(note: Path, settings: VictimSettings) -> list[Path]:
    return [note.with_suffix(f".{name}.trigger") for name in settings.attacks]


def _untrained(settings: VictimSettings, splits: Splits) -> nn.Module:
    return models.build(settings.architecture, len(splits.classes), settings.width, settings.seed)


def _make_victim(
    note: Path, settings: VictimSettings, described: dict, splits: Splits, *, progress: bool
) -> dict:
    """Train the victim, keep its weights and triggers, then its record, which this returns."""
    started = time.perf_counter()
    targets = settings.targets(len(splits.classes))
    attacks = _make_attacks(settings, splits, targets, progress=progress)
    trigger_seconds = time.perf_counter() - started
    for (trigger, _), file in zip(attacks, _trigger_files(note, settings), strict=True):
        trigger.save(file)
    poisoned = poison_with(attacks, settings, splits)
    model = _untrained(settings, splits).to(default_device())
    history = train(
        model,
        poisoned.data if poisoned else splits.train,
        settings.training,
        seed=settings.seed,
        checkpoint=note.with_suffix(".checkpoint"),
        progress=f"training ({settings.dataset}, {settings.attack})" if progress else None,
    )
    models.save(model, note.with_suffix(".safetensors"), described)
    rates = _rates(model, splits, attacks)
    record = {
        "settings": described,
        "measured": _measured(model, splits, rates),
        "attacks": [_about(*attack, *rate, splits) for attack, rate in zip(attacks, rates, strict=True)],
        "trigger_seconds": trigger_seconds,
        "training_seconds": sum(epoch["seconds"] for epoch in history),
        "training": history,
        "provenance": provenance(),
    }
    return write_record(note, record)


def victim_stem(described: dict) -> str:
    """The name a victim's files share, from what `describe` gave."""
    count = described["attack"].count("+") + 1
    attack = described["attack"] if count == 1 else f"{count}-triggers"
    return f"{described['dataset']}-{attack}-{key(described)}"


def describe(settings: VictimSettings, splits: Splits) -> dict:
    """The settings with what identifies the data they were used on: what a victim's file is named by."""
    data = {"data": splits.fingerprint, "split_seed": splits.seed, "train_images": len(splits.train)}
    return {**asdict(settings), **data}


def poison_with(attacks: Attacks, settings: VictimSettings, splits: Splits) -> Poisoned | None:
    """The training set as the victim of these attacks sees it; None where there are none."""
    about = {"ratio": settings.poison_ratio, "num_classes": len(splits.classes), "seed": settings.seed}
    if len(attacks) > 1:
        triggers, targets = zip(*attacks, strict=True)
        return poison_several(splits.train, triggers, targets, **about)
    return poison(splits.train, attacks[0][0], target=attacks[0][1], **about) if attacks else None


def _make_attacks(settings: VictimSettings, splits: Splits, targets, *, progress: bool) -> Attacks:
    """The triggers these settings ask for; those that are optimised get the clean model trained alike."""
    clean_model = None
    if any(needs_model(name) for name in settings.attacks):
        clean = replace(settings, attack="none", target=0, strength=None)
        clean_model = victim(clean, splits, progress=progress).model
    triggers = [
        make_trigger(
            name,
            splits.train.images.shape[-1],
            model=clean_model,
            images=splits.train.images,
            labels=splits.train.labels,
            target=target,
            seed=settings.seed,
            **strength_of(name, settings.strength),
        )
        for name, target in zip(settings.attacks, targets, strict=True)
    ]
    return tuple(zip(triggers, targets, strict=True))


def _about(trigger: Trigger, target: int | str, asr: metrics.Rate, ra: metrics.Rate, splits: Splits) -> dict:
    """One trigger's part of a victim's record: its settings, what it does to the model, how it hides."""
    return {
        "attack": trigger.name,
        "target": target,
        "asr": asdict(asr),
        "ra": asdict(ra),
        "stealth": stealth(trigger, splits.test.images[:1000]),
        "trigger": trigger.settings,
    }


def measure(model: nn.Module, splits: Splits, attacks: Attacks) -> dict:
    """ACC, ASR and RA on the test images, as plain dicts; ASR and RA are None without an attack.

    Of several attacks, ASR and RA are over the images of all: each trigger on each image it can attack.
    """
    return _measured(model, splits, _rates(model, splits, attacks))


def _rates(model: nn.Module, splits: Splits, attacks: Attacks) -> list[tuple[metrics.Rate, metrics.Rate]]:
    """ASR and RA of each attack."""
    images, labels, n = splits.test.images, splits.test.labels, len(splits.classes)
    return [metrics.attack_rates(model, images, labels, *attack, n) for attack in attacks]


def _measured(model: nn.Module, splits: Splits, rates: list[tuple[metrics.Rate, metrics.Rate]]) -> dict:
    acc = metrics.accuracy(model, splits.test.images, splits.test.labels)
    asr, ra = (
        (asdict(metrics.Rate.pooled(same)) for same in zip(*rates, strict=True)) if rates else (None, None)
    )
    return {"acc": asdict(acc), "asr": asr, "ra": ra}


def defence_record(
    settings: VictimSettings,
    splits: Splits,
    defence: str,
    defence_settings=None,
    *,
    seed: int = 0,
    progress: bool = False,
) -> dict:
    """Defend the victim of `settings` by the named defence; record ACC, ASR, RA and DER, before and after.

    `defence` is one of `ibau.defences.DEFENCES`, `defence_settings` its settings (None: the default ones).
    Everything is measured on `splits.test`, which no defence sees. Of a defence that takes `on_round` there
    is the curve over its rounds, on the first WATCHED test images; that time does not count. The defended
    model and the tensors behind the evidence, if any, are kept beside the record, as `<record>.safetensors`
    and `<record>.tensors`. A record that exists already is read instead.

    Raises ValueError for an unknown defence, or settings of another one.
    """
    chosen = defences.defence(defence)
    chosen_settings = defence_settings or chosen.settings()
    about = describe_defence(settings, splits, defence, chosen_settings, seed=seed)

    def make() -> dict:
        attacked = victim(settings, splits, progress=progress)
        data = _seen_by(chosen, attacked, settings, splits)
        watch = _Watch(attacked, splits)
        result = chosen(
            attacked.model,
            data,
            settings=chosen_settings,
            seed=seed,
            progress=progress,
            **watch.if_taken(chosen),
        )
        return _write_defended(about, attacked, result, watch, splits)

    return once(kept({"settings": about}, ".json"), make)


def unlearn_record(
    settings: VictimSettings,
    splits: Splits,
    ibau_settings: unlearning.IBAUSettings,
    *,
    seed: int = 0,
    progress: bool = False,
) -> dict:
    """The `defence_record` of I-BAU."""
    return defence_record(settings, splits, "ibau", ibau_settings, seed=seed, progress=progress)


def describe_defence(
    settings: VictimSettings, splits: Splits, defence: str, defence_settings, *, seed: int
) -> dict:
    """Everything that makes a defence's record: what its file is named by.

    A defence that sees no clean images has one record whatever their number, so theirs is 0.
    """
    return {
        "victim": describe(settings, splits),
        "defence": defence,
        "defence_settings": asdict(defence_settings),
        "clean_images": len(splits.clean) if defences.defence(defence).sees == "clean" else 0,
        "seed": seed,
    }


def _seen_by(defence: Defence, attacked: Victim, settings: VictimSettings, splits: Splits) -> ImageSet | None:
    """The images this defence sees."""
    if defence.sees == "poisoned":
        poisoned = poison_with(attacked.attacks, settings, splits)
        return poisoned.data if poisoned else splits.train
    return splits.clean if defence.sees == "clean" else None


class _Watch:
    """Measures the model after each round of a defence, on the first WATCHED test images, and its own time.

    Several triggers share the images, so that watching does not take longer than unlearning.
    """

    def __init__(self, attacked: Victim, splits: Splits):
        self.few = _first(splits, WATCHED)
        self.triggered = _first(splits, WATCHED // max(1, len(attacked.attacks)))
        self.attacked, self.seconds = attacked, 0.0
        self.curve: list[dict] = []

    def if_taken(self, defence: Defence) -> dict:
        """The argument `on_round`, for a defence that takes one."""
        if "on_round" not in inspect.signature(defence.function).parameters:
            return {}
        self.curve = [{"round": 0, **self._measured(self.attacked.model)}]
        return {"on_round": self}

    def __call__(self, model: nn.Module, history: list[dict]) -> None:
        started = time.perf_counter()
        self.curve.append({"round": history[-1]["round"], **self._measured(model)})
        self.seconds += time.perf_counter() - started

    def _measured(self, model: nn.Module) -> dict:
        return _measured(model, self.few, _rates(model, self.triggered, self.attacked.attacks))


def _first(splits: Splits, count: int) -> Splits:
    """The same splits with the first test images alone."""
    return replace(splits, test=splits.test.take(torch.arange(min(count, len(splits.test)))))


def _write_defended(about: dict, attacked: Victim, result: Defended, watch: _Watch, splits: Splits) -> dict:
    """Measure the defended model, keep it and its tensors, then the record, which this returns."""
    before = attacked.record["measured"]
    after = measure(result.model, splits, attacked.attacks)
    record = {
        "settings": about,
        "before": before,
        "after": {**after, "der": rating(before, after)},
        "seconds": result.seconds - watch.seconds,
        "training_seconds": attacked.record["training_seconds"],
        "peak_memory_mb": result.peak_memory_mb,
        "history": result.history,
        "evidence": result.evidence,
        "curve": watch.curve,
        "provenance": provenance(),
        "victim_provenance": attacked.record["provenance"],
    }
    models.save(result.model, kept(record, ".safetensors"), about)
    if result.tensors:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in result.tensors.items()}
        with whole_file(kept(record, ".tensors")) as temporary:
            save_file(tensors, temporary)
    return write_record(kept(record, ".json"), record)


def kept(record: dict, suffix: str) -> Path:
    """The file kept beside a record: ".safetensors", the defended model, or ".tensors"."""
    about = record["settings"]
    attacked = victim_stem(about["victim"]).rsplit("-", 1)[0]
    stem = f"{attacked}-{about['defence']}-{key(about)}"
    return runs_dir() / "records" / f"{stem}{suffix}"


def recorded(folder: Path | None = None, *, defence: str = "") -> list[dict]:
    """The records in `figures/data`, which the tables in README.md and the notebooks are drawn from.

    Of one defence where it is named. Raises ValueError for a file that was cut short or edited.
    """
    found = _all_records(folder or figures_dir() / "data")
    return [record for record in found if defence in ("", record["settings"]["defence"])]


def recorded_victims(folder: Path | None = None) -> list[dict]:
    """The victims' records in `figures/data/victims`; raises as `recorded` does."""
    return _all_records(folder or figures_dir() / "data" / "victims")


def _all_records(folder: Path) -> list[dict]:
    found = {path: read_record(path) for path in sorted(folder.glob("*.json"))}
    damaged = [path.name for path, record in found.items() if record is None]
    if damaged:
        raise ValueError(f"{folder}: cut short or edited since it was written: {', '.join(damaged)}")
    return list(found.values())


def publish_victim(record: dict) -> Path:
    """Write a victim's record to `figures/data/victims`, under the name of its settings."""
    return write_json(figures_dir() / "data" / "victims" / f"{victim_stem(record['settings'])}.json", record)


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


def once(path: Path, make: Callable[[], dict]) -> dict:
    """The record at `path`; where there is none that is whole, what `make` writes there and returns.

    One process makes it while others that want it wait, on this machine and on those that share the folder.
    The lock is the kernel's (flock), on a file in `runs/locks` that also names its holder: it ends with the
    process that holds it, however that ends. Linux passes it on to an NFS server, unless the folder is
    mounted with nolock or local_lock. Where hosts cannot lock each other out, a record may be made twice, and
    the last one stays, whole.
    """
    found = read_record(path)
    if found is None:
        with _alone(path):
            found = read_record(path) or make()
    return found


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    lock = runs_dir() / "locks" / f"{path.stem}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks
            warnings.warn(f"{lock} cannot be locked ({error}); a record may be made twice", stacklevel=4)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def write_record(path: Path, record: dict) -> dict:
    """Write a record with its checksum, whole or not at all, and return it as `read_record` will."""
    content = json.loads(json.dumps(record))
    content["checksum"] = _checksum(content)
    write_json(path, content)
    return content


def read_record(path: Path) -> dict | None:
    """The record at `path`; None if there is none, or it was cut short or edited since it was written.

    One without a checksum is of before there were any, and taken as it is.
    """
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("checksum", _checksum(record)) != _checksum(record):
        return None
    return record


def _checksum(record: dict) -> str:
    content = {name: value for name, value in record.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path: Path, content: dict) -> Path:
    """Write `content` so that the file appears whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


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
