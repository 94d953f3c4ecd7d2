"""The grid behind the paper's tables: cells -> records, on one machine or many, interrupted at any time.

    cells = single_target("quick", seeds=(0, 1, 2))
    run(cells)                                # one after the other, in this process
    with Processes(4) as executor:            # or any other concurrent.futures.Executor
        run(cells, executor)
    records(cells)                            # cell -> record, None where there is none

A cell's record is made once, whoever asks for it (see `experiments.once`), so a call that was killed is just
made again. A cell that fails is written to `runs/failed` with its error, and tried again by the next call.
What a worker runs is `compute`; it needs the files of `runs_dir()` and of the data set under the same paths.
"""

import json
import os
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import lru_cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from ibau import defences
from ibau.attacks import ATTACKS
from ibau.data.images import Splits
from ibau.data.splits import CLEAN_SIZE, load
from ibau.study import experiment
from ibau.study import records as study_records
from ibau.study import settings as study_settings
from ibau.study.records import read_record, runs_dir
from ibau.study.settings import STANDARD, VictimSettings, standard_victims

NONE = "none"  # no defence: the cell's record is the victim's


class GridError(Exception):
    """The grid cannot be run as asked; the message names the value and the valid ones."""


@dataclass(frozen=True)
class Cell:
    """One record of the grid: a victim, and the defence it gets. Raises ValueError for an unknown defence."""

    victim: VictimSettings
    defence: str = NONE  # or one of DEFENCES
    settings: object = None  # of the defence; None: its defaults
    clean_size: int | None = None  # the defender's images; None: the data set's default, see CLEAN_SIZE
    seed: int = 0  # of the defence

    def __post_init__(self):
        if self.defence != NONE and self.settings is None:
            object.__setattr__(self, "settings", defences.defence(self.defence).settings())

    def __str__(self) -> str:
        about = self.victim
        words = [about.dataset, about.attack if len(about.attacks) < 2 else f"{len(about.attacks)} triggers"]
        if about.attacks:
            words.append(f"to {about.target}, {about.poison_ratio:.1%} poisoned")
        words.append("| undefended" if self.defence == NONE else f"| {self.defence}")
        if self.defence != NONE and self.clean_size:
            words.append(f"with {self.clean_size} clean images")
        return " ".join([*words, f"| seed {self.victim.seed}"])


# ---- the tables of the paper

RATIOS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)  # shares of the training set that are poisoned
SIZES = (5000, 2500, 1000, 500, 250, 100)  # clean images
THREE = (
    "BadNets",
    "Blend",
    "l2-inv",
)  # a patch, a whole picture, an optimised trigger: where all are too many
SINGLE = tuple(label for label in STANDARD if label not in ("all-to-all", "seven triggers"))
UNMIRRORED = ("mnist5k", "gtsrb")  # a mirrored digit or road sign is another one, or none


def single_target(profile: str, dataset: str = "", seeds: Sequence[int] = (0,)) -> list[Cell]:
    """C6: every defence against each of the seven attacks and, for what it costs there, on a clean model."""
    return _against(("clean", *SINGLE), profile, dataset, seeds)


def multi_target(profile: str, dataset: str = "", seeds: Sequence[int] = (0,)) -> list[Cell]:
    """C6: every defence where several classes are targets: all-to-all, and seven triggers at once."""
    return _against(("all-to-all", "seven triggers"), profile, dataset, seeds)


def poison_ratio(profile: str, dataset: str = "", seeds: Sequence[int] = (0,)) -> list[Cell]:
    """C7: every defence against three attacks, with more and less of the training set poisoned."""
    return [cell for ratio in RATIOS for cell in _against(THREE, profile, dataset, seeds, poison_ratio=ratio)]


def clean_size(profile: str, dataset: str = "", seeds: Sequence[int] = (0,)) -> list[Cell]:
    """C7, C9: every defence against three attacks, with fewer and fewer clean images.

    From as many as the profile has for this data set.
    """
    cells = _against(THREE, profile, dataset, seeds)
    chosen = study_settings.profile(profile, dataset)
    most = chosen.clean_size or CLEAN_SIZE[chosen.dataset]
    return [replace(cell, clean_size=size) for size in SIZES if size <= most for cell in cells]


TABLES = {
    "single-target": single_target,
    "multi-target": multi_target,
    "poison-ratio": poison_ratio,
    "clean-size": clean_size,
}


