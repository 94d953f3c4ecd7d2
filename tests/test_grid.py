"""The grid: any part of it, in any executor, killed at any moment, gives each record once and the same."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from PIL import Image

from ibau import cli
from ibau.attacks import ATTACKS
from ibau.cleaning.recipe import CleanSettings
from ibau.defences import DEFENCES, FinetuneSettings
from ibau.defences.base import Defence, Defended
from ibau.networks.training import TrainSettings
from ibau.study import experiment, grid, records
from ibau.study.cells import NONE, SWEEPS, Cell, Sweep, choose, settings_for
from ibau.study.records import Records, read_record
from ibau.study.settings import PROFILES, VictimSettings
from ibau.unlearning.ibau import IBAUSettings

TRAINING = TrainSettings(epochs=2, batch_size=10, precision="float32")
VICTIM = VictimSettings("folder", target=2, poison_ratio=0.3, width=0.125, training=TRAINING)
FINETUNE = FinetuneSettings(training=replace(TRAINING, epochs=1))
CLEAN = CleanSettings(rounds=2, outer_steps=2, recovery_steps=0, batch_size=10, inner_steps=2, inner_images=4)
CELLS = [
    Cell(victim, defence, settings, clean_size=20)
    for victim in (VICTIM, replace(VICTIM, attack="blend"), replace(VICTIM, attack="none", target=0))
    for defence, settings in ((NONE, None), ("finetune", FINETUNE), ("ibau_plus", CLEAN))
]
FAILING = Cell(VICTIM, "finetune", FinetuneSettings(replace(TRAINING, lr=1e30)), clean_size=20)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums are the same to the last bit only for the same number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of small images of three classes: the class's channel is bright."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 20)):
        for channel, name in enumerate("rgb"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                image = random.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                image[:, :, channel] += 100
                Image.fromarray(image).save(folder / split / name / f"{i}.png")
    return str(folder)


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("IBAU_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("IBAU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(experiment, "default_device", lambda: torch.device("cpu"))
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    """The records of CELLS as one undisturbed call leaves them, but for times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IBAU_RUNS", str(tmp_path_factory.mktemp("undisturbed")))
        patch.setattr(experiment, "default_device", lambda: torch.device("cpu"))
        assert grid.run(CELLS, data_dir=images) == {"there": 0, "done": len(CELLS)}
        return untimed(images)


