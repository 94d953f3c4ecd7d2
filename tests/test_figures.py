"""Tables say what the records say, and the README says what the tables say."""

import copy
import json
import math
from dataclasses import asdict, replace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from ibau.attacks import ALL_TO_ALL, ATTACKS, Trigger, badnets, blend
from ibau.defences import DEFENCES
from ibau.report import figures, frame, readme, tables
from ibau.study.cells import NONE, SWEEPS, Cell, settings_for
from ibau.study.records import Records, figures_dir
from ibau.study.settings import PROFILES, STANDARD, standard_victims


def rate(value, n=1000):
    return {"value": value, "n": n, "low": value - 0.01, "high": value + 0.01}


def record(seed=0, acc=0.9, defence="ibau_plus", train_images=100, **settings):
    measured = {"acc": rate(acc), "asr": rate(0.5), "ra": rate(0.4)}
    victim = {
        "dataset": "somewhere",
        "attack": "badnets",
        "target": 8,
        "strength": None,
        "poison_ratio": 0.2,
        "train_images": train_images,
        "training": {"epochs": 3},
        "seed": seed,
    }
    about = {
        "victim": victim,
        "defence": defence,
        "version": DEFENCES[defence].version,
        "clean_images": 10,
        "defence_settings": {**asdict(DEFENCES[defence].settings()), **settings},
        "seed": seed,
    }
    curve = [{"round": i, **measured} for i in range(3)]
    took = {"seconds": 7.0, "peak_memory_mb": 800.0, "provenance": {"device": "a CPU", "threads": 1}}
    after = {**measured, "der": rate(0.75)}
    return {"settings": about, "before": measured, "after": after, "curve": curve, **took}


def test_published_records_carry_what_they_must():
    found = Records().defences()
    assert {r["settings"]["victim"]["dataset"] for r in found} == {"mnist5k", "cifar10", "gtsrb"}
    for r in found:
        assert {"device", "threads", "torch", "commit", "date"} <= r["provenance"].keys()
        assert r["settings"]["victim"]["data"], "the data's fingerprint"
        if r["before"]["asr"] is None:
            assert r["settings"]["victim"]["attack"] == "none"
        else:
            assert r["before"]["asr"]["n"] == r["after"]["asr"]["n"] <= r["before"]["acc"]["n"] * 7


def test_published_records_of_both_algorithms_keep_to_their_settings():
    for name in ("ibau", "ibau_plus"):
        fields = set(asdict(DEFENCES[name].settings()))
        for r in Records().defences(name):
            settings = r["settings"]["defence_settings"]
            assert set(settings) == fields, "a record of the other algorithm"
            assert len(r["curve"]) in (0, len(r["history"]) + 1)
            for line in r["history"]:
                if "area" in line:
                    share = line["area"] / 1024
                    assert settings["least_area"] * 0.999 <= share <= settings["most_area"] * 1.001
                elif "recovery" not in line:
                    assert line["delta_norm"] <= 1.0001 * settings["radius"]


def changed(record, label="BadNets", acc=0.0, asr=0.05, clean=500):
    """A copy of `record` of the labelled attack, ACC changed by `acc`, ending at this ASR."""
    new = copy.deepcopy(record)
    attack, target = ("none", 0) if label == "clean" else STANDARD[label]
    new["settings"]["victim"] |= {"attack": attack, "target": target}
    new["settings"]["clean_images"] = clean
    new["after"]["acc"] = rate(new["before"]["acc"]["value"] + acc)
    new["after"]["asr"] = None if label == "clean" else rate(asr)
    return new


def removal(records, defence="ibau_plus"):
    return tables.removal_table(frame.of_records(frame.usual(records, defence)))


def test_the_removal_table_marks_every_miss_and_leaves_out_what_was_not_run():
    cells = [
        ("clean", -0.01, 0, "-1.0"),
        ("BadNets", -0.02, 0.1, "-2.0 / 10.0"),
        ("Blend", -0.021, 0.02, "-2.1 / 2.0*"),
        ("l0-inv", 0.01, 0.101, "+1.0 / 10.1*"),
    ]
    table = removal([changed(record(), label, acc, asr) for label, acc, asr, _ in cells])
    assert table["somewhere, 500 clean"].to_dict() == {label: shown for label, *_, shown in cells}
    [worse] = removal([changed(record(), "clean", -0.011)]).loc["clean"]
    assert worse == "-1.1*"
    sizes = [changed(record(), clean=500), changed(record(), "Blend", clean=100)]
    assert removal(sizes)["somewhere, 500 clean"].tolist() == ["+0.0 / 5.0", "not run"]


