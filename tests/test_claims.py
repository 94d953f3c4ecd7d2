"""Tables say of a cell what was measured, or that it was not run; claims are judged by their rules."""

import math
from dataclasses import replace

import pandas as pd
import pytest

from ibau.report import claims, frame, readme, tables
from ibau.report.claims import CLAIMS, FAILS, HOLDS, PARTLY, UNDECIDED, UNMEASURED, Evidence
from ibau.report.frame import BASELINES, COLUMNS, IBAU, IBAU_PLUS, UNDEFENDED
from ibau.study.records import Records

VERDICTS = {HOLDS, PARTLY, FAILS, UNDECIDED, UNMEASURED}


def row(defence=IBAU, attack="BadNets", acc=70.0, asr=5.0, **other):
    """A run cell of a `frame`; of a model that had 72 / 99 percent."""
    measured = {
        "acc_before": 72.0,
        "acc": acc,
        "change": acc - 72,
        "asr_before": 99.0,
        "asr": asr,
        "ra": 60.0,
    }
    asked = {
        "dataset": "cifar10",
        "attack": attack,
        "defence": defence,
        "ratio": 20.0,
        "clean": 5000,
        "seed": 0,
    }
    took = {
        "der": 90.0,
        "seconds": 10.0,
        "memory_mb": 900.0,
        "device": "a CPU, 1 thread",
        "to_effect": math.nan,
    }
    return {**asked, "run": True, **measured, **took, **other}


def missing(**asked):
    full = row(**asked)
    return {name: full[name] for name in frame.ASKED} | {"run": False}


def rows(*lines):
    return pd.DataFrame(lines, columns=COLUMNS).astype({"device": object})


def undefended(attack="BadNets", **other):
    nothing = {"seconds": None, "memory_mb": None, "device": None, "der": None}
    return {**row(UNDEFENDED, attack, 72.0, 99.0, **nothing), **other}


# ---- goals


@pytest.mark.parametrize(
    ("change", "asr", "clean", "missed"),
    [
        (-2.0, 10.0, 5000, False),
        (-2.04, 10.04, 5000, False),  # as it is shown
        (-2.1, 0.0, 5000, True),
        (0.0, 10.1, 5000, True),
        (-5.0, 20.0, 100, False),
        (0.0, 20.1, 100, True),
        (-1.0, None, 5000, False),
        (-1.1, None, 5000, True),
        (-5.0, None, 100, False),
    ],
)
def test_the_goal(change, asr, clean, missed):
    (shown,) = rows(row(change=change, asr=asr, clean=clean)).itertuples()
    assert frame.good(shown) is not missed


def test_the_published_records_are_found_by_the_grids_cells():
    """Every published victim of the tables' settings is somebody's undefended cell."""
    shown = frame.recorded("single-target", "quick", "mnist5k")
    found = shown[(shown["defence"] == UNDEFENDED) & (shown["seed"] == 0)].set_index("attack")
    for record in Records().victims():
        about, label = record["settings"], frame.attack_label(record["settings"])
        if (about["dataset"], about["seed"]) == ("mnist5k", 0) and label in found.index:
            assert found.loc[label, "acc"] == 100 * record["measured"]["acc"]["value"]
    assert found["run"].all()


# ---- what they show


def test_seeds_come_together_and_a_single_miss_of_the_mean_counts():
    shown = rows(
        row(asr=1.0), row(asr=13.0, seed=1), row(asr=21.0, seed=2, attack="Blend"), missing(attack="Smooth")
    )
    means = frame.over_seeds(shown).set_index("attack")
    assert means.loc["BadNets", ["asr", "n", "good"]].tolist() == [7.0, 2, True]
    assert means.loc["Blend", ["n", "good"]].tolist() == [1, False]
    assert means.loc["Smooth", "n"] == 0 and means.loc["Smooth", "good"] is None
    assert list(means.index) == ["BadNets", "Blend", "Smooth"]


