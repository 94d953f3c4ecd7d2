"""Records on disk: made once, written whole, checked when read; and the folders they lie in."""

import fcntl
import hashlib
import json
import os
import platform
import socket
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch

import ibau
from ibau.data.files import whole_file

FORMAT = 2  # raise when records or victims of older code should not be taken for new ones


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


def victim_path(described: dict) -> Path:
    """Where a victim's record is kept, from what `describe` gave; its weights and triggers lie beside it."""
    return runs_dir() / "models" / f"{victim_stem(described)}.json"


def victim_stem(described: dict) -> str:
    """The name a victim's files share, from what `describe` gave."""
    count = described["attack"].count("+") + 1
    attack = described["attack"] if count == 1 else f"{count}-triggers"
    return f"{described['dataset']}-{attack}-{key(described)}"


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