def untimed(images):
    """The records of CELLS without what may differ: times, memory, and what computed them."""

    def strip(value):
        if isinstance(value, list):
            return [strip(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {
            name: strip(item)
            for name, item in value.items()
            if not re.search("seconds|memory|provenance|checksum", name)
        }

    return [strip(record) for record in grid.records(CELLS, images).values()]


@pytest.fixture
def forbidden(monkeypatch):
    """A function after whose call training and defending are errors."""

    def fail(*_, **__):
        raise AssertionError("this was done before")

    def forbid():
        monkeypatch.setattr(experiment, "train", fail)
        monkeypatch.setattr(Defence, "__call__", fail)

    return forbid


def stamps(runs):
    """The records there are, by when they were written."""
    found = {}
    for path in (*runs.glob("models/*.json"), *runs.glob("records/*.json")):
        found[path.name] = path.stat().st_mtime_ns
    return found


# ---- sweeps


def test_a_single_target_sweep_has_every_defence_against_every_attack():
    cells = SWEEPS["single-target"].cells("quick", seeds=(0, 1))
    assert len(set(cells)) == len(cells) == 2 * 8 * (1 + len(DEFENCES))
    assert {cell.victim.attack for cell in cells} == {"none", *ATTACKS}
    assert {(cell.seed, cell.victim.seed) for cell in cells} == {(0, 0), (1, 1)}
    assert {cell.clean_size for cell in cells} == {500}
    assert {cell.victim.training for cell in cells} == {PROFILES["quick"].training}
    assert {cell.defence for cell in cells} == {NONE, *DEFENCES}


def test_the_other_sweeps_have_their_range():
    both = {(cell.victim.target, len(cell.victim.attacks)) for cell in SWEEPS["multi-target"].cells("desk")}
    assert both == {("all-to-all", 1), (0, 7)}
    undefended = [cell for cell in SWEEPS["poison-ratio"].cells("desk") if cell.defence == NONE]
    ratios = [cell.victim.poison_ratio for cell in undefended]
    assert min(ratios) == 0.005 and max(ratios) == 0.2 and len(ratios) == 3 * len(set(ratios))
    for profile, most in (("quick", 500), ("paper", 5000)):
        sizes = {cell.clean_size for cell in SWEEPS["clean-size"].cells(profile)}
        assert min(sizes) == 100 and max(sizes) == most
    assert max(cell.clean_size for cell in SWEEPS["clean-size"].cells("quick", "gtsrb")) == 5000


def test_settings_follow_the_profile_and_mirror_no_signs(monkeypatch):
    class Settings(FinetuneSettings):
        @classmethod
        def desk(cls):
            return cls(held_out=0.5)

    monkeypatch.setitem(DEFENCES, "finetune", Defence("F", lambda: None, Settings))
    assert settings_for("finetune", "desk", "cifar10") == Settings(held_out=0.5)
    paper = settings_for("finetune", "paper", "cifar10")
    assert paper == Settings() and paper.training.augment == "crop-flip"
    signs = settings_for("finetune", "paper", "gtsrb")
    assert signs == replace(paper, training=replace(paper.training, augment="crop"))
    assert settings_for("ibau", "paper", "gtsrb") == IBAUSettings()


def test_cells_are_chosen_by_name():
    every = choose([], "quick")
    assert len(set(every)) == len(every) == len(set(sum((s.cells("quick") for s in SWEEPS.values()), [])))
    few = choose(["single-target"], "quick", seeds=2, attacks=["badnets"], only=["ibau", NONE])
    assert [(cell.victim.attack, cell.defence, cell.seed) for cell in few] == [
        ("badnets", defence, seed) for seed in (0, 1) for defence in (NONE, "ibau")
    ]
    least = choose(["poison-ratio"], "quick", attacks=["blend"], only=["ibau"], ratios=[0.01, 0.005])
    assert [cell.victim.poison_ratio for cell in least] == [0.005, 0.01]
    sizes = choose(["clean-size"], "quick", attacks=["blend"], only=["ibau"], sizes=[100, 250])
    assert [cell.clean_size for cell in sizes] == [250, 100]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"sweeps": ["six"]}, "no sweep 'six'; there are single-target, multi-target"),
        ({"attacks": ["wanet"]}, "no attack 'wanet'; there are none, badnets"),
        ({"only": ["anp"]}, "no defence 'anp'; there are none, "),
        ({"seeds": 0}, "0 seeds"),
        ({"ratios": [0.2, 5.0]}, r"no poison ratio 5.0; there are 0.005, 0.01, .*0.2$"),
        ({"sizes": [5000]}, "no clean size 5000; there are 100, 250, 500$"),
    ],
)
def test_names_that_do_not_exist_are_refused(bad, message):
    with pytest.raises(grid.GridError, match=message):
        choose(**{"sweeps": [], "profile": "quick", **bad})


def test_a_cell_knows_its_defence():
    assert Cell(VICTIM, "ibau") == Cell(VICTIM, "ibau", IBAUSettings())
    with pytest.raises(ValueError, match="unknown defence 'anp'; valid: "):
        Cell(VICTIM, "anp")
    assert str(CELLS[2]) == "folder badnets to 2, 30.0% poisoned | ibau_plus with 20 clean images | seed 0"
    assert str(CELLS[-3]) == "folder none | undefended | seed 0"
    assert str(Cell(replace(VICTIM, attack="badnets+blend"))).startswith("folder 2 triggers to 2, 30.0%")


# ---- one process


def test_records_are_made_once_each_beside_its_cell(undisturbed, images, runs, forbidden):
    for cell, (found, record) in zip(CELLS, grid.records(CELLS, images).items(), strict=True):
        assert found == cell and record is None
    assert grid.run(CELLS[:3], data_dir=images) == {"there": 0, "done": 3}
    forbidden()
    assert grid.run([*CELLS[:3], *CELLS[:3]], data_dir=images) == {"there": 3}
    found = grid.records(CELLS, images)
    assert [record is not None for record in found.values()] == 3 * [True] + 6 * [False]
    for cell, record in list(found.items())[1:3]:
        assert record["settings"]["defence"] == cell.defence
        assert record["settings"]["clean_images"] == 20