def test_few_clean_images_have_goals_of_their_own():
    few = [changed(record(), "BadNets", -0.05, 0.2, clean=100), changed(record(), "clean", -0.05, clean=100)]
    column = removal(few)["somewhere, 100 clean"]
    assert (column["BadNets"], column["clean"]) == ("-5.0 / 20.0", "-5.0")


def test_the_removal_table_is_of_one_algorithms_default_settings_and_averages_seeds():
    same = [changed(record(seed), asr=asr) for seed, asr in ((0, 0.01), (1, 0.03))]
    papers = changed(record(defence="ibau"), asr=1.0)
    table = removal([*same, changed(record(K=5), asr=1.0), papers])
    assert table["somewhere, 500 clean"]["BadNets"] == "+0.0 / 2.0 (n = 2)"
    assert removal([*same, papers], "ibau")["somewhere, 500 clean"]["BadNets"] == "+0.0 / 100.0*"


def test_the_removal_table_mixes_no_poison_ratios_and_leaves_out_sizes_between():
    weaker = changed(record(), asr=1.0)
    weaker["settings"]["victim"]["poison_ratio"] = 0.005
    table = removal([weaker, *(changed(record(), clean=size) for size in (100, 500, 5000))])
    assert list(table) == ["somewhere, 5,000 clean", "somewhere, 100 clean"]
    assert set(table.loc["BadNets"]) == {"+0.0 / 5.0"}
    assert frame.usual([weaker], "ibau_plus") == []


# ---- the README


def test_the_readme_shows_the_recorded_results(root, tmp_path):
    text = (root / "README.md").read_text(encoding="utf-8")
    assert readme.results_markdown(Records().defences()) in text
    assert readme.victims_markdown(Records().victims()) in text
    stale = tmp_path / "README.md"
    stale.write_text("a\n<!-- results: x -->\nold\n<!-- end of results -->\nb\n", encoding="utf-8")
    readme.write_readme(stale)
    assert "old" not in stale.read_text(encoding="utf-8")
    assert stale.read_text(encoding="utf-8").endswith("<!-- end of results -->\nb\n")


def test_each_algorithm_has_its_name_over_its_results():
    ours, papers = (
        changed(record(defence=name), asr=asr) for name, asr in (("ibau_plus", 0.01), ("ibau", 0.02))
    )
    lines = readme.results_markdown([ours]).splitlines()
    assert lines[0] == "I-BAU: no record at its default settings."
    assert lines[2].startswith("| I-BAU+: ACC change") and lines[4] == "| BadNets | +0.0 / 1.0 |"
    assert lines[6].startswith("I-BAU+ was not run on: clean, Blend, ")
    both = readme.results_markdown([ours, papers])
    first, second = both.index("| I-BAU: ACC change"), both.index("| I-BAU+: ACC change")
    assert first < both.index("| BadNets | +0.0 / 2.0 |") < second < both.index("| BadNets | +0.0 / 1.0 |")


def test_gtsrb_of_the_earlier_split_says_so_and_of_todays_does_not():
    def said(dataset, train_images):
        about = changed(record(train_images=train_images))
        about["settings"]["victim"]["dataset"] = dataset
        rows = frame.of_records([about])
        in_all = {
            tables.EARLIER_SPLIT in text for text in (readme.results_markdown([about]), tables.in_words(rows))
        }
        assert in_all == {bool(tables.split_note(rows))}
        return in_all.pop()

    assert said("gtsrb", 39209)
    assert not said("gtsrb", 33000)  # whole tracks were taken out of it
    assert not said("cifar10", 39209)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 5.0])