def choose(
    tables: Sequence[str],
    profile: str,
    dataset: str = "",
    seeds: int = 1,
    *,
    first: int = 0,
    attacks: Sequence[str] = (),
    only: Sequence[str] = (),
    ratios: Sequence[float] = (),
    sizes: Sequence[int] = (),
) -> list[Cell]:
    """The cells of these tables with `seeds` seeds from `first` on, each once; no table: of all.

    `attacks` and `only`, if any are named, leave out the cells of other attacks and other defences; "none" is
    among both. `ratios`, poisoned shares in (0, 1), and `sizes`, numbers of clean images, do the same. Raises
    GridError for a name, ratio or size that no cell of the tables has.
    """
    _check("table", tables, TABLES)
    _check("attack", attacks, (NONE, *ATTACKS))
    _check("defence", only, (NONE, *defences.DEFENCES))
    if seeds < 1:
        raise GridError(f"{seeds} seeds; there must be at least 1")
    chosen = range(first, first + seeds)
    cells = [cell for name in tables or TABLES for cell in TABLES[name](profile, dataset, chosen)]
    _check(
        "poison ratio", ratios, sorted({cell.victim.poison_ratio for cell in cells if cell.victim.attacks})
    )
    _check("clean size", sizes, sorted({cell.clean_size for cell in cells if cell.clean_size}))
    return [
        cell
        for cell in dict.fromkeys(cells)
        if (not attacks or cell.victim.attack in attacks)
        and (not only or cell.defence in only)
        and (not ratios or cell.victim.poison_ratio in ratios)
        and (not sizes or cell.clean_size in sizes)
    ]


def _check(what: str, given: Sequence, valid: Iterable) -> None:
    for one in given:
        if one not in valid:
            raise GridError(f"no {what} {one!r}; there are {', '.join(map(str, valid))}")


def _against(labels: Sequence[str], profile: str, dataset: str, seeds: Sequence[int], **other) -> list[Cell]:
    """No defence and each defence, against the standard victims of these labels."""
    chosen = study_settings.profile(profile, dataset)
    settings = {name: settings_for(name, profile, chosen.dataset) for name in defences.DEFENCES}
    return [
        Cell(standard_victims(chosen, seed=seed, **other)[label], name, about, chosen.clean_size, seed)
        for seed in seeds
        for label in labels
        for name, about in ((NONE, None), *settings.items())
    ]


def settings_for(defence: str, profile: str, dataset: str):
    """A defence's settings at a profile: those of its class's method `quick` or `desk`, else its defaults.

    They mirror no images of data sets where that makes them another class.
    """
    cls = defences.defence(defence).settings
    settings = (getattr(cls, profile, cls) if profile in ("quick", "desk") else cls)()
    return _unmirrored(settings) if dataset in UNMIRRORED else settings


def _unmirrored(settings):
    changed = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value == "crop-flip":
            changed[field.name] = "crop"
        elif is_dataclass(value):
            changed[field.name] = _unmirrored(value)
    return replace(settings, **changed)


# ---- one cell

_ONE_AT_A_TIME = threading.Lock()  # torch's random numbers are the process's, not the thread's


@lru_cache(maxsize=8)
def _load(dataset: str, data_dir: str, train_size: int | None, clean_size: int | None) -> Splits:
    return load(dataset, data_dir, train_size=train_size, clean_size=clean_size)


def _splits(cell: Cell, data_dir: str) -> Splits:
    return _load(cell.victim.dataset, data_dir, cell.victim.train_size, cell.clean_size)


def path_of(cell: Cell, data_dir: str = "") -> Path:
    """Where the cell's record is kept. Cells with the same path are the same."""
    splits = _splits(cell, data_dir)
    if cell.defence == NONE:
        return study_records.victim_path(experiment.describe(cell.victim, splits))
    about = experiment.describe_defence(cell.victim, splits, cell.defence, cell.settings, seed=cell.seed)
    return study_records.kept({"settings": about}, ".json")


def records(cells: Iterable[Cell], data_dir: str = "") -> dict[Cell, dict | None]:
    """The record of each cell; None where there is none."""
    return {cell: read_record(path_of(cell, data_dir)) for cell in cells}


def failure_of(cell: Cell, data_dir: str = "") -> dict | None:
    """What the cell's last try failed with: type, message and end of the traceback. None if it did not."""
    return (read_record(_failure_path(cell, data_dir)) or {}).get("error")


def _failure_path(cell: Cell, data_dir: str) -> Path:
    return runs_dir() / "failed" / path_of(cell, data_dir).name


