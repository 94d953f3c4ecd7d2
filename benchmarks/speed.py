"""How fast I-BAU is, beside the hypergradient as the textbook has it: `make bench`.

What is compared is run in turn and repeatedly in one process, so that a busy machine slows all of it alike;
given are median, smallest and largest, and the median of the ratios of neighbours. Writes the tables
`figures/data/speed_*.csv`; rows of other data sets stay in them.
"""

import argparse
import copy
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.textbook import textbook
from ibau.cleaning.recipe import CleanSettings, clean
from ibau.data.images import Splits
from ibau.data.splits import load
from ibau.defences.base import STATM, PeakMemory
from ibau.hypergradient.implicit import Hypergradient
from ibau.hypergradient.layers import exact_float32
from ibau.measure import rates as rates_of
from ibau.networks import models
from ibau.own_model import load as own_load
from ibau.study import experiment, grid
from ibau.study import records as study_records
from ibau.study import settings as study_settings
from ibau.unlearning.authors import AuthorsSettings, authors
from ibau.unlearning.common import UnlearningError, prepare
from ibau.unlearning.ibau import IBAUSettings, InnerProblem, outer_step, unlearn

TABLES = ("step", "round", "growth", "memory", "effect", "workers")
FAST, PLAIN = "this package", "textbook"
RECIPES = {  # what is timed until the backdoor is gone, and whether its hypergradients are textbook's
    "I-BAU": (unlearn, IBAUSettings(K=5), False),
    "I-BAU+": (clean, CleanSettings(), False),
    "authors' recipe, textbook": (authors, AuthorsSettings(rounds=5), True),
}
SERIES = IBAUSettings(tol=0.0)  # all K terms, as the textbook sums them
ROUND_OF = "torchvision:vit_b_16?image_size=64"  # a round's memory is that of its 86 million weights
GONE, LOST = 0.10, 0.02  # the backdoor is gone at this ASR, with ACC down by no more than that


def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    folder = Path(args.out or study_records.figures_dir() / "data")
    effort = study_settings.profile("quick" if args.dataset == "mnist5k" else "desk", args.dataset)
    splits = load(args.dataset, args.data, clean_size=effort.clean_size)
    victim = experiment.victim(study_settings.standard_victims(effort)["BadNets"], splits)
    seen = (splits.clean.images, splits.clean.labels)
    n, quick = args.repeats, args.quick
    Ks = (5,) if quick else (0, 5)
    tables = {
        "step": lambda: steps(victim.model, *seen, repeats=3 * n, Ks=Ks),
        "round": lambda: rounds(victim.model, *seen, repeats=n, steps=2 if quick else 10),
        "growth": lambda: growth(repeats=n, quick=quick),
        "memory": lambda: memory(
            width=effort.width, Ks=(5,) if quick else (0, 5), transformer=args.transformer
        ),
        "effect": lambda: effects(victim, splits, repeats=n, recipes=list(RECIPES)[: 1 if quick else None]),
        "workers": lambda: workers(repeats=n, cells=2 if quick else 4),
    }
    about = {k: v for k, v in study_records.provenance().items() if k != "ibau"}
    for name in args.table or tables:
        table = tables[name]()
        print(f"\n{name}\n{table.to_string(index=False)}", flush=True)
        of_data = args.dataset if name in ("step", "round", "effect") else ""
        write(table.assign(**about), folder / f"speed_{name}.csv", of_data)


def _arguments(argv: list[str] | None):
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="mnist5k", help="default: mnist5k, which needs no folder")
    parser.add_argument("--data", default="", metavar="DIR", help="folder of the data set's images")
    parser.add_argument("--table", nargs="+", default=[], choices=TABLES, help="only these; default: all")
    parser.add_argument("--repeats", type=int, default=3, help="of every comparison (default 3)")
    parser.add_argument(
        "--transformer", action="store_true", help="memory: also of a round on vit_b_16 (minutes, 6 GB)"
    )
    parser.add_argument("--quick", action="store_true", help="a short run that only shows that it runs")
    parser.add_argument("--out", default="", metavar="DIR", help="for the tables; default figures/data")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats is {args.repeats}; it must be at least 1")
    return args