def test_a_perturbation_is_shown_inside_the_picture_range(scale):
    shown = figures.signed(scale * torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert shown.min() >= 0 and shown.max() <= 1
    assert figures.signed(torch.zeros(3, 2, 2)).eq(0.5).all()


# ---- triggers


@pytest.fixture
def axes():
    figure, axes = plt.subplots(1, 6)
    yield axes
    figure.canvas.draw()
    plt.close(figure)


def added(pattern):
    return Trigger("added", "add", pattern, torch.ones(1, *pattern.shape[1:]))


def test_triggers_are_made_visible():
    faint = added(torch.full((3, 8, 8), -0.01))
    assert figures.visible(faint).eq(0).all()
    square = figures.visible(badnets(32))
    assert square[:, 27:31, 27:31].eq(1).all() and square[:, :27].eq(0.5).all()
    whole = blend(32)
    assert torch.equal(figures.visible(whole), whole.pattern)


# ---- victims


def a_victim(label, acc=0.9, asr=0.97, seed=0, **other):
    """The record of the victim with this label, as `experiment.victim` writes them."""
    attack, target = {"clean": ("none", 0), **STANDARD}[label]
    several = attack.split("+") if attack != "none" else []
    hidden = {"psnr": 25.0, "ssim": 0.25}
    about = {
        "dataset": "somewhere",
        "attack": attack,
        "target": target,
        "strength": None,
        "poison_ratio": 0.2,
        "training": {"epochs": 3, "lr": 1e-3},
        "train_images": 5000,
        "seed": seed,
        "split_seed": 0,
    }
    return {
        "settings": {**about, **other},
        "measured": {"acc": rate(acc), "asr": rate(asr, 900) if several else None},
        "attacks": [
            {"attack": name, "target": i if len(several) > 1 else target, "asr": rate(asr), "stealth": hidden}
            for i, name in enumerate(several)
        ],
    }


def test_a_frame_of_victims_tells_apart_how_they_were_trained():
    other = [a_victim("BadNets", train_images=100), a_victim("BadNets", training={"epochs": 3, "lr": 1e-2})]
    rows = frame.of_victims([a_victim("clean"), a_victim("BadNets", seed=1), *other])
    words = "somewhere, 5,000 images, 3 epochs"
    assert rows["trained"].tolist() == [words, words, "somewhere, 100 images, 3 epochs", f"{words} (2)"]
    assert rows["attack"].tolist() == ["clean", *["BadNets"] * 3] and rows["asr"].isna().tolist()[0]


def test_the_readmes_attacks_name_what_was_not_run():
    lines = readme.victims_markdown([a_victim("clean", acc=0.98), a_victim("Smooth", asr=0.5)]).splitlines()
    assert len(lines) == 2 + 1 + len(STANDARD)
    assert "| clean | 98.0 |" in lines
    assert any(line.startswith("| Smooth | ") and line.endswith(" / 50.0 |") for line in lines)
    assert "| Blend | not run |" in lines


def test_a_patch_is_shown_on_grey_and_an_added_one_by_its_sign():
    mask, picture = torch.zeros(1, 2, 2), torch.rand(3, 2, 2)
    mask[0, 0, 1] = 1
    shown = figures.as_picture(torch.cat([mask, picture]))
    torch.testing.assert_close(shown[:, 0, 1], picture[:, 0, 1])
    assert (shown[:, 1] == 0.5).all()
    assert torch.equal(figures.as_picture(-picture), figures.signed(-picture))


def test_a_frame_of_triggers_has_a_row_a_trigger():
    rows = frame.of_triggers(a_victim(label) for label in ("clean", "BadNets", "seven triggers"))
    assert rows["attack"].tolist() == ["BadNets", *["seven triggers"] * 7]
    assert rows["trigger"].tolist() == ["badnets", *ATTACKS] and rows["target"].tolist() == [8, *range(7)]
    assert set(rows["asr"]) == {97.0} and set(rows["psnr"]) == {25.0}
    assert set(rows["trained"]) == {"somewhere, 5,000 images, 3 epochs"}


# ---- defences


def lines_of(norms, flagged=()):
    """The evidence's lines of classes with these norms."""
    return [
        {"class": t, "norm": norm, "anomaly_index": 10.0 + t, "flagged": t in flagged}
        for t, norm in enumerate(norms)
    ]


def a_cell(name, seed=0, **settings):
    settings = replace(settings_for(name, "quick", "mnist5k"), **settings)
    attacked = standard_victims(PROFILES["quick"], seed=seed)["BadNets"]
    return Cell(attacked, name, settings, 500, seed)


def a_record(cell, seconds=10.0, acc=0.9, flagged=None, **measured):
    """What `experiment.defence_record` writes for the cell."""
    data = {"data": "its fingerprint", "split_seed": 0, "train_images": 3000}
    about = {
        "victim": {**asdict(cell.victim), **data},
        "defence": cell.defence,
        "version": DEFENCES[cell.defence].version,
        "defence_settings": asdict(cell.settings),
        "clean_images": 500 if DEFENCES[cell.defence].sees == "clean" else 0,
        "seed": cell.seed,
    }
    classes = {} if flagged is None else {"classes": lines_of([1.0, 2.0], flagged)}
    record = {
        "settings": about,
        "before": {"acc": rate(0.98), "asr": rate(1.0), "ra": rate(0.0)},
        "after": {"acc": rate(acc), "asr": rate(0.5), "ra": rate(0.4), **measured},
        "curve": [
            {"round": i, "seconds": t, "acc": rate(0.98 - lost), "asr": rate(left)}
            for i, (t, lost, left) in enumerate([(0.0, 0.0, 1.0), (2.0, 0.04, 0.2), (5.0, 0.02, 0.1)])
        ],
        "seconds": seconds,
        "peak_memory_mb": 100 * seconds,
        "evidence": classes,
    }
    return json.loads(json.dumps(record))


# ---- the grid


@pytest.fixture
def cells_of():
    """A function that makes a `frame` of a sweep, all cells but some run alike."""

    def make(sweep, unrun=()):
        rows = frame.frame(dict.fromkeys(SWEEPS[sweep].cells("quick", "mnist5k", [0])))
        done = ~rows["defence"].isin(unrun)
        values = {"acc_before": 72.0, "acc": 70.0, "change": -2.0, "asr": 5.0, "seconds": 20.0, "der": 90.0}
        for name, value in values.items():
            rows.loc[done, name] = value
        rows.loc[rows["attack"] == "clean", "asr"] = float("nan")
        rows.loc[done, "device"] = "a CPU, 1 thread"
        return rows.assign(run=done)

    return make


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_the_maps_name_what_was_not_run_and_leave_out_what_never_was(axes, cells_of):
    rows = cells_of("single-target", unrun=["NAD", "I-BAU"])
    rows.loc[(rows["defence"] == "NAD") & (rows["attack"] == "clean"), ["run", "acc", "change"]] = [
        True,
        70,
        -2,
    ]
    asr, acc = figures.plot_cells(axes[:2], rows)
    attacks, columns = rows["attack"].nunique(), rows["defence"].nunique() - 1
    names = [text.get_text() for text in acc.get_xticklabels()]
    assert len(names) == columns and names[-1] == "I-BAU+" and "I-BAU" not in names
    assert [text.get_text() for text in asr.get_yticklabels()] == ["clean", *STANDARD][:attacks]
    for ax, shown in ((asr, "5.0"), (acc, "70.0")):
        assert len(texts(ax)) == attacks * columns
        assert texts(ax).count("not run") == attacks - 1
        clean = attacks * (columns - 1) + 1 if shown == "70.0" else (attacks - 1) * (columns - 1)
        assert texts(ax).count(shown) == clean  # a clean model has no ASR
    bold = [text for text in asr.texts if text.get_fontweight() == "bold"]
    assert len(bold) == (attacks - 1) * (columns - 2)  # the undefended column has no goal


def test_the_maps_are_darker_where_it_is_worse(axes, cells_of):
    rows = cells_of("multi-target")
    rows.loc[rows["attack"] == "all-to-all", ["asr", "acc"]] = [100.0, 60.0]
    for ax in figures.plot_cells(axes[:2], rows):
        light = {
            text.get_text(): sum(patch.get_facecolor()[:3])
            for text, patch in zip(ax.texts, ax.patches, strict=True)
        }
        worse, better = ("100.0", "5.0") if "5.0" in light else ("60.0", "70.0")
        assert light[worse] < light[better]


def test_lines_have_gaps_where_a_cell_was_not_run(axes, cells_of):
    rows = cells_of("poison-ratio", unrun=["DP-SGD"])
    rows = rows[rows["attack"] == "Blend"].reset_index(drop=True)
    gap = (rows["defence"] == "NAD") & (rows["ratio"] == 2)
    rows.loc[gap, ["asr", "acc"]] = float("nan")
    figures.plot_along(axes[:2], rows, "ratio")
    asr, _ = axes[:2]
    assert [text.get_text() for text in asr.get_xticklabels()] == ["0.5", "1", "2", "5", "10", "20"]
    lines = {line.get_label(): line.get_ydata() for line in asr.lines}
    assert "DP-SGD" not in lines and {"NAD", "none", "I-BAU", "I-BAU+"} <= set(lines)
    assert [math.isnan(y) for y in lines["NAD"]] == [False, False, True, False, False, False]
    figures.plot_along(axes[2:4], cells_of("clean-size").query("attack == 'Blend'"), "clean")
    assert [text.get_text() for text in axes[3].get_xticklabels()] == ["100", "250", "500"]


def test_the_legend_names_what_any_attack_met_and_the_figure_what_none_did(cells_of):
    rows = cells_of("poison-ratio", unrun=["DP-SGD", "I-BAU"])
    gone = (rows["defence"] == "I-BAU+") & (rows["attack"] == "l2-inv")
    rows.loc[gone, ["run", "seconds", "acc", "asr"]] = [False, *[math.nan] * 3]
    figure = figures.plot_attacks_along(rows, "ratio", "here")
    labels = [text.get_text() for text in figure.axes[2].get_legend().get_texts()]
    assert labels[-1] == "I-BAU+" and "DP-SGD" not in labels and "I-BAU" not in labels
    assert figure.get_supxlabel() == "Not run: DP-SGD, I-BAU."
    plt.close(figure)


def test_the_rounds_name_the_algorithm(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    figures.draw_rounds([record(), record(seed=1), record(defence="ibau"), record(K=5)], "somewhere")
    assert [ax.get_title() for ax in drawn[0].axes] == [
        "I-BAU, somewhere,\n10 clean images, 1 model",
        "I-BAU+, somewhere,\n10 clean images, 2 models",
    ]
    plt.close(drawn[0])


def test_the_figures_are_those_of_the_records(tmp_path):
    names = figures.draw_sweeps(tmp_path)
    assert "single_target_cifar10" in names and "seconds_gtsrb" in names
    wanted = {f"{name}.{kind}" for name in (*names, "rounds") for kind in ("png", "svg")}
    assert {path.name for path in tmp_path.iterdir()} | {"rounds.png", "rounds.svg"} == wanted
    kept = figures_dir()
    assert {path.name for path in kept.glob("*.*g")} == wanted, "run `make figures`"


@pytest.mark.parametrize(("unrun", "base"), [("NAD", "I-BAU"), ("I-BAU", "I-BAU+")])
def test_seconds_are_bars_and_ratios_dots(axes, cells_of, unrun, base):
    rows = cells_of("single-target", unrun=[unrun])
    rows.loc[rows["defence"] == "TABOR", "seconds"] = 60.0
    rows.loc[rows["defence"] == base, "seconds"] = 30.0
    seconds, times = figures.plot_seconds(axes[:2], rows)
    assert sorted(patch.get_width() for patch in seconds.patches) == [20.0] * (len(DEFENCES) - 3) + [
        30.0,
        60.0,
    ]
    assert unrun not in [text.get_text() for text in seconds.get_yticklabels()]
    dots = [list(line.get_xdata()) for line in times.lines if line.get_marker() == figures.MARKS["TABOR"]]
    assert dots == [[2.0] * 8] and times.get_xlabel().startswith(f"times {base}'s seconds")


def test_every_defence_has_a_mark_and_a_colour_of_its_own():
    labels = {"none", *(defence.label for defence in DEFENCES.values())}
    assert set(figures.MARKS) == set(figures.COLOURS) == labels
    assert len(set(figures.COLOURS.values())) == len(set(figures.MARKS.values())) == len(labels)


# ---- cells and their records


def with_victim(record):
    return {**record, "provenance": {"device": "a CPU", "threads": 1}}


def test_a_cell_finds_its_record_by_settings_alone():
    cell, other = a_cell("finetune"), a_cell("finetune", seed=1)
    record = with_victim(a_record(cell))
    assert frame.match([cell, other], [record]) == {cell: record, other: None}
    changed = copy.deepcopy(record)
    changed["settings"]["defence_settings"]["held_out"] = 0.123
    older = copy.deepcopy(record)
    older["settings"]["version"] -= 1
    assert frame.match([cell], [changed, older]) == {cell: None}


@pytest.mark.parametrize("name", ["nc", "tabor", "deepinspect"])
def test_policies_coincide_only_where_a_class_was_flagged(name):
    leave, smallest = (a_cell(name, unflagged=policy) for policy in ("leave", "smallest"))
    flagged, not_flagged = a_record(leave, flagged=[1]), a_record(leave, flagged=[])
    assert frame.match([leave, smallest], [flagged]) == {leave: flagged, smallest: flagged}
    assert frame.match([leave, smallest], [not_flagged]) == {leave: not_flagged, smallest: None}
    other = a_record(smallest, flagged=[])
    assert frame.match([leave, smallest], [not_flagged, other]) == {leave: not_flagged, smallest: other}


def test_images_count_only_for_defences_that_see_them():
    for name, found in (("finetune", False), ("dp_sgd", True), ("deepinspect", True)):
        cell = a_cell(name)
        record = a_record(cell, flagged=[])
        assert (frame.match([replace(cell, clean_size=100)], [record]).popitem()[1] is not None) is found


def test_an_undefended_cell_is_read_from_its_victim_or_from_a_defended_one():
    cell = a_cell("finetune")
    nothing = replace(cell, defence=NONE, settings=None)
    record = with_victim(a_record(cell))
    (from_defended,) = frame.match([nothing], [record]).values()
    assert from_defended["measured"] == record["before"]
    own = {"settings": record["settings"]["victim"], "measured": {"acc": rate(0.5), "asr": None, "ra": None}}
    assert frame.match([nothing], [record], [own]) == {nothing: own}
    assert frame.match([nothing], []) == {nothing: None}


def test_a_frame_has_a_row_a_cell_run_or_not():
    cell = a_cell("finetune")
    nothing, seed = replace(cell, defence=NONE, settings=None), a_cell("finetune", seed=1)
    record = with_victim(a_record(cell, seconds=7.0, der=rate(0.75)))
    rows = frame.frame(frame.match([nothing, cell, seed], [record]))
    assert list(rows.columns) == frame.COLUMNS and rows["run"].tolist() == [
        True,
        True,
        False,
    ]
    assert rows["defence"].tolist() == [frame.UNDEFENDED, "Fine-tuning", "Fine-tuning"]
    first, second, third = rows.to_dict("records")
    assert (first["acc"], first["change"], first["asr"]) == (98.0, 0.0, 100.0) and pd.isna(first["seconds"])
    assert (second["acc"], second["change"], second["asr"]) == pytest.approx((90.0, -8.0, 50.0))
    assert (second["seconds"], second["der"], second["device"]) == (7.0, 75.0, "a CPU, 1 thread")
    assert second["train_images"] == 3000
    assert (second["attack"], second["ratio"], second["clean"]) == ("BadNets", 20.0, 500)
    assert all(pd.isna(third[name]) for name in (*frame.MEASURED, "seconds", "device", "train_images"))


def test_records_without_a_cell_make_the_same_rows():
    cell = a_cell("ibau_plus")
    made = with_victim(a_record(cell, der=rate(0.75)))
    alone = frame.of_records([made])
    pd.testing.assert_frame_equal(alone, frame.frame({cell: made}))
    assert alone["defence"].tolist() == ["I-BAU+"]


def test_time_to_effect_is_that_of_the_first_point_at_the_goal():
    cell = a_cell("finetune")
    record = with_victim(a_record(cell))
    (row,) = frame.of_records([record]).to_dict("records")
    assert (row["to_effect"], row["to_effect_few"]) == (5.0, 2.0) and pd.isna(row["share"])
    record["curve"][2]["asr"] = rate(0.101)
    record["effort"] = {"share": 0.25}
    (row,) = frame.of_records([record]).to_dict("records")
    assert (row["to_effect"], row["share"]) == (math.inf, 25.0)
    for point in record["curve"]:
        del point["seconds"]  # as in older records
    assert pd.isna(frame.of_records([record])["to_effect"].item())


def test_attacks_with_other_targets_have_other_labels():
    targets = {8: "BadNets", ALL_TO_ALL: "all-to-all", 3: "badnets to 3"}
    assert {t: frame.attack_label({"attack": "badnets", "target": t}) for t in targets} == targets