def test_the_table_of_rates_marks_misses_and_what_was_not_run():
    shown = rows(
        undefended(),
        row("NAD", asr=10.1),
        row(),
        row(seed=1),
        undefended("clean", asr=None, asr_before=None),
        missing(defence="NAD", attack="clean"),
        row(attack="clean", acc=70.9, asr=None),
        missing(defence="TABOR"),
        missing(defence="DP-SGD"),
    )
    table = tables.rates_table(shown)
    assert tables.left_out(shown) == "Not run: TABOR, DP-SGD." and tables.left_out(shown[:-2]) == ""
    assert list(table.columns) == [UNDEFENDED, "NAD", IBAU]
    assert table.loc["BadNets"].tolist() == ["72.0 / 99.0", "70.0 / 10.1*", "70.0 / 5.0 (n = 2)"]
    assert table.loc["clean"].tolist() == ["72.0", "not run", "70.9*"]


def test_the_table_can_go_along_another_column():
    shown = rows(row(clean=500), row(clean=100, asr=20.0), missing(defence="NAD", clean=500))
    table = tables.rates_table(shown, "clean")
    assert list(table.index) == [500, 100] and table.loc[100, IBAU] == "70.0 / 20.0"


def test_the_summary_counts_attacked_models():
    shown = rows(
        undefended(),
        row(),
        row(attack="Blend", asr=30.0),
        row(attack="clean", asr=None),
        missing(defence="NAD"),
    )
    summary = tables.summary(shown)
    assert summary.loc[IBAU, ["run", "goal met", "mean ASR", "largest ASR"]].tolist() == [
        "2 of 2",
        "1 of 2",
        "17.5",
        "30.0 (Blend)",
    ]
    assert summary.loc["NAD"].tolist() == ["0 of 1", "", "", "", "", "", ""]
    assert summary.loc[UNDEFENDED, ["mean ASR", "goal met"]].tolist() == ["99.0", ""]


def test_beside_the_best_needs_three_baselines():
    lines = [row(name, der=80.0 + i) for i, name in enumerate(BASELINES[:3])]
    pairs = tables.beside_best(rows(row(der=81.0), *lines, row("Fine-tuning", der=99.0)))
    assert pairs[["own", "best", "baselines"]].values.tolist() == [[81.0, 82.0, 3]]
    assert tables.beside_best(rows(row(), *lines[:2])).empty
    assert tables.beside_best(rows(*lines)).empty


def test_ratios_compare_the_same_model_and_device_only():
    shown = rows(
        row(seconds=10.0),
        row("NAD", seconds=25.0, asr=50.0),
        row("TABOR", seconds=99.0, device="a GPU, 1 thread"),
        row("TABOR", seconds=99.0, seed=1),
        missing(defence="DP-SGD"),
    )
    times = tables.ratios(shown).set_index("defence")
    assert times["times"].to_dict() == {IBAU: 1.0, "NAD": 2.5}
    assert times["good"].to_dict() == {IBAU: True, "NAD": False}


def test_values_at_which_nothing_was_run_are_told_apart():
    blind = [row("DeepInspect", clean=size) for size in (100, 250, 5000)]
    shown = rows(row(clean=5000), row("NAD", clean=100), missing(clean=250), *blind)
    ran, left = frame.where_run(shown, "clean")
    assert left == [250] and set(ran["clean"]) == {100, 5000} and len(ran) == 4


def test_words_hold_the_frames_numbers():
    shown = rows(row(), row("NAD", asr=50.0), missing(defence="TABOR"))
    words = tables.in_words(shown)
    assert "2 of 3 defended cells were run" in words
    assert "Not run: TABOR." in words
    assert "I-BAU 1 of 1, NAD 0 of 1" in words and "that of I-BAU" in words
    assert "On no model were both I-BAU and" in words and "On no model were both I-BAU+ and" in words
    best = [row(name, der=80.0) for name in BASELINES[:3]]
    words = tables.in_words(rows(row(), row(IBAU_PLUS, der=79.0), *best))
    higher = (
        "On 1 models {} and three or more of the six baselines were run: its DER is higher than their best"
    )
    assert f"{higher.format('I-BAU')} one's on 1, and no more than 2 points lower on 1" in words
    assert f"{higher.format('I-BAU+')} one's on 0, and no more than 2 points lower on 1" in words
    assert tables.in_words(rows(missing())).startswith("0 of 1 defended cells")