def test_the_undefended_come_first_and_the_clean_one_before_them(images, monkeypatch):
    asked = []
    monkeypatch.setattr(
        grid,
        "compute",
        lambda cell, data_dir: asked.append(cell) or {"error": dict.fromkeys(("type", "message"))},
    )
    grid.run(CELLS, data_dir=images)
    assert [cell.defence for cell in asked[:3]] == 3 * [NONE] and asked[0].victim.attack == "none"
    assert sorted(map(str, asked)) == sorted(map(str, CELLS))


def test_a_failing_cell_is_written_down_and_tried_again(images, runs, monkeypatch):
    cells = [FAILING, *CELLS[:2]]
    assert grid.run(cells, data_dir=images) == {"there": 0, "done": 2, "failed": 1}
    error = grid.failure_of(FAILING, images)
    assert error["type"] == "TrainingError" and error["message"].startswith("the loss became")
    assert error["traceback"].rstrip().endswith(error["message"]) and "in finetune" in error["traceback"]
    assert grid.failure_of(CELLS[0], images) is None
    (path,) = (runs / "failed").iterdir()
    assert json.loads(path.read_text())["cell"] == str(FAILING)
    assert grid.run(cells, data_dir=images) == {"there": 2, "failed": 1}

    mended = Defence("Mended", lambda model, *_, **__: Defended(model), FinetuneSettings)
    monkeypatch.setitem(DEFENCES, "finetune", mended)
    assert grid.run(cells, data_dir=images) == {"there": 2, "done": 1}
    assert grid.failure_of(FAILING, images) is None and not list((runs / "failed").iterdir())


def test_a_full_disk_fails_the_cell_and_loses_nothing(images, runs, monkeypatch):
    assert grid.run(CELLS[:2], data_dir=images)["done"] == 2
    before = stamps(runs)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert grid.run(CELLS[:3], data_dir=images) == {"there": 2, "failed": 1}
    assert stamps(runs) == before
    assert grid.run(CELLS[:3], data_dir=images) == {"there": 2, "done": 1}


def test_a_damaged_record_is_made_again(images, runs):
    grid.run(CELLS[:2], data_dir=images)
    path = grid.path_of(CELLS[1], images)
    whole = untimed(images)
    for damaged in (path.read_text()[:-200], path.read_text().replace('"n": 30', '"n": 300')):
        path.write_text(damaged)
        assert "to do   " + str(CELLS[1]) in grid.overview(CELLS[:2], images)
        assert grid.run(CELLS[:2], data_dir=images) == {"there": 1, "done": 1}
        assert untimed(images) == whole