def write(table: pd.DataFrame, file: Path, dataset: str = "") -> None:
    """Write a table; one of a data set takes the place of that data set's rows alone."""
    if dataset:
        table.insert(0, "dataset", dataset)
        if file.exists():
            before = pd.read_csv(file)
            table = pd.concat([before[before["dataset"] != dataset], table])
    file.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(file, index=False)


def stepper(
    model: nn.Module, images: Tensor, labels: Tensor, settings: IBAUSettings, how: str
) -> Callable[[], Hypergradient]:
    """A function that takes the same outer step again and again, at a rate of 0; it has taken one.

    model   is left as it was
    images  (N, 3, H, W), the clean set; the step takes the first `batch_size` of it
    how     FAST or PLAIN
    """
    way = nullcontext if how == FAST else textbook
    delta = _perturbation(model, images, labels, settings)
    with way():
        start = prepare(model, images, labels, held_out=0.0, seed=0)
    optimizer = torch.optim.Adam(start.model.parameters(), lr=0.0)
    batch = (start.images[: settings.batch_size], start.labels[: settings.batch_size])
    sample = (start.images[: settings.inner_images], start.labels[: settings.inner_images])
    inner = InnerProblem(start.model, *sample, settings)

    def step() -> Hypergradient:
        generator = torch.Generator().manual_seed(1)
        with exact_float32(), way():
            taken = outer_step(inner, delta, *batch, optimizer, generator)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return taken

    step()
    return step


def _perturbation(model: nn.Module, images: Tensor, labels: Tensor, settings: IBAUSettings) -> Tensor:
    """The inner solution in float32: the same for whatever is compared."""
    settings = replace(settings, precision="float32")
    sample = slice(settings.inner_images)
    inner = InnerProblem(copy.deepcopy(model).eval(), images[sample], labels[sample], settings)
    return inner.solve(torch.Generator().manual_seed(0)).delta


def steps(model: nn.Module, images: Tensor, labels: Tensor, *, repeats: int, Ks=(0, 5)) -> pd.DataFrame:
    """Seconds an outer step takes, both ways, and how far apart the two hypergradients are.

    Weights, batch and perturbation are the same. `precision` is the settings': with K > 0 the textbook's step
    is float32 whatever it says, with K = 0 both follow it.
    """
    rows = []
    for K in Ks:
        for precision in ("float32", "auto"):
            settings = replace(SERIES, K=K, precision=precision)
            pair = {how: stepper(model, images, labels, settings, how) for how in (FAST, PLAIN)}
            rows += _compared({"K": K, "precision": precision}, pair, repeats, _difference)
    return pd.DataFrame(rows)


def rounds(model: nn.Module, images: Tensor, labels: Tensor, *, repeats: int, steps: int = 10):
    """Seconds of one whole round: the inner solve and `steps` outer steps."""
    rows = []
    for K in (0, 5):
        settings = IBAUSettings(K=K, rounds=1, outer_steps=steps, held_out=0.0)

        def one(how: str, settings: IBAUSettings = settings) -> None:
            with nullcontext() if how == FAST else textbook():
                unlearn(model, images, labels, settings)

        pair = {FAST: lambda one=one: one(FAST), PLAIN: lambda one=one: one(PLAIN)}
        rows += _compared({"K": K, "outer_steps": steps}, pair, repeats)
    return pd.DataFrame(rows)