def test_only_profiles_with_a_defence_are_shown():
    for dataset in ("mnist5k", "cifar10"):
        for shown in frame.recorded_at("single-target", dataset).values():
            assert shown["seconds"].notna().any()
    with pytest.raises(KeyError):
        frame.recorded_at("nothing", "mnist5k")


# ---- claims


THEORY = ["claim", "case", "n", "measured", "bound", "whole"]
RUNS = ["dataset", "attack", "rounds", "outer_steps", "seed", "method"]
MEASURED = ["asr_after", "acc_after", "asr_rise", "acc_fall", "contraction", "residual"]


def evidence(theory=(), implicit=(), cells=(), sweep="single-target", profile="desk"):
    shown = rows(*cells).assign(sweep=sweep, profile=profile)
    return Evidence(
        pd.DataFrame(theory, columns=THEORY),
        pd.DataFrame(implicit, columns=[*RUNS, *MEASURED]),
        shown,
    )


def verdict(name, found):
    answer, number = CLAIMS[name].judge(found)
    assert answer in VERDICTS and number
    return answer


@pytest.mark.parametrize("name", CLAIMS)
def test_without_evidence_nothing_is_measured(name):
    assert verdict(name, evidence()) == UNMEASURED
    assert verdict(name, evidence(cells=[missing(), missing(defence="NAD")])) == UNMEASURED


def models(n, **other):
    """Cells of n attacked models."""
    return [row(seed=0, attack=f"attack {i}", **other) for i in range(n)]


@pytest.mark.parametrize(
    ("good", "expected"), [(10, HOLDS), (9, HOLDS), (8, PARTLY), (5, PARTLY), (4, FAILS)]
)
def test_c1_counts_models_at_the_goal(good, expected):
    cells = models(10)
    for cell in cells[good:]:
        cell["asr"] = 10.1
    found = evidence(cells=[*cells, row(attack="clean", asr=None, acc=50.0)])
    assert verdict("C1", found) == expected
    assert f"{good} of 10" in claims.c1(found)[1]


def test_c2_wants_every_step_and_every_term():
    steps = [["C2", f"d{i}", 40, 0.01, 0.02, True] for i in range(3)]
    assert verdict("C2", evidence(steps)) == HOLDS
    assert verdict("C2", evidence([*steps, ["C2", "d", 40, 0.01, 0.02, False]])) == PARTLY
    assert verdict("C2", evidence([*steps, ["C2", "d", 40, 0.03, 0.02, True]])) == FAILS


def runs(seeds=5, **differences):
    """Runs of three methods on the same victims; `differences` to fp5's values, as {method}_{value}."""
    spread = (-0.2, -0.1, 0.0, 0.1, 0.2)
    base = {"asr_after": 20.0, "acc_after": 97.0, "asr_rise": 1.0, "acc_fall": 0.5}
    lines = []
    for seed in range(seeds):
        for method in ("direct", "fp5", "naive"):
            values = {k: v + differences.get(f"{method}_{k}", 0) for k, v in base.items()}
            if method != "fp5":
                values = {k: v + spread[seed] for k, v in values.items()}
            lines.append(["d", "a", 6, 10, seed, method, *values.values(), 0.9, 0.5])
    return lines


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ({}, FAILS),
        ({"direct_asr_after": 5}, PARTLY),  # the term lowers ASR
        ({"direct_acc_after": -5}, PARTLY),  # the term raises ACC
        ({"direct_asr_after": -5}, FAILS),
        ({"naive_asr_rise": 5}, PARTLY),
        ({"naive_acc_fall": 0.5}, FAILS),  # sure, and too small to matter
        ({"naive_acc_fall": 0.9}, UNDECIDED),  # the interval reaches a point
        ({"naive_asr_rise": -5}, FAILS),
        ({"direct_asr_after": 5, "naive_acc_fall": 5}, HOLDS),
    ],
)
def test_c3_wants_a_use_of_the_term_and_an_unstable_heuristic(differences, expected):
    assert verdict("C3", evidence(implicit=runs(**differences))) == expected