def test_an_interruption_is_not_a_failure(images, runs, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            grid.run(CELLS[:1], data_dir=images)
    assert not (runs / "failed").exists()
    assert grid.run(CELLS[:1], data_dir=images)["done"] == 1  # and no lock was left


# ---- other executors


def test_threads_do_not_disturb_each_other(undisturbed, images):
    with ThreadPoolExecutor(3) as executor:
        assert grid.run(CELLS, executor, data_dir=images) == {"there": 0, "done": len(CELLS)}
    assert untimed(images) == undisturbed


def test_the_standard_process_pool(undisturbed, images):
    with ProcessPoolExecutor(
        2, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as executor:
        counts = grid.run([FAILING, *CELLS], executor, data_dir=images)
    assert counts == {"there": 0, "done": len(CELLS), "failed": 1}
    assert untimed(images) == undisturbed
    assert grid.failure_of(FAILING, images)["type"] == "TrainingError"


class Breaks(ThreadPoolExecutor):
    """An executor whose worker dies on the first call."""

    broken = False

    def submit(self, *arguments):
        if not self.broken:
            self.broken = True
            return super().submit(self.die)
        return super().submit(*arguments)

    def die(self):
        raise BrokenProcessPool("a process died")


def test_what_an_executor_loses_is_a_failure_of_that_cell(images):
    with Breaks(1) as executor:
        assert grid.run(CELLS[:2], executor, data_dir=images) == {"there": 0, "done": 1, "failed": 1}
    assert grid.failure_of(CELLS[0], images)["type"] == "BrokenProcessPool"


def test_jobs_are_processes_that_share_the_threads():
    with grid.executor(jobs=1) as executor:
        assert executor.submit(os.getpid).result() != os.getpid()
        assert executor.submit(torch.get_num_threads).result() == torch.get_num_threads()
    with pytest.raises(grid.GridError, match="0 jobs"), grid.executor(jobs=0):
        pass


def test_a_cell_whose_process_was_killed_is_tried_by_the_next_call(images, monkeypatch):
    with monkeypatch.context() as patch, grid.executor(jobs=1) as executor:
        patch.setattr(grid, "compute", kill_the_process)
        assert grid.run(CELLS[:1], executor, data_dir=images) == {"there": 0, "failed": 1}
    assert grid.failure_of(CELLS[0], images)["type"] == "BrokenProcessPool"
    assert grid.run(CELLS[:1], data_dir=images) == {"there": 0, "done": 1}


def kill_the_process(*_):
    os.kill(os.getpid(), signal.SIGKILL)


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import test_grid as t
t.torch.set_num_threads(1)
t.experiment.default_device = lambda: t.torch.device("cpu")
print(t.grid.run(t.CELLS, data_dir=sys.argv[2]))
"""


def test_a_grid_killed_three_times_gives_the_same_records(undisturbed, images, runs):
    start = [sys.executable, "-c", PROGRAM, os.path.dirname(__file__), images]
    kept = {}
    for finished in (0, 2, 5):
        process = subprocess.Popen(start)
        wait_until(lambda n=finished: len(stamps(runs)) >= n and (runs / "locks").exists(), process)
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it was done before it was killed"
        assert stamps(runs).items() >= kept.items()
        kept = stamps(runs)
    done = subprocess.run(start, capture_output=True, text=True, check=True).stdout
    assert f"'there': {len(kept)}" in done and f"'done': {len(CELLS) - len(kept)}" in done
    assert untimed(images) == undisturbed
    assert stamps(runs).items() >= kept.items()


def wait_until(condition, *alive, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert all(process.poll() is None for process in alive), "a process ended"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_worker_needs_few_packages(images):
    program = f"""
import sys
from ibau.study import grid
from ibau.study.cells import Cell
from ibau.study.settings import VictimSettings
from ibau.networks.training import TrainSettings
from ibau.unlearning.ibau import IBAUSettings
victim = VictimSettings("folder", width=0.125, training=TrainSettings(epochs=1), target=2)
cells = [Cell(victim), Cell(victim, "ibau", IBAUSettings(rounds=1, held_out=0), 20)]
assert grid.run(cells, data_dir={images!r})["done"] == 2
print(" ".join(sys.modules))
"""
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    others = {"matplotlib", "seaborn", "mlxtend", "nbformat", "papermill", "IPython", "dask", "distributed"}
    assert not others & set(loaded.stdout.split())


# ---- Dask


@pytest.fixture
def cluster(tmp_path, runs):
    """A scheduler's address, and its two worker processes, each with one thread and one GPU in name."""
    pytest.importorskip("distributed")
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    started, log = [], open(tmp_path / "dask.log", "w")

    def start(tool, *options):
        command = [sys.executable, "-m", f"distributed.cli.dask_{tool}", *options]
        started.append(subprocess.Popen(command, env=environ, stdout=log, stderr=log, cwd=tmp_path))
        return started[-1]

    file = tmp_path / "scheduler.json"
    scheduler = start(
        "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)
    )
    wait_until(file.exists, scheduler)
    address = json.loads(file.read_text())["address"]
    options = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--resources", "GPU=1")
    workers = [start("worker", address, *options) for _ in range(2)]
    yield address, workers
    for process in started:
        process.kill()
        process.wait()
    log.close()


def test_dask_over_tcp_with_a_worker_killed(undisturbed, images, runs, cluster):
    from distributed import Client

    address, workers = cluster
    with Client(address) as client:
        client.wait_for_workers(2, timeout=300)
    written, killed = {}, []

    def watch(future):
        """Note when each record was written, and kill one worker in the middle of a cell."""
        while not future.done():
            for name, when in stamps(runs).items():
                written.setdefault(name, set()).add(when)
            if len(written) >= 2 and not killed:
                killed.extend(kill_a_busy_one(runs, workers))
            time.sleep(0.005)

    with grid.executor(scheduler=address, gpu=True) as executor, ThreadPoolExecutor(1) as aside:
        running = aside.submit(grid.run, CELLS, executor, data_dir=images)
        watch(running)
        assert running.result() == {"there": 0, "done": len(CELLS)}
    assert killed and killed[0].wait() == -signal.SIGKILL
    assert untimed(images) == undisturbed
    final = stamps(runs)
    assert len(final) == len(CELLS)
    for name, when in final.items():
        assert written.get(name, set()) <= {when}, f"{name} was made twice"


def kill_a_busy_one(runs, workers):
    """Kill the worker that holds the lock of a record that is not there yet; that worker, if there is one."""
    for lock in (runs / "locks").glob("*.lock"):
        busy = [worker for worker in workers if str(lock) in open_files(worker.pid)]
        if busy and f"{lock.stem}.json" not in stamps(runs):
            busy[0].kill()
            return busy
    return []


def open_files(pid):
    links = [os.path.join(f"/proc/{pid}/fd", number) for number in os.listdir(f"/proc/{pid}/fd")]
    return {os.readlink(link) for link in links if os.path.islink(link)}


def test_a_scheduler_that_is_not_there_is_named(monkeypatch):
    with (
        pytest.raises(grid.GridError, match="GPU is a resource of Dask's workers"),
        grid.executor(2, gpu=True),
    ):
        pass
    dask = pytest.importorskip("dask")
    with dask.config.set({"distributed.comm.timeouts.connect": "0.2s"}):
        with pytest.raises(grid.GridError, match="no Dask scheduler at tcp://127.0.0.1:9: "):
            with grid.executor(scheduler="tcp://127.0.0.1:9"):
                pass
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(grid.GridError, match="pip install 'ibau.cluster.'"), grid.executor(scheduler="x"):
        pass


# ---- the command


@pytest.fixture
def sweep(monkeypatch):
    """The sweep "tiny"."""
    monkeypatch.setattr("ibau.study.cells.SWEEPS", {"tiny": Sweep(())})
    monkeypatch.setattr(Sweep, "cells", lambda *_: [FAILING, *CELLS[:2]])


def test_a_dry_run_says_what_would_be_done(sweep, images, runs, capsys):
    command = ["grid", "--dataset", "folder", "--data", images, "--dry-run"]
    assert cli.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        *(f"to do   {cell}" for cell in (FAILING, *CELLS[:2])),
        "3 cells: 0 there, 3 to do",
    ]
    assert not runs.exists()
    grid.run([FAILING, CELLS[0]], data_dir=images)
    before = stamps(runs)
    assert cli.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"failed  {FAILING}: TrainingError: the loss became")
    assert lines[1:3] == [f"there   {CELLS[0]}", f"to do   {CELLS[1]}"]
    assert lines[3] == "3 cells: 1 there, 2 to do"
    assert stamps(runs) == before