def compute(cell: Cell, data_dir: str = "", runs: str = "") -> dict:
    """Make the cell's record, or write down why it failed: what a worker runs, `runs` being its IBAU_RUNS.

    Returns the record, or {"error": ...} as `failure_of` gives it. A process computes one cell at a time,
    however many threads call this.
    """
    if runs:
        os.environ["IBAU_RUNS"] = runs
    with _ONE_AT_A_TIME:
        try:
            splits = _splits(cell, data_dir)
            if cell.defence == NONE:
                record = experiment.victim(cell.victim, splits).record
            else:
                record = experiment.defence_record(
                    cell.victim, splits, cell.defence, cell.settings, seed=cell.seed
                )
            _failure_path(cell, data_dir).unlink(missing_ok=True)
            return record
        except Exception as error:
            return _failed(cell, data_dir, error)


def _failed(cell: Cell, data_dir: str, error: BaseException) -> dict:
    tail = "".join(traceback.format_exception(error))[-3000:]
    found = {"type": type(error).__name__, "message": str(error), "traceback": tail}
    about = {"cell": str(cell), "settings": asdict(cell), "error": found}
    try:
        study_records.write_record(
            _failure_path(cell, data_dir), {**about, "provenance": study_records.provenance()}
        )
    except OSError:  # the disk that the record did not fit on
        pass
    return {"error": found}


# ---- many cells


def run(
    cells: Iterable[Cell],
    executor: Executor | None = None,
    *,
    data_dir: str = "",
    workers: int = 1,
    progress: bool = False,
) -> Counter:
    """Make the records of these cells that are not there yet; those of undefended victims first.

    `executor` computes them; None: this process, one after the other. `workers`, how many at once, is for the
    estimate of what is left. Returns how many are "there" from before, "done" and "failed": see `failure_of`.
    Raises DataError where the images cannot be read.
    """
    by_path = _by_path(cells, data_dir)
    missing = _missing(by_path)
    counts = Counter(there=len(by_path) - len(missing))
    estimate = Estimate()
    left = set(missing)
    shape = "{l_bar}{bar}| {n_fmt}/{total_fmt} cells, {elapsed}{postfix}"
    with tqdm(total=len(missing), bar_format=shape, disable=not progress) as bar:
        bar.set_postfix_str(estimate.text(left, workers))
        for cell, found in _computed(missing, executor, data_dir):
            left.discard(cell)
            counts["failed" if "error" in found else "done"] += 1
            if "error" not in found:
                estimate.add(found)
            elif progress:
                error = found["error"]
                bar.write(f"failed: {cell}: {error['type']}: {error['message']}", file=sys.stderr)
            bar.set_postfix_str(estimate.text(left, workers))
            bar.update()
    return counts


def _by_path(cells: Iterable[Cell], data_dir: str) -> dict[Path, Cell]:
    """The cells, each once."""
    return {path_of(cell, data_dir): cell for cell in cells}


def _missing(by_path: dict[Path, Cell]) -> list[Cell]:
    """The cells without a record: the clean model first, then other undefended ones, which the rest need."""
    missing = [cell for path, cell in by_path.items() if read_record(path) is None]
    return sorted(missing, key=lambda cell: (cell.defence != NONE, bool(cell.victim.attacks)))


def _computed(cells: list[Cell], executor: Executor | None, data_dir: str) -> Iterator[tuple[Cell, dict]]:
    """The cells with what `compute` returned, in the order in which they come."""
    if executor is None:
        yield from ((cell, compute(cell, data_dir)) for cell in cells)
        return
    futures = {executor.submit(compute, cell, data_dir, str(runs_dir())): cell for cell in cells}
    try:
        for future in as_completed(futures):
            yield futures[future], _result(future, futures[future], data_dir)
    finally:
        for future in futures:
            future.cancel()


def _result(future: Future, cell: Cell, data_dir: str) -> dict:
    try:
        return future.result()
    except Exception as error:  # of the executor: its worker died
        return _failed(cell, data_dir, error)


class Estimate:
    """How long cells will take: the median over the records in `runs` of cells like them.

    Alike are cells with the same data set, defence and settings of the defence; of undefended victims those
    that are trained alike.
    """

    def __init__(self):
        self.known: dict[str, list[float]] = {}
        for folder in ("models", "records"):
            for path in (runs_dir() / folder).glob("*.json"):
                if record := read_record(path):
                    self.add(record)

    def add(self, record: dict) -> None:
        about = record["settings"]
        if "defence" in about:
            if "seconds" not in record:  # not a cell's: notebook 12 keeps its runs there as well
                return
            like = (about["victim"]["dataset"], about["defence"], about["defence_settings"])
            seconds = record["seconds"]
        else:
            like = (about["dataset"], NONE, about["training"])
            seconds = record["training_seconds"] + record["trigger_seconds"]
        self.known.setdefault(json.dumps(like, sort_keys=True), []).append(seconds)

    def seconds(self, cell: Cell) -> float | None:
        """What the cell will take; None where nothing like it is recorded."""
        settings = cell.victim.training if cell.defence == NONE else cell.settings
        like = (cell.victim.dataset, cell.defence, asdict(settings))
        found = self.known.get(json.dumps(like, sort_keys=True))
        return median(found) if found else None

    def text(self, cells: Iterable[Cell], workers: int = 1) -> str:
        """What all of these will take."""
        guesses = [self.seconds(cell) for cell in cells]
        known = [seconds for seconds in guesses if seconds is not None]
        unknown = len(guesses) - len(known)
        words = [f"about {tqdm.format_interval(sum(known) / workers)} left"] if known or not unknown else []
        return ", ".join([*words, *([f"{unknown} of unknown length"] if unknown else [])])