def test_c3_needs_three_victims_and_a_sure_difference():
    assert verdict("C3", evidence(implicit=runs(2, direct_asr_after=5))) == UNMEASURED
    wide = runs(3, direct_asr_after=5)
    for line, shift in zip((line for line in wide if line[5] == "direct"), (-40, 0, 40), strict=True):
        line[6] += shift  # its ASR
    assert verdict("C3", evidence(implicit=wide)) == UNDECIDED


def test_the_interval_is_students():
    mean, low, high = claims._difference(
        pd.DataFrame(runs(), columns=[*RUNS, *MEASURED]), "asr_after", "direct", "fp5"
    )
    half = 2.776 * math.sqrt(0.025) / math.sqrt(5)
    assert (mean, low, high) == pytest.approx((0.0, -half, half), abs=1e-4)


def test_c4_wants_bounds_on_the_toy_and_a_contraction_on_networks():
    bounds = [["C4", f"T = {i}", 60, 0.5, 1.0, True] for i in range(3)]
    assert verdict("C4", evidence(bounds, runs())) == HOLDS
    assert verdict("C4", evidence(bounds)) == PARTLY
    diverging = [[*line[:-2], 1.1, 0.9] for line in runs()]
    assert verdict("C4", evidence(bounds, diverging)) == PARTLY
    assert verdict("C4", evidence([*bounds, ["C4", "T", 60, 1.1, 1.0, True]], runs())) == FAILS


def test_c5_wants_bounds_that_say_something():
    linear = [["C5", "linear", n, 0.1, bound, True] for n, bound in ((500, 1.5), (4000, 0.6))]
    network = [["C5", "network", n, 0.1, bound, True] for n, bound in ((500, 9.0), (4000, 6.0))]
    assert verdict("C5", evidence(linear)) == HOLDS
    answer, number = claims.c5(evidence(linear + network))
    assert answer == PARTLY and "network: gap 0.100, bound 6.00 at 4,000 images" in number
    assert verdict("C5", evidence([*linear, ["C5", "linear", 60, 0.9, 0.8, True]])) == FAILS


def contest(ours, theirs=90.0, **other):
    """I-BAU with this DER on one model, and three baselines of which the best has `theirs`."""
    lines = [row(name, der=theirs - i, **other) for i, name in enumerate(BASELINES[:3])]
    return [row(der=ours, **other), *lines]


def test_c6_compares_with_the_best_baseline_of_each_model():
    def found(*ders):
        sets = ("cifar10", "gtsrb")
        cells = [contest(der, dataset=sets[i % 2], attack=f"a{i}") for i, der in enumerate(ders)]
        return evidence(cells=sum(cells, []))

    assert verdict("C6", found(*[91] * 9, 88)) == HOLDS
    assert verdict("C6", found(*[91] * 5, *[88] * 5)) == PARTLY  # comparable, not more often better
    assert verdict("C6", found(*[91] * 8, 87.9, 87.9)) == PARTLY
    assert verdict("C6", found(91, 80, 80)) == FAILS
    assert verdict("C6", found(*[91] * 9)) == PARTLY  # four attacks on one data set are too few
    assert "9 of 18 baseline cells" in claims.c6(found(91, 91, 88))[1]


