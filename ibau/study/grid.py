"""The grid behind the paper's tables: cells -> records, on one machine or many, interrupted at any time.

    cells = single_target("quick", seeds=(0, 1, 2))
    run(cells)                                # one after the other, in this process
    with executor(jobs=4) as processes:       # or any other concurrent.futures.Executor
        run(cells, processes)
    records(cells)                            # cell -> record, None where there is none

A cell's record is made once, whoever asks for it (see `records.once`), so a call that was killed is just
made again. A cell that fails is written to `runs/failed` with its error, and tried again by the next call.
What a worker runs is `compute`; it needs the files of `runs_dir()` and of the data set under the same paths.
"""

import os
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import lru_cache
from multiprocessing import get_context, parent_process
from pathlib import Path

import torch
from tqdm import tqdm

from ibau import defences
from ibau.attacks import ATTACKS
from ibau.data.images import Splits
from ibau.data.splits import CLEAN_SIZE, load
from ibau.study import experiment
from ibau.study.records import Records, provenance, read_record, runs, runs_dir, write_record
from ibau.study.settings import STANDARD, VictimSettings, standard_victims
from ibau.study.settings import profile as profile_of

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
# A patch, a whole picture and an optimised trigger, where all attacks are too many:
THREE = ("BadNets", "Blend", "l2-inv")
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
    chosen = profile_of(profile, dataset)
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
    shares = sorted({cell.victim.poison_ratio for cell in cells if cell.victim.attacks})
    _check("poison ratio", ratios, shares)
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
    chosen = profile_of(profile, dataset)
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
        return runs().path(experiment.describe(cell.victim, splits))
    about = experiment.describe_defence(cell.victim, splits, cell.defence, cell.settings, seed=cell.seed)
    return runs().path(about)


def records(cells: Iterable[Cell], data_dir: str = "") -> dict[Cell, dict | None]:
    """The record of each cell; None where there is none."""
    return {cell: read_record(path_of(cell, data_dir)) for cell in cells}


def failure_of(cell: Cell, data_dir: str = "") -> dict | None:
    """What the cell's last try failed with: type, message and end of the traceback. None if it did not."""
    return (read_record(_failure_path(cell, data_dir)) or {}).get("error")


def _failure_path(cell: Cell, data_dir: str) -> Path:
    return runs_dir() / "failed" / path_of(cell, data_dir).name


def compute(cell: Cell, data_dir: str = "", folder: str = "") -> dict:
    """Make the cell's record, or write down why it failed: what a worker runs, `folder` as its IBAU_RUNS.

    Returns the record, or {"error": ...} as `failure_of` gives it. A process computes one cell at a time,
    however many threads call this.
    """
    if folder:
        os.environ["IBAU_RUNS"] = folder
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
    about = {"cell": str(cell), "settings": asdict(cell), "error": found, "provenance": provenance()}
    try:
        write_record(_failure_path(cell, data_dir), about)
    except OSError:  # the disk that the record did not fit on
        pass
    return {"error": found}


# ---- many cells


def run(
    cells: Iterable[Cell],
    executor: Executor | None = None,
    *,
    data_dir: str = "",
    progress: bool = False,
) -> Counter:
    """Make the records of these cells that are not there yet; those of undefended victims first.

    `executor` computes them; None: this process, one after the other. Returns how many are "there" from
    before, "done" and "failed": see `failure_of`. Raises DataError where the images cannot be read.
    """
    by_path = _by_path(cells, data_dir)
    missing = _missing(by_path)
    counts = Counter(there=len(by_path) - len(missing))
    shape = "{l_bar}{bar}| {n_fmt}/{total_fmt} cells [{elapsed}<{remaining}]"
    with tqdm(total=len(missing), bar_format=shape, disable=not progress) as bar:
        for cell, found in _computed(missing, executor, data_dir):
            error = found.get("error")
            counts["failed" if error else "done"] += 1
            if error and progress:
                bar.write(f"failed: {cell}: {error['type']}: {error['message']}", file=sys.stderr)
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


# ---- executors


def _processes(jobs: int) -> ProcessPoolExecutor:
    """`jobs` processes that share torch's threads out among them, and end with this one."""
    if jobs < 1:
        raise GridError(f"{jobs} jobs; there must be at least 1")
    threads = max(1, torch.get_num_threads() // jobs)
    return ProcessPoolExecutor(jobs, get_context("spawn"), _start_process, (threads,))


def _start_process(threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)


@contextmanager
def executor(jobs: int | None = None, scheduler: str = "", *, gpu: bool = False) -> Iterator[Executor | None]:
    """An executor for `run`.

    `jobs` processes of this machine, or the workers of the Dask scheduler at the address `scheduler`, or with
    neither this process: None. With `gpu` a cell takes one unit of the resource GPU, with which workers are
    started by `dask worker --resources GPU=1`. Raises GridError for a scheduler that cannot be reached. One
    of `jobs` processes that is killed ends the others too; the next call tries their cells again.
    """
    if gpu and not scheduler:
        raise GridError("a GPU is a resource of Dask's workers: name their scheduler")
    if scheduler:
        with _client(scheduler) as client:
            yield client.get_executor(pure=False, **({"resources": {"GPU": 1}} if gpu else {}))
    elif jobs is not None:
        with _processes(jobs) as processes:
            yield processes
    else:
        yield None


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
    """What `run` would do, a line a cell: there, to do, or failed, and why."""
    by_path = _by_path(cells, data_dir)
    missing = set(_missing(by_path))
    lines = [f"{'to do' if cell in missing else 'there':6}  {cell}" for cell in by_path.values()]
    for i, cell in enumerate(by_path.values()):
        if cell in missing and (error := failure_of(cell, data_dir)):
            lines[i] = f"failed  {cell}: {error['type']}: {error['message']}"
    total = f"{len(by_path)} cells: {len(by_path) - len(missing)} there, {len(missing)} to do"
    return "\n".join([*lines, total])


def publish(cells: Iterable[Cell], data_dir: str = "") -> int:
    """Copy the records of these cells that are there to `figures/data`; returns how many."""
    found = [record for record in map(read_record, _by_path(cells, data_dir)) if record]
    for record in found:
        Records().publish(record)
    return len(found)