# ---- executors


class Processes(ThreadPoolExecutor):
    """An executor that gives each call a process of its own, `jobs` at a time.

    So a cell that is killed, for want of memory say, takes no other with it, and the peak memory that a
    record names is its own. The processes share torch's threads out among them, and end with this one.
    """

    def __init__(self, jobs: int):
        if jobs < 1:
            raise GridError(f"{jobs} jobs; there must be at least 1")
        super().__init__(jobs)
        self.threads = max(1, torch.get_num_threads() // jobs)
        self.running: set = set()

    def submit(self, function, *arguments) -> Future:
        return super().submit(self._call, function, *arguments)

    def _call(self, function, *arguments):
        context = get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_send_result, args=(sender, self.threads, function, arguments))
        process.start()
        sender.close()
        self.running.add(process)
        try:
            return receiver.recv()
        except EOFError:
            process.join()
            raise RuntimeError(f"the cell's process ended with exit status {process.exitcode}") from None
        finally:
            process.join()
            self.running.discard(process)

    def __exit__(self, error, *about):
        if error:
            self.shutdown(wait=False, cancel_futures=True)
            for process in list(self.running):
                process.kill()
        return super().__exit__(error, *about)


def _send_result(sender, threads: int, function, arguments) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to act on
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    sender.send(function(*arguments))


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)


@contextmanager
def executor(
    jobs: int | None = None, scheduler: str = "", *, gpu: bool = False
) -> Iterator[tuple[Executor | None, int]]:
    """An executor for `run`, and how many cells it computes at once.

    `jobs` processes of this machine, or the workers of the Dask scheduler at the address `scheduler`, or with
    neither this process: None. With `gpu` a cell takes one unit of the resource GPU, with which workers are
    started by `dask worker --resources GPU=1`. Raises GridError for a scheduler that cannot be reached.
    """
    if gpu and not scheduler:
        raise GridError("a GPU is a resource of Dask's workers: name their scheduler")
    if scheduler:
        with _client(scheduler) as client:
            options = {"resources": {"GPU": 1}} if gpu else {}
            yield client.get_executor(pure=False, **options), max(1, len(client.nthreads()))
    elif jobs is not None:
        with Processes(jobs) as processes:
            yield processes, jobs
    else:
        yield None, 1


def _client(address: str):
    try:
        from distributed import Client

        return Client(address)
    except ImportError:
        raise GridError("a scheduler needs Dask: pip install 'ibau[cluster]'") from None
    except (OSError, ValueError) as error:
        raise GridError(f"no Dask scheduler at {address}: {error}") from None


# ---- what there is


def overview(cells: Iterable[Cell], data_dir: str = "") -> str:
    """What `run` would do, a line a cell: there, to do (with how long it may take), or failed, and why."""
    by_path, estimate = _by_path(cells, data_dir), Estimate()
    missing = set(_missing(by_path))
    lines = []
    for cell in by_path.values():
        error, seconds = failure_of(cell, data_dir), estimate.seconds(cell)
        if cell not in missing:
            lines.append(f"there   {cell}")
        elif error:
            lines.append(f"failed  {cell}: {error['type']}: {error['message']}")
        else:
            lines.append(f"to do   {cell}" + (f", {tqdm.format_interval(seconds)}" if seconds else ""))
    total = f"{len(by_path)} cells: {len(by_path) - len(missing)} there, {len(missing)} to do"
    return "\n".join([*lines, f"{total}; {estimate.text(missing)}"])


def publish(cells: Iterable[Cell], data_dir: str = "") -> int:
    """Copy the records of these cells that are there to `figures/data`; returns how many."""
    found = {path: read_record(path) for path in _by_path(cells, data_dir)}
    for record in filter(None, found.values()):
        (study_records.publish if "defence" in record["settings"] else study_records.publish_victim)(record)
    return sum(record is not None for record in found.values())