def axis(sweep, ours, theirs, n=4, **fixed):
    """Cells of n models: how many of them each gets to the goal."""
    cells = []
    for i in range(n):
        varied = {"poison-ratio": {"ratio": 5.0 + i}, "clean-size": {"clean": 100 + i}}.get(sweep, {})
        about = {"attack": f"a{i}", **varied, **fixed}
        cells += [
            row(asr=5.0 if i < ours else 90.0, **about),
            row("NAD", asr=5.0 if i < theirs else 90.0, **about),
        ]
    return rows(*cells).assign(sweep=sweep, profile="desk")


def test_c7_is_judged_axis_by_axis():
    def found(*axes):
        return replace(evidence(), cells=pd.concat([axis(*a) for a in axes], ignore_index=True))

    single, poison, clean = "single-target", "poison-ratio", "clean-size"
    assert verdict("C7", found((single, 3, 2), (poison, 2, 2), (clean, 4, 0))) == HOLDS
    assert verdict("C7", found((single, 3, 2), (poison, 1, 2), (clean, 4, 0))) == PARTLY
    assert verdict("C7", found((single, 3, 2))) == PARTLY  # two axes were not compared
    assert verdict("C7", found((single, 1, 2), (poison, 1, 2))) == FAILS
    assert "attack: I-BAU 3, NAD 2 of 4" in claims.c7(found((single, 3, 2)))[1]
    usual = found((single, 3, 2)).cells.assign(sweep=poison)
    assert verdict("C7", replace(evidence(), cells=usual)) == UNMEASURED  # 20% is the attack axis again
    tuned = found((single, 1, 2)).cells.replace({"defence": {"NAD": "Fine-tuning"}})
    assert verdict("C7", replace(evidence(), cells=tuned)) == FAILS
    one_ratio = replace(evidence(), cells=axis(poison, 4, 0, ratio=20.0))
    assert verdict("C7", one_ratio) == UNMEASURED  # nothing varies along that axis
    blind = found((clean, 4, 0)).cells.replace({"defence": {"NAD": "DeepInspect"}})
    assert verdict("C7", replace(evidence(), cells=blind)) == UNMEASURED  # it sees no clean image


def timed(ours, *others, asr=5.0, **about):
    lines = [row(name, to_effect=s, asr=asr, **about) for name, s in zip(BASELINES, others, strict=False)]
    return [row(to_effect=ours, **about), *lines]


def test_c8_takes_the_baseline_that_is_first_to_take_effect():
    never = math.inf
    assert verdict("C8", evidence(cells=timed(1.0, 13.0, 20.0, never))) == HOLDS
    assert verdict("C8", evidence(cells=timed(1.0, 12.9, 20.0, 30.0))) == PARTLY
    assert verdict("C8", evidence(cells=timed(1.0, 1.9, 20.0, 30.0))) == FAILS
    assert verdict("C8", evidence(cells=timed(1.0, never, never, never))) == HOLDS
    assert verdict("C8", evidence(cells=timed(never, 5.0, never, never))) == FAILS
    answer, number = claims.c8(evidence(cells=timed(1.0, 0.5, 20.0, 30.0)))
    assert answer == FAILS and number.startswith("time to effect of the fastest baseline: 0.5 times")
    assert verdict("C8", evidence(cells=timed(1.0, 13.0, 20.0))) == UNMEASURED  # two baselines are too few
    elsewhere = [row(to_effect=1.0, device="a GPU, 1 thread"), *timed(1.0, 20.0, 20.0, 20.0)[1:]]
    assert verdict("C8", evidence(cells=elsewhere)) == UNMEASURED


def test_c8_names_whole_runs_that_meet_the_goal_beside_it():
    cells = [one | {"seconds": one["to_effect"] * 2} for one in timed(1.0, 0.5, 20.0, 30.0)]
    cells[1]["asr"] = 99.0  # the fastest one removes nothing in the end
    assert claims.c8(evidence(cells=cells))[1].endswith(
        "; whole runs: 20.0 times as long (20.0 to 20.0 on 1 models)"
    )
    for one in cells:
        one["to_effect"] = math.nan  # as of older records
    answer, number = claims.c8(evidence(cells=cells))
    assert answer == UNMEASURED and number.startswith("time to effect not measured; whole runs: 20.0 times")


