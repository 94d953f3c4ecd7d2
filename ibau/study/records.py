"""Records on disk: made once, written whole, checked when read; and the folders they lie in."""

import hashlib
import json
import os
import platform
import re
import subprocess
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

import ibau
from ibau.data.files import whole_file

CHECKOUT = Path(ibau.__file__).resolve().parent.parent
FORMAT = 2  # raise when records or victims of older code should not be taken for new ones


def runs_dir() -> Path:
    """Where runs leave their files: `$IBAU_RUNS`, or `runs/` in the checkout, whatever folder we are in."""
    if os.environ.get("IBAU_RUNS"):
        return Path(os.environ["IBAU_RUNS"]).resolve()
    return (CHECKOUT if (CHECKOUT / "notebooks").is_dir() else Path.cwd()) / "runs"


def key(settings: dict) -> str:
    """16 hex digits that name these settings."""
    text = json.dumps({"format": FORMAT, **settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Records:
    """The records below a folder, each under the name of its settings: the one door to them.

    folder   of the defences' records; None: `figures/data`, from which the tables and figures are drawn
    victims  of the poisoned and clean models' records; None: `victims` in that folder
    """

    def __init__(self, folder: Path | None = None, victims: Path | None = None):
        self.folder = folder or figures_dir() / "data"
        self.victims_folder = victims or self.folder / "victims"

    def defences(self, name: str = "") -> list[dict]:
        """The defences' records, or those of the defence `name`.

        Raises ValueError for a file that was cut short or edited, or has no checksum.
        """
        return [r for r in _all_records(self.folder) if name in ("", r["settings"]["defence"])]

    def victims(self) -> list[dict]:
        """The victims' records; raises as `defences` does."""
        return _all_records(self.victims_folder)

    def path(self, settings: dict, suffix: str = ".json") -> Path:
        """Where the record with these settings lies, or the weights, tensors or triggers beside it."""
        if "defence" not in settings:
            return self.victims_folder / f"{_attacked(settings)}-{key(settings)}{suffix}"
        return self.folder / f"{_attacked(settings['victim'])}-{settings['defence']}-{key(settings)}{suffix}"

    def publish(self, record: dict) -> Path:
        """Write a defence's or a victim's record into these folders."""
        path = self.path(record["settings"])
        write_record(path, record)
        return path


def runs() -> Records:
    """The records of this machine's runs, with weights, tensors and triggers beside them."""
    return Records(runs_dir() / "records", runs_dir() / "models")


def _attacked(victim: dict) -> str:
    count = victim["attack"].count("+") + 1
    return f"{victim['dataset']}-{victim['attack'] if count == 1 else f'{count}-triggers'}"


def _all_records(folder: Path) -> list[dict]:
    found = {path: read_record(path) for path in sorted(folder.glob("*.json"))}
    damaged = [path.name for path, record in found.items() if record is None]
    if damaged:
        raise ValueError(f"{folder}: cut short or edited since they were written: {', '.join(damaged)}")
    return list(found.values())


def figures_dir() -> Path:
    """`figures/` of the checkout."""
    return CHECKOUT / "figures"


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
    """The record at `path`; where there is none that is whole, what `make` returns, which is written there.

    One process makes it while others that want it wait, on this machine and on those that share the folder.
    The lock is the operating system's, on a file in `runs/locks`: it ends with the process that holds it,
    however that ends. Where a file system has no locks, a record may be made twice, and the last one stays.
    """
    found = read_record(path)
    if found is not None:
        return found
    lock = FileLock(runs_dir() / "locks" / f"{path.stem}.lock")
    Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        text = f"{lock.lock_file} cannot be locked ({error}); a record may be made twice"
        warnings.warn(text, stacklevel=2)
    try:
        return read_record(path) or write_record(path, make())
    finally:
        lock.release()


def write_record(path: Path, record: dict) -> dict:
    """Write a record with its checksum, whole or not at all, and return it as `read_record` will."""
    content = json.loads(json.dumps(record))
    content["checksum"] = _checksum(content)
    write_json(path, content)
    return content


def read_record(path: Path) -> dict | None:
    """The record at `path`; None if there is none, or it was cut short or edited since it was written."""
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    whole = isinstance(record, dict) and record.get("checksum") == _checksum(record)
    return record if whole else None


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
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ibau": ibau.__version__,
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")  # of Linux
    found = re.search(r"model name\s*:(.*)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _commit() -> str:
    """The checkout's commit, with a + where the package differs from it; "unknown" outside a checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", CHECKOUT, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "ibau") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