def growth(*, repeats: int, quick: bool = False) -> pd.DataFrame:
    """How seconds per outer step grow with K, the width of SmallVGG and the clean set; on random images.

    The direct gradient is float32's throughout, so that what K = 0 takes is part of what K > 0 takes.
    """
    base = {"K": 5, "width": 0.5, "clean_images": 500}
    varied = {"K": (0, 1, 2, 5, 10), "width": (0.25, 0.5, 1.0), "clean_images": (50, 100, 500, 5000)}
    if quick:
        base["width"], varied = 0.25, {"K": (1,)}
    rows = []
    for name, values in varied.items():
        for value in values:
            case = {**base, name: value}
            random = _random(case["width"], case["clean_images"])
            settings = replace(SERIES, K=case["K"], precision="auto" if case["K"] else "float32")
            pair = {how: stepper(*random, settings, how) for how in (FAST, PLAIN)}
            rows += _compared({"varied": name, **case}, pair, repeats)
    return pd.DataFrame(rows)


def effects(victim: experiment.Victim, splits: Splits, *, repeats: int, recipes: list[str]):
    """Seconds of unlearning until ASR <= 10% on test images with ACC down by at most 2 points.

    Looked at after every round; the looking is not counted. `reached` counts the repeats (seeds) that got
    there; the seconds of the others are those they spent in vain.
    """
    found = {name: [] for name in recipes}
    for seed in range(repeats):
        for name in recipes:
            found[name].append(_until_gone(victim, splits, *RECIPES[name], seed))
    rows = []
    for name, runs in found.items():
        table = pd.DataFrame(runs)
        seconds = _summary(table["seconds"].tolist())
        last = table[["rounds", "asr", "acc_lost"]].median().round(3)
        rows.append({"recipe": name, "reached": int(table["gone"].sum()), **seconds, **last})
    return pd.DataFrame(rows)


class _Gone(Exception):
    """The backdoor is: unlearning can stop."""


def _until_gone(victim, splits, recipe: Callable, settings, plainly: bool, seed: int) -> dict:
    before = rates_of.accuracy(victim.model, splits.test.images, splits.test.labels).value
    line = {"gone": False, "rounds": 0, "asr": math.nan, "acc_lost": math.nan}
    watching = 0.0

    def look(model: nn.Module, history: list[dict]) -> None:
        nonlocal watching
        started = time.perf_counter()
        trigger, target = victim.attacks[0]
        asr, _ = rates_of.attack_rates(
            model, splits.test.images, splits.test.labels, trigger, target, num_classes=len(splits.classes)
        )
        lost = before - rates_of.accuracy(model, splits.test.images, splits.test.labels).value
        line.update(rounds=len(history), asr=asr.value, acc_lost=lost)
        line["gone"] = asr.value <= GONE and lost <= LOST
        watching += time.perf_counter() - started
        if line["gone"]:
            raise _Gone

    started = time.perf_counter()
    try:
        with textbook() if plainly else nullcontext():
            recipe(victim.model, splits.clean.images, splits.clean.labels, settings, seed, on_round=look)
    except (_Gone, UnlearningError):
        pass
    return {**line, "seconds": time.perf_counter() - started - watching}


def memory(*, width: float, Ks=(0, 5), transformer: bool = False) -> pd.DataFrame:
    """MiB that two outer steps need beyond model and images, each in a process of its own.

    With `transformer` also what a whole round needs, of ten outer steps and K = 5, on ROUND_OF.
    """
    rows = []
    for K in Ks:
        for how in (FAST, PLAIN):
            peak = _apart(_memory_of_steps, how, K, width)
            rows.append({"work": "two steps, small_vgg", "K": K, "variant": how, "peak_mb": peak})
    if transformer:
        peak = _apart(_memory_of_round)
        rows.append({"work": "a round, vit_b_16", "K": 5, "variant": FAST, "peak_mb": peak})
    return pd.DataFrame(rows)


