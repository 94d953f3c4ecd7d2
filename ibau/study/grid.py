"""The grid: cells -> records, on one machine or many, interrupted at any time.

    cells = choose(["single-target"], "quick", seeds=3)
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
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from multiprocessing import get_context, parent_process
from pathlib import Path

import torch
from tqdm import tqdm

from ibau.data.images import Splits
from ibau.data.splits import load
from ibau.study import experiment
from ibau.study.cells import NONE, Cell, GridError
from ibau.study.records import Records, provenance, read_record, runs, runs_dir, write_record

# ---- one cell

_ONE_AT_A_TIME = threading.Lock()  # torch's random numbers are the process's, not the thread's
_load = lru_cache(maxsize=8)(load)


def _splits(cell: Cell, data_dir: str) -> Splits:
    sizes = {"train_size": cell.victim.train_size, "clean_size": cell.clean_size}
    return _load(cell.victim.dataset, data_dir, **sizes)


def path_of(cell: Cell, data_dir: str = "") -> Path:
    """Where the cell's record is kept. Cells with the same path are the same."""
    splits = _splits(cell, data_dir)
    if cell.defence == NONE:
        return runs().path(experiment.describe(cell.victim, splits))
    how = {"seed": cell.seed, "effort": cell.effort}
    about = experiment.describe_defence(cell.victim, splits, cell.defence, cell.settings, **how)
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
    """What a worker runs, `folder` as its IBAU_RUNS: make the cell's record, or write down why it failed.

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
                how = {"seed": cell.seed, "effort": cell.effort}
                record = experiment.defence_record(cell.victim, splits, cell.defence, cell.settings, **how)
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
    cells: Iterable[Cell], executor: Executor | None = None, *, data_dir: str = "", progress: bool = False
) -> Counter:
    """Make the records of these cells that are not there yet; those of undefended victims first.

    `executor` computes them; None: this process, one after the other. Returns how many are "there" from
    before, "done" and "failed": see `failure_of`. Raises DataError where the images cannot be read.
    """
    by_path = {path_of(cell, data_dir): cell for cell in cells}  # each once
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
            cell = futures[future]
            try:
                yield cell, future.result()
            except Exception as error:  # of the executor: its worker died
                yield cell, _failed(cell, data_dir, error)
    finally:
        for future in futures:
            future.cancel()


# ---- executors


@contextmanager
def executor(jobs: int | None = None, scheduler: str = "", *, gpu: bool = False) -> Iterator[Executor | None]:
    """An executor for `run`.

    `jobs` processes of this machine, which share torch's threads out, or the workers of the Dask scheduler at
    the address `scheduler`, or with neither this process: None. With `gpu` a cell takes one unit of the
    resource GPU, with which workers are started by `dask worker --resources GPU=1`. One of `jobs` processes
    that is killed ends the others too; the next call tries their cells again. Raises GridError for a
    scheduler that cannot be reached.
    """
    if gpu and not scheduler:
        raise GridError("a GPU is a resource of Dask's workers: name their scheduler")
    if scheduler:
        with _client(scheduler) as client:
            yield client.get_executor(pure=False, **({"resources": {"GPU": 1}} if gpu else {}))
    elif jobs is None:
        yield None
    elif jobs < 1:
        raise GridError(f"{jobs} jobs; there must be at least 1")
    else:
        threads = max(1, torch.get_num_threads() // jobs)
        with ProcessPoolExecutor(jobs, get_context("spawn"), _start_process, (threads,)) as processes:
            yield processes


def _start_process(threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)


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
    by_path = {path_of(cell, data_dir): cell for cell in cells}
    missing, lines = set(_missing(by_path)), []
    for cell in by_path.values():
        error = failure_of(cell, data_dir) if cell in missing else None
        why = f": {error['type']}: {error['message']}" if error else ""
        lines.append(f"{'failed' if error else 'to do' if cell in missing else 'there':6}  {cell}{why}")
    total = f"{len(by_path)} cells: {len(by_path) - len(missing)} there, {len(missing)} to do"
    return "\n".join([*lines, total])


def publish(cells: Iterable[Cell], data_dir: str = "") -> int:
    """Copy the records of these cells that are there to `figures/data`; returns how many."""
    found = [record for record in map(read_record, {path_of(cell, data_dir) for cell in cells}) if record]
    for record in found:
        Records().publish(record)
    return len(found)
