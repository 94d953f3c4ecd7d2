"""The bench compares like with like, and a short run of it writes its tables."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from benchmarks import speed
from benchmarks.textbook import textbook
from ibau.networks.training import TrainSettings
from ibau.study.settings import Profile
from ibau.unlearning import authors, common, ibau
from ibau.unlearning.ibau import IBAUSettings


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_both_steps_are_the_same_step(precision):
    random = speed._random(0.125, 20)
    weights = [w.clone() for w in random[0].parameters()]
    settings = IBAUSettings(K=3, tol=0.0, precision=precision)
    fast, plain = (speed.stepper(*random, settings, how)() for how in (speed.FAST, speed.PLAIN))
    assert speed._difference(fast, plain) < 1e-3
    assert all(torch.equal(a, b) for a, b in zip(weights, random[0].parameters(), strict=True))


def test_the_textbook_lasts_no_longer_than_its_context():
    patched = (
        (ibau, "implicit_hypergradient"),
        (authors, "implicit_hypergradient"),
        (common, "cheapen"),
        (common, "takes_channels_last"),
    )
    before = [getattr(*what) for what in patched]
    with textbook():
        assert not any(getattr(*what) is was for what, was in zip(patched, before, strict=True))
    assert [getattr(*what) for what in patched] == before


def test_the_authors_recipe_is_the_same_the_textbook_way():
    random = speed._random(0.125, 120)
    once = authors.AuthorsSettings()
    fast = authors.authors(*random, once)
    with textbook():
        plain = authors.authors(*random, once)
    assert torch.allclose(fast.deltas[0], plain.deltas[0], atol=1e-5)
    for key in ("outer_loss", "implicit_over_direct"):
        assert fast.history[0][key] == pytest.approx(plain.history[0][key], rel=1e-2)


def test_ratios_are_of_neighbours(monkeypatch):
    clock = iter([0.0, 1, 1, 4, 4, 6, 6, 8])  # 1 s and 3 s, then 2 s and 2 s
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    first, second = speed._compared({"K": 5}, {"a": lambda: None, "b": lambda: None}, 2)
    assert (first["median"], second["median"], first["K"]) == (1.5, 2.5, 5)
    assert (first["ratio_median"], first["ratio_min"], first["ratio_max"]) == (2, 1, 3)


def test_a_short_run_writes_every_table(tmp_path, monkeypatch):
    effort = Profile("mnist5k", 100, 0.125, TrainSettings(epochs=1))
    monkeypatch.setattr(speed, "profile", lambda *_: effort)
    # At so hardly trained a network delta is no maximiser, the series diverges, and ours keeps its best part.
    monkeypatch.setattr(speed, "SERIES", replace(speed.SERIES, phi_step=1e-3))
    monkeypatch.setenv("IBAU_RUNS", str(tmp_path / "runs"))
    speed.main(["--quick", "--repeats", "1", "--large", "0", "--out", str(tmp_path)])
    for name in speed.TABLES:
        table = pd.read_csv(tmp_path / f"speed_{name}.csv")
        assert len(table) >= 1
        assert {"device", "threads", "torch", "commit", "date"} <= set(table.columns)
    steps = pd.read_csv(tmp_path / "speed_step.csv")
    assert (steps["median"] > 0).all()
    assert (steps["difference"].dropna() < 1e-2).all()


def test_a_table_keeps_the_rows_of_other_data_sets(tmp_path):
    file = tmp_path / "speed_effect.csv"
    for dataset, seconds in (("mnist5k", 3.0), ("cifar10", 2.0), ("mnist5k", 1.0)):
        speed.write(pd.DataFrame([{"median": seconds}]), file, dataset)
    table = pd.read_csv(file)
    assert dict(zip(table["dataset"], table["median"], strict=True)) == {"cifar10": 2.0, "mnist5k": 1.0}


def test_repeats_must_be_positive():
    with pytest.raises(SystemExit):
        speed.main(["--repeats", "0"])