def workers(*, repeats: int, cells: int) -> pd.DataFrame:
    """Seconds that cells take in this process, and on two Dask workers of one thread each, over TCP.

    A cell fine-tunes one quick victim, each time with another seed. The workers have computed some before the
    clock starts. This process takes one thread, then as many as torch takes by itself.
    """
    from distributed import LocalCluster

    victim = study_settings.standard_victims(study_settings.profile("quick", ""))["BadNets"]
    settings = grid.settings_for("finetune", "quick", victim.dataset)
    seeds, threads, rows = count(), torch.get_num_threads(), []

    def compute(executor=None, most: int = threads) -> None:
        todo = [grid.Cell(victim, "finetune", settings, None, next(seeds)) for _ in range(cells)]
        torch.set_num_threads(most)
        done = grid.run(todo, executor)["done"]
        torch.set_num_threads(threads)
        if done < cells:
            raise RuntimeError(f"{cells - done} of {cells} cells failed: {grid.failure_of(todo[-1])}")

    with TemporaryDirectory() as runs, patch.dict(os.environ, IBAU_RUNS=runs):
        compute()  # trains the victim, too
        with (
            LocalCluster(2, threads_per_worker=1, dashboard_address=None) as cluster,
            grid.executor(scheduler=cluster.scheduler_address) as (executor, _),
        ):
            compute(executor)
            for most in sorted({1, threads}):
                pair = {
                    "two Dask workers": lambda: compute(executor),
                    "this process": lambda most=most: compute(most=most),
                }
                rows += _compared({"cells": cells, "threads_here": most}, pair, repeats)
    return pd.DataFrame(rows)


def _apart(function: Callable, *arguments):
    """What the function returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _memory_of_steps(how: str, K: int, width: float) -> float:
    model, images, labels = _random(width, 100)
    return _beyond(model, images, lambda: stepper(model, images, labels, replace(SERIES, K=K), how)())


def _memory_of_round() -> float:
    model = own_load.build(ROUND_OF, 10)
    # torchvision's head starts at zero, from which no gradient reaches the rest.
    nn.init.trunc_normal_(model.heads.head.weight, std=0.02)
    generator, device = torch.Generator().manual_seed(0), experiment.default_device()
    images = torch.rand(100, 3, 64, 64, generator=generator).to(device)
    labels = torch.randint(10, (100,), generator=generator).to(device)
    settings = replace(SERIES, rounds=1, outer_steps=10, held_out=0.0)
    model = model.to(device)
    return _beyond(model, images, lambda: unlearn(model, images, labels, settings))


def _beyond(model: nn.Module, images: Tensor, work: Callable[[], object]) -> float:
    """MiB that the work needs at its peak beyond what this process needs already."""
    with torch.no_grad():
        model(images[:1])
    before = _resident()
    with PeakMemory() as peak:
        work()
    return round((peak.mb or math.nan) - before, 1)


def _random(width: float, n: int) -> tuple[nn.Module, Tensor, Tensor]:
    """An untrained SmallVGG and n random images with labels."""
    device, generator = experiment.default_device(), torch.Generator().manual_seed(0)
    images = torch.rand(n, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (n,), generator=generator)
    return models.build("small_vgg", 10, width=width).to(device), images.to(device), labels.to(device)


def _resident() -> float:
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**20
    pages = int(STATM.read_text().split()[1]) if STATM.exists() else 0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20 if pages else math.nan


def _compared(case: dict, pair: dict[str, Callable], repeats: int, difference: Callable | None = None):
    """A row for each of the two, run in turn; the second is what the first is compared with."""
    taken = {name: [] for name in pair}
    for _ in range(repeats):
        for name, run in pair.items():
            started = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - started)
    first, second = taken.values()
    ratios = _summary([b / a for a, b in zip(first, second, strict=True)])
    rows = [{**case, "variant": name, **_summary(seconds)} for name, seconds in taken.items()]
    rows[0] |= {f"ratio_{key}": ratios[key] for key in ("median", "min", "max")}
    if difference:
        rows[0]["difference"] = difference(*(run() for run in pair.values()))
    return rows


def _summary(values: list[float]) -> dict:
    spread = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {"n": len(values)} | {key: float(f"{value:.3g}") for key, value in spread.items()}


def _difference(found: Hypergradient, expected: Hypergradient) -> float:
    """The relative difference of two hypergradients."""
    a, b = (torch.cat([t.flatten() for t in gradient.total]) for gradient in (found, expected))
    return float(f"{((a - b).norm() / b.norm()).item():.1e}")


if __name__ == "__main__":
    main()
