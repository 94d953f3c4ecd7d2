"""How fast I-BAU is, beside the hypergradient as the textbook has it: `make bench`.

What is compared is run by turns and repeatedly in one process, so that a busy machine slows all of it alike;
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
from collections.abc import Callable, Sequence
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
from ibau.measure.rates import accuracy, attack_rates
from ibau.networks import models
from ibau.own_model.load import build
from ibau.study import experiment, grid
from ibau.study.cells import Cell, settings_for
from ibau.study.records import figures_dir, provenance
from ibau.study.settings import profile, standard_victims
from ibau.unlearning.authors import AuthorsSettings, authors
from ibau.unlearning.common import UnlearningError, prepare
from ibau.unlearning.ibau import IBAUSettings, InnerProblem, outer_step, unlearn

TABLES = ("step", "growth", "memory", "effect", "workers")
FAST, PLAIN = "this package", "textbook"
RECIPES = {  # what is timed until the backdoor is gone, and whether its hypergradients are the textbook's
    "I-BAU": (unlearn, IBAUSettings(), False),
    "I-BAU+": (clean, CleanSettings(), False),
    "authors' recipe, textbook": (authors, AuthorsSettings(rounds=5), True),
}
SERIES = IBAUSettings(tol=0.0)  # all K terms, as the textbook sums them
LARGE = {"torchvision:resnet18": 64, "torchvision:vit_b_16": 224}  # pixels a side; 43 and 327 MiB of weights
GONE, LOST = 0.10, 0.02  # the backdoor is gone at this ASR, with ACC down by no more than that


def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    folder = Path(args.out or figures_dir() / "data")
    effort = profile("quick" if args.dataset == "mnist5k" else "desk", args.dataset)
    splits = load(args.dataset, args.data, clean_size=effort.clean_size)
    victim = experiment.victim(standard_victims(effort)["BadNets"], splits)
    seen = (splits.clean.images, splits.clean.labels)
    n, quick = args.repeats, args.quick
    Ks = (5,) if quick else (0, 5)
    tables = {
        "step": lambda: steps(victim.model, *seen, repeats=3 * n, Ks=Ks),
        "growth": lambda: growth(repeats=n, quick=quick),
        "memory": lambda: memory(width=effort.width, Ks=Ks, large=list(LARGE)[: args.large]),
        "effect": lambda: effects(victim, splits, repeats=n, recipes=list(RECIPES)[: 1 if quick else None]),
        "workers": lambda: workers(repeats=n, cells=2 if quick else 4),
    }
    about = {name: value for name, value in provenance().items() if name != "ibau"}
    for name in args.table or tables:
        table = tables[name]()
        print(f"\n{name}\n{table.to_string(index=False)}", flush=True)
        of_data = args.dataset if name in ("step", "effect") else ""
        write(table.assign(**about), folder / f"speed_{name}.csv", of_data)


def _arguments(argv: list[str] | None):
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="mnist5k", help="default: mnist5k, which needs no folder")
    parser.add_argument("--data", default="", metavar="DIR", help="folder of the data set's images")
    parser.add_argument("--table", nargs="+", default=[], choices=TABLES, help="only these; default: all")
    parser.add_argument("--repeats", type=int, default=3, help="of every comparison (default 3)")
    parser.add_argument("--large", type=int, default=1, help="memory: on so many large networks (default 1)")
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


# ---- seconds


def stepper(
    model: nn.Module, images: Tensor, labels: Tensor, settings: IBAUSettings, how: str
) -> Callable[[], Hypergradient]:
    """A function that takes the same outer step again and again, at a rate of 0; it has taken one.

    model   is left as it was
    images  (N, 3, H, W), the clean set; the step takes the first `batch_size` of it
    how     FAST or PLAIN
    """
    way = nullcontext if how == FAST else textbook
    delta, eta = _perturbation(model, images, labels, settings)
    with way():
        start = prepare(model, images, labels, held_out=0.0, seed=0)
    optimizer = torch.optim.Adam(start.model.parameters(), lr=0.0)
    batch = (start.images[: settings.batch_size], start.labels[: settings.batch_size])
    sample = (start.images[: settings.inner_images], start.labels[: settings.inner_images])
    inner = InnerProblem(start.model, *sample, settings)
    inner.eta = eta

    def step() -> Hypergradient:
        generator = torch.Generator().manual_seed(1)
        with exact_float32(), way():
            taken = outer_step(inner, delta, *batch, optimizer, generator)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return taken

    step()
    return step


def _perturbation(model: nn.Module, images: Tensor, labels: Tensor, settings: IBAUSettings):
    """The inner solution and the step of Phi there, in float32: the same for whatever is compared."""
    settings = replace(settings, precision="float32")
    sample = slice(settings.inner_images)
    inner = InnerProblem(copy.deepcopy(model).eval(), images[sample], labels[sample], settings)
    return inner.solve(torch.Generator().manual_seed(0)).delta, inner.eta


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
        last = table[["rounds", "asr", "acc_lost"]].median().round(3)
        seconds = _summary(table["seconds"].tolist())
        rows.append({"recipe": name, "reached": int(table["gone"].sum()), **seconds, **last})
    return pd.DataFrame(rows)


class _Gone(Exception):
    """The backdoor is: unlearning can stop."""


def _until_gone(victim, splits, recipe: Callable, settings, plainly: bool, seed: int) -> dict:
    test, classes = (splits.test.images, splits.test.labels), len(splits.classes)
    before = accuracy(victim.model, *test).value
    line = {"gone": False, "rounds": 0, "asr": math.nan, "acc_lost": math.nan}
    watching = 0.0

    def look(model: nn.Module, history: list[dict]) -> None:
        nonlocal watching
        began = time.perf_counter()
        asr, lost = attack_rates(model, *test, *victim.attacks[0], classes)[0].value, before
        lost -= accuracy(model, *test).value
        line.update(gone=asr <= GONE and lost <= LOST, rounds=len(history), asr=asr, acc_lost=lost)
        watching += time.perf_counter() - began
        if line["gone"]:
            raise _Gone

    began = time.perf_counter()
    try:
        with textbook() if plainly else nullcontext():
            recipe(victim.model, splits.clean.images, splits.clean.labels, settings, seed, on_round=look)
    except (_Gone, UnlearningError):
        pass
    return {**line, "seconds": time.perf_counter() - began - watching}


def workers(*, repeats: int, cells: int) -> pd.DataFrame:
    """Seconds that cells take in this process, and on two Dask workers of one thread each, over TCP.

    A cell fine-tunes one quick victim, each time with another seed. The workers have computed some before the
    clock starts. This process takes one thread, then as many as torch takes by itself.
    """
    from distributed import LocalCluster

    victim = standard_victims(profile("quick"))["BadNets"]
    settings = settings_for("finetune", "quick", victim.dataset)
    seeds, threads, rows = count(), torch.get_num_threads(), []

    def compute(executor=None, most: int = threads) -> None:
        todo = [Cell(victim, "finetune", settings, None, next(seeds)) for _ in range(cells)]
        torch.set_num_threads(most)
        done = grid.run(todo, executor)["done"]
        torch.set_num_threads(threads)
        if done < cells:
            raise RuntimeError(f"{cells - done} of {cells} cells failed: {grid.failure_of(todo[-1])}")

    with TemporaryDirectory() as runs, patch.dict(os.environ, IBAU_RUNS=runs):
        compute()  # trains the victim, too
        with (
            LocalCluster(2, threads_per_worker=1, dashboard_address=None) as cluster,
            grid.executor(scheduler=cluster.scheduler_address) as executor,
        ):
            compute(executor)
            for most in sorted({1, threads}):
                pair = {
                    "two Dask workers": lambda: compute(executor),
                    "this process": lambda most=most: compute(most=most),
                }
                rows += _compared({"cells": cells, "threads_here": most}, pair, repeats)
    return pd.DataFrame(rows)


def _compared(case: dict, pair: dict[str, Callable], repeats: int, difference: Callable | None = None):
    """A row for each of the two, run by turns; the second is what the first is compared with."""
    taken = {name: [] for name in pair}
    for _ in range(repeats):
        for name, run in pair.items():
            began = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - began)
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


# ---- memory


def memory(*, width: float, Ks=(0, 5), large: Sequence[str] = ()) -> pd.DataFrame:
    """MiB needed beyond model and images, each in a process of its own.

    By two outer steps on SmallVGG, both ways; and by a whole round of I-BAU with ten outer steps on each of
    the `large` networks, in batches of four images, so that it is the weights that count.
    """
    jobs = [(_steps_on_small_vgg, how, K, width) for K in Ks for how in (FAST, PLAIN)]
    jobs += [(_round_on, architecture) for architecture in large]
    rows = []
    for function, *given in jobs:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as apart:
            rows.append(apart.submit(function, *given).result())
    return pd.DataFrame(rows)


def _steps_on_small_vgg(how: str, K: int, width: float) -> dict:
    random = _random(width, 100)
    peak = _beyond(random[0], random[1], lambda: stepper(*random, replace(SERIES, K=K), how)())
    return {"work": "two steps, small_vgg", "K": K, "variant": how, "peak_mb": peak}


def _round_on(architecture: str) -> dict:
    device, size = experiment.default_device(), LARGE[architecture]
    model = build(architecture, 10).to(device)
    if "vit" in architecture:  # torchvision's head starts at zero, from which no gradient reaches the rest
        nn.init.trunc_normal_(model.heads.head.weight, std=0.02)
    images, labels = torch.rand(8, 3, size, size, device=device), torch.arange(8, device=device)
    few = {"batch_size": 4, "inner_images": 4, "inner_steps": 2}
    settings = replace(SERIES, rounds=1, outer_steps=10, held_out=0.0, **few)
    peak = _beyond(model, images, lambda: unlearn(model, images, labels, settings))
    work = f"a round, {architecture}, {size}x{size}"
    return {"work": work, "K": settings.K, "variant": FAST, "peak_mb": peak}


def _beyond(model: nn.Module, images: Tensor, work: Callable[[], object]) -> float:
    """MiB that the work needs at its peak beyond what this process needs already."""
    with torch.no_grad():
        model(images[:1])
    before = _resident()
    with PeakMemory() as peak:
        work()
    return round((peak.mb or math.nan) - before, 1)


def _resident() -> float:
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**20
    pages = int(STATM.read_text().split()[1]) if STATM.exists() else math.nan
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _random(width: float, n: int) -> tuple[nn.Module, Tensor, Tensor]:
    """An untrained SmallVGG and n random images with labels."""
    device, generator = experiment.default_device(), torch.Generator().manual_seed(0)
    images = torch.rand(n, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (n,), generator=generator)
    return models.build("small_vgg", 10, width=width).to(device), images.to(device), labels.to(device)


if __name__ == "__main__":
    main()
