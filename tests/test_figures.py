"""Tables say what the records say, and the README says what the tables say."""

import copy

import pytest
import torch

from ibau import experiments, figures


def rate(value, n=1000):
    return {"value": value, "n": n, "low": value - 0.01, "high": value + 0.01}


def record(seed=0, acc=0.9):
    measured = {"acc": rate(acc), "asr": rate(0.5), "ra": rate(0.4)}
    victim = {
        "dataset": "somewhere",
        "attack": "badnets",
        "train_images": 100,
        "training": {"epochs": 3},
        "seed": seed,
    }
    about = {
        "victim": victim,
        "defence": "ibau",
        "clean_images": 10,
        "defence_settings": {"K": 5},
        "seed": seed,
    }
    return {"settings": about, "before": measured, "after": {**measured, "der": rate(0.75)}}


def test_one_seed_shows_its_interval_and_several_their_spread():
    one = figures.results_table([record()]).iloc[0]
    assert (one["seeds"], one["ACC before"]) == (1, "90.0 [89.0, 91.0]")
    two = figures.results_table([record(0, 0.9), record(1, 0.8)]).iloc[0]
    assert (two["seeds"], two["ACC before"]) == (2, "85.0 ± 7.1")


def test_other_settings_are_other_rows():
    other = copy.deepcopy(record())
    other["settings"]["clean_images"] = 20
    assert len(figures.results_table([record(), other])) == 2
    assert figures.results_table([]).empty


def test_published_records_carry_what_they_must():
    found = experiments.recorded()
    assert {r["settings"]["victim"]["dataset"] for r in found} == {"mnist5k", "cifar10", "gtsrb"}
    for r in found:
        assert {"device", "threads", "torch", "commit", "date"} <= r["provenance"].keys()
        assert r["settings"]["victim"]["data"], "the data's fingerprint"
        assert r["before"]["asr"]["n"] == r["after"]["asr"]["n"] < r["before"]["acc"]["n"]
        assert len(r["curve"]) == len(r["history"]) + 1
        assert (
            max(h["delta_norm"] for h in r["history"]) <= 1.0001 * r["settings"]["defence_settings"]["radius"]
        )


def test_the_readme_shows_the_recorded_results(root, tmp_path):
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert figures.results_markdown(experiments.recorded()) in readme
    stale = tmp_path / "README.md"
    stale.write_text("a\n<!-- results: x -->\nold\n<!-- end of results -->\nb\n", encoding="utf-8")
    figures.write_readme(stale)
    assert "old" not in stale.read_text(encoding="utf-8")
    assert stale.read_text(encoding="utf-8").endswith("<!-- end of results -->\nb\n")


@pytest.mark.parametrize("scale", [0.0, 1e-3, 5.0])
def test_a_perturbation_is_shown_inside_the_picture_range(scale):
    shown = figures.signed(scale * torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert shown.min() >= 0 and shown.max() <= 1
    assert figures.signed(torch.zeros(3, 2, 2)).eq(0.5).all()