def test_the_command_runs_the_cells_and_publishes_them(sweep, images, runs, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "figures_dir", lambda: tmp_path / "figures")
    command = ["grid", "--sweep", "tiny", "--dataset", "folder", "--data", images, "--publish"]
    assert cli.main(command) == 1
    said = capsys.readouterr()
    assert said.out.splitlines()[-2:] == ["2 records are in figures/data", "0 there, 2 done, 1 failed"]
    assert "3/3 cells" in said.err
    (published,) = Records().defences()
    assert published == read_record(grid.path_of(CELLS[1], images))
    assert len(Records().victims()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sweep", "six"], "no sweep 'six'; there are single-target"),
        (["--defence", "anp"], "no defence 'anp'"),
        (["--seeds", "0"], "0 seeds"),
        (["--jobs", "0"], "0 jobs"),
        (["--gpu"], "name their scheduler"),
        (["--profile", "fast"], "unknown profile 'fast'"),
        (["--dataset", "folder", "--data", "."], "train"),
    ],
)
def test_wrong_calls_are_refused(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["grid", *options]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_an_interrupted_command_says_how_to_go_on(capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(grid, "run", interrupted)
    assert cli.main(["grid"]) == 130
    assert "The same command goes on" in capsys.readouterr().err


def test_seeds_go_on_from_the_first():
    cells = choose(["multi-target"], "quick", "", 2, first=3, only=["none", "ibau"])
    assert {(cell.seed, cell.victim.seed) for cell in cells} == {(3, 3), (4, 4)} and len(cells) == 8