def test_c9_wants_every_baseline_to_fail():
    def found(ours, theirs):
        return replace(evidence(), cells=axis("clean-size", ours, theirs, clean=100))

    assert verdict("C9", found(4, 0)) == HOLDS
    assert verdict("C9", found(4, 1)) == PARTLY
    assert verdict("C9", found(2, 1)) == PARTLY
    assert verdict("C9", found(2, 2)) == FAILS
    assert verdict("C9", found(1, 0)) == FAILS


def test_c9_asks_nothing_of_defences_that_see_no_clean_images():
    blind = axis("clean-size", 4, 4, clean=100).replace({"defence": {"NAD": "DP-SGD"}})
    assert verdict("C9", replace(evidence(), cells=blind)) == UNMEASURED


def every_sweep(defence):
    """Evidence on which C1 and C6 to C9 hold for the algorithm of this label, and the theory of C2."""
    axes = [axis(name, 4, 0, clean=100) for name in ("single-target", "poison-ratio", "clean-size")]
    contests = [contest(95.0, dataset=d, attack=f"b{i}") for d in ("cifar10", "gtsrb") for i in range(5)]
    race = timed(1.0, 13.0, 20.0, 30.0, attack="c")
    single = rows(*sum(contests, []), *race).assign(sweep="single-target", profile="desk")
    cells = pd.concat([*axes, single], ignore_index=True).replace({"defence": {IBAU: defence}})
    return replace(evidence([["C2", "d", 40, 0.01, 0.02, True]]), cells=cells)


def test_records_of_ours_are_no_verdict_on_the_paper():
    on_cells = ["C1", "C6", "C7", "C8", "C9"]
    papers, ours = (claims.judged(every_sweep(label)) for label in (IBAU, IBAU_PLUS))
    assert UNMEASURED not in set(papers.loc[on_cells, "here"])
    assert set(papers.loc[on_cells, "I-BAU+, ours"]) == {"–"}
    assert set(ours.loc[on_cells, "here"]) == {UNMEASURED} and set(ours.loc[on_cells, "measured"]) == {"–"}
    assert "–" not in set(ours.loc[on_cells, "I-BAU+, ours"])
    assert "I-BAU+ 4, NAD 0 of 4" in ours.loc["C7", "I-BAU+, ours"]
    assert papers.loc["C2"].equals(ours.loc["C2"]) and ours.loc["C2", "I-BAU+, ours"] == "–"
    said = readme.claims_markdown(evidence(cells=[row(IBAU_PLUS), missing(defence=IBAU)]))
    assert said.endswith("\n\nNot run: I-BAU.")


def test_an_algorithm_is_no_baseline():
    assert len(BASELINES) == 6 and not {IBAU, IBAU_PLUS, "Fine-tuning"} & set(BASELINES)


def test_the_table_has_a_row_a_claim_and_is_the_readmes(root):
    found = claims.gather()
    table = claims.judged(found)
    assert list(table.index) == [f"C{i}" for i in range(1, 10)]
    assert set(table["here"]) <= VERDICTS
    assert readme.claims_markdown(found) in (root / "README.md").read_text(encoding="utf-8")
    for numbers in table["notebook"]:
        for number in numbers.split(", "):
            assert list((root / "notebooks").glob(f"{number}_*.ipynb")), f"no notebook {number}"


def test_profiles_do_not_mix():
    desk, paper = (rows(row(asr=asr)).assign(profile=p) for p, asr in (("desk", 50.0), ("paper", 1.0)))
    both = pd.concat([desk, paper], ignore_index=True).assign(sweep="single-target")
    means = replace(evidence(), cells=both).of("single-target")
    assert means.set_index("profile")["asr"].to_dict() == {"desk": 50.0, "paper": 1.0}
