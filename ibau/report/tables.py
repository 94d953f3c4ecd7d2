"""Records -> tidy tables: a row a cell of the grid, run or not; what is asked of a defence; who meets it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields

import pandas as pd

from ibau.data.splits import CLEAN_SIZE
from ibau.defences import DEFENCES
from ibau.defences.inversion import POLICIES
from ibau.study import grid
from ibau.study import records as study_records
from ibau.study import settings as study_settings
from ibau.study.settings import VictimSettings

UNDEFENDED = "none"  # the label of the column without a defence
OURS, CONTROL = DEFENCES["ibau"].label, DEFENCES["finetune"].label
BASELINES = tuple(d.label for d in DEFENCES.values() if d.label not in (OURS, CONTROL))  # the paper's six
SIGHTED = tuple(d.label for d in DEFENCES.values() if d.sees == "clean")  # who use clean images

# What is asked for: at most so many points of ACC lost, and so much ASR left, in percent.
GOAL, SMALL_GOAL = (2, 10), {100: (5, 20)}  # in general, and with so many clean images
CLEAN_GOAL = 1  # points of ACC that a clean model may lose
NEAR = 2.0  # points of DER within which two defences are called comparable


def misses(change: float, asr: float | None, clean_images: int) -> bool:
    """Does this change of ACC in points, or this ASR in percent (None: a clean model), miss its goal?"""
    lost, most = SMALL_GOAL.get(clean_images, GOAL)
    if asr is None:
        lost = max(CLEAN_GOAL, lost) if clean_images in SMALL_GOAL else CLEAN_GOAL
    return round(change, 1) < -lost or (asr is not None and round(asr, 1) > most)


def attack_label(victim: dict) -> str:
    """What a victim's settings are called: their label in STANDARD, "clean", or attack and target."""
    if victim["attack"] == "none":
        return "clean"
    labels = {attack_and_target: label for label, attack_and_target in study_settings.STANDARD.items()}
    name = f"{victim['attack']} to {victim['target']}"
    return labels.get((victim["attack"], victim["target"]), name)


# ---- cells and their records


def match(
    cells: Iterable[grid.Cell], records: Iterable[dict], victims: Iterable[dict] = ()
) -> dict[grid.Cell, dict | None]:
    """The record of each cell among `records` and, of undefended ones, `victims`; None where there is none.

    They are told by their settings, so that no data are needed. Where the policy of a defence for the case
    that no class is flagged did not matter, because one was, a record is one of every policy. What a model
    does without a defence is read from a defended one's record where its own is missing.
    """
    known: dict[str, dict] = {}
    for record in records:
        about = record["settings"]
        undefended = {"settings": about["victim"], "measured": record["before"]}
        known.setdefault(_key(about["victim"]), undefended)
        for settings in _leading_to(record):
            asked = about["defence"], settings, about["clean_images"], about["seed"]
            known.setdefault(_key(about["victim"], *asked), record)
    known |= {_key(record["settings"]): record for record in victims}
    return {cell: known.get(_key_of(cell)) for cell in cells}


def _leading_to(record: dict) -> list[dict]:
    """The defence's settings that lead to this record: its own, or with any policy where it had no say."""
    settings = record["settings"]["defence_settings"]
    if "unflagged" in settings and any(line["flagged"] for line in record["evidence"]["classes"]):
        return [{**settings, "unflagged": policy} for policy in POLICIES]
    return [settings]


def _key_of(cell: grid.Cell) -> str:
    if cell.defence == grid.NONE:
        return _key(asdict(cell.victim))
    sees = DEFENCES[cell.defence].sees
    images = _clean_size(cell) if sees == "clean" else 0
    return _key(asdict(cell.victim), cell.defence, asdict(cell.settings), images, cell.seed)


def _key(victim: dict, *defence) -> str:
    named = {field.name: victim.get(field.name) for field in fields(VictimSettings)}
    return json.dumps([named, *defence], sort_keys=True)


def _clean_size(cell: grid.Cell) -> int:
    return cell.clean_size or CLEAN_SIZE[cell.victim.dataset]


def frame(found: Mapping[grid.Cell, dict | None]) -> pd.DataFrame:
    """A row a cell, rates in percent: what was asked for, and what was measured; nan where it was not run.

    dataset, attack, defence (labels), ratio (percent poisoned), clean (images), seed; run; acc_before, acc,
    change (of ACC, in points), asr_before, asr, ra, der; seconds, memory_mb, device (with its threads). A
    clean model has neither ASR nor RA nor DER. An undefended model is before what it is after.
    """
    rows = pd.DataFrame([_row(cell, record) for cell, record in found.items()], columns=COLUMNS)
    return rows.astype({"device": object})


ASKED = ["dataset", "attack", "defence", "ratio", "clean", "seed"]
MEASURED = ["acc_before", "acc", "change", "asr_before", "asr", "ra", "der"]
COLUMNS = [*ASKED, "run", *MEASURED, "seconds", "memory_mb", "device"]


def _row(cell: grid.Cell, record: dict | None) -> dict:
    undefended = cell.defence == grid.NONE
    row = {
        "dataset": cell.victim.dataset,
        "attack": attack_label({"attack": cell.victim.attack, "target": cell.victim.target}),
        "defence": UNDEFENDED if undefended else DEFENCES[cell.defence].label,
        "ratio": 100 * cell.victim.poison_ratio,
        "clean": _clean_size(cell),
        "seed": cell.victim.seed,
        "run": record is not None,
    }
    if record is None:
        return row
    before, after = (record["measured"],) * 2 if undefended else (record["before"], record["after"])
    rates = {"acc_before": before["acc"], "acc": after["acc"], "asr_before": before["asr"]}
    rates |= {name: after.get(name) for name in ("asr", "ra", "der")}
    row |= {name: 100 * rate["value"] for name, rate in rates.items() if rate}
    row["change"] = row["acc"] - row["acc_before"]
    if not undefended:
        where = record["provenance"]
        threads = f"{where['threads']} thread{'s' * (where['threads'] != 1)}"
        row |= {"seconds": record["seconds"], "memory_mb": record["peak_memory_mb"]}
        row["device"] = f"{where['device']}, {threads}"
    return row


def published() -> tuple[list[dict], list[dict]]:
    """The records in `figures/data`: of defences, and of victims."""
    return study_records.recorded(), study_records.recorded_victims()


def recorded(
    table: str, profile: str, dataset: str, *, among: tuple[list[dict], list[dict]] | None = None
) -> pd.DataFrame:
    """The `frame` of one of `grid.TABLES`, from the records in `among` (None: what `published` gives).

    Of seed 0 all cells, of others those that were run; with the profile in a column of its own.
    """
    records, victims = among or published()
    known = [record["settings"] for record in [*records, *victims]]
    seeds = {0} | {about["seed"] for about in known if about.get("victim", about)["dataset"] == dataset}
    rows = frame(match(grid.TABLES[table](profile, dataset, sorted(seeds)), records, victims))
    return rows[rows["run"] | (rows["seed"] == 0)].reset_index(drop=True).assign(profile=profile)


def over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for the seeds of a `frame` together: means, `n` seeds that were run, `good`: no goal missed.

    Rows keep their order. `good` is None for a cell that was not run, and for an undefended one.
    """
    groups = rows.groupby(_which(rows, "seed"), sort=False)
    means = groups[[*MEASURED, "seconds", "memory_mb"]].mean()
    means = means.assign(n=groups["run"].sum(), run=groups["run"].any()).reset_index()
    means["good"] = [_good(row) for row in means.itertuples()]
    return means


def _which(rows: pd.DataFrame, *but: str) -> list[str]:
    """The columns that tell the cells of a frame apart, without these."""
    return [name for name in [*ASKED, "profile"] if name in rows and name not in but]


def _good(row) -> bool | None:
    if not row.run or row.defence == UNDEFENDED:
        return None
    return not misses(row.change, None if pd.isna(row.asr) else row.asr, row.clean)


# ---- what they show


def rates_table(rows: pd.DataFrame, along: str = "attack") -> pd.DataFrame:
    """ACC / ASR in percent of a `frame`, seeds together: a row for each value of `along`, a column a defence.

    * marks what misses its goal, see `misses`; the number of seeds is named where it is not 1. Cells that
    were never run say so.
    """
    means = over_seeds(rows)
    cells = pd.Series([_rates(row) for row in means.itertuples()], index=[means[along], means["defence"]])
    return _in_order(cells, means, along)


def _in_order(cells: pd.Series, means: pd.DataFrame, along: str) -> pd.DataFrame:
    """The cells as a table whose rows and columns come in the order of `means`."""
    table = cells.unstack().loc[means[along].unique(), means["defence"].unique()]
    table.columns.name = table.index.name = None
    return table


def _rates(row) -> str:
    if not row.run:
        return "not run"
    text = f"{row.acc:.1f}" if pd.isna(row.asr) else f"{row.acc:.1f} / {row.asr:.1f}"
    return f"{text}{'*' * (row.good is False)}{f' (n = {row.n})' * (row.n > 1)}"


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a defence over the attacked models of a `frame`: on how many it was run, and what it did there.

    Models, those that meet the goal, mean ASR and the largest, mean change of ACC, mean DER, median seconds.
    """
    means = over_seeds(rows[rows["attack"] != "clean"])
    lines = {}
    for label, same in means.groupby("defence", sort=False):
        done = same[same["run"]]
        line = {"run": f"{len(done)} of {len(same)}"}
        if len(done):
            worst = done.loc[done["asr"].idxmax()]
            line |= {
                "mean ASR": f"{done['asr'].mean():.1f}",
                "largest ASR": f"{worst['asr']:.1f} ({worst['attack']})",
            }
        if len(done) and label != UNDEFENDED:
            line |= {
                "goal met": f"{int(done['good'].sum())} of {len(done)}",
                "change of ACC": f"{done['change'].mean():+.1f}",
                "mean DER": f"{done['der'].mean():.1f}",
                "seconds": f"{done['seconds'].median():.0f}",
            }
        lines[label] = line
    columns = ["run", "goal met", "mean ASR", "largest ASR", "change of ACC", "mean DER", "seconds"]
    return pd.DataFrame.from_dict(lines, orient="index", columns=columns).fillna("")


def beside_best(rows: pd.DataFrame, least: int = 3) -> pd.DataFrame:
    """I-BAU beside the best of the six baselines by DER, seeds together: a row an attacked model.

    Of models with I-BAU and at least `least` of the baselines; `ours`, `best`, `name` (of that baseline) and
    `baselines` (how many were run), with the columns of the `frame` that say which model it is.
    """
    means = over_seeds(rows)
    means = means[means["run"] & means["der"].notna()]
    lines = []
    models = _which(means, "defence")
    for which, same in means.groupby(models, sort=False):
        ours = same[same["defence"] == OURS]["der"]
        others = same[same["defence"].isin(BASELINES)].set_index("defence")["der"]
        if len(ours) and len(others) >= least:
            best = {"ours": ours.iloc[0], "best": others.max(), "name": others.idxmax()}
            lines.append((*which, *best.values(), len(others)))
    return pd.DataFrame(lines, columns=[*models, "ours", "best", "name", "baselines"])


def where_run(rows: pd.DataFrame, along: str) -> tuple[pd.DataFrame, list]:
    """The `frame`'s rows at those values of a column where any defence was run, and the other values.

    Defences without clean images do not count: what they did at one size of the clean set stands at all.
    """
    there = set(rows[rows["seconds"].notna() & rows["defence"].isin(SIGHTED)][along])
    return rows[rows[along].isin(there)], sorted(set(rows[along]) - there)


def ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """Seconds of each defence over I-BAU's, `times`, on the same model, seed, and kind of device and threads.

    The `frame`'s rows for which I-BAU was run as well, and whether they meet the goal, `good`.
    """
    which = [*_which(rows, "defence"), "device"]
    done = rows[rows["seconds"].notna()]
    ours = done[done["defence"] == OURS][[*which, "seconds"]].rename(columns={"seconds": "ours"})
    both = done.merge(ours, on=which)
    return both.assign(times=both["seconds"] / both["ours"], good=[_good(row) for row in both.itertuples()])


def recorded_at(table: str, dataset: str) -> dict[str, pd.DataFrame]:
    """Profile -> what is `recorded` of a table at it, for the profiles at which any defence was run."""
    profiles = ("quick",) if dataset == "mnist5k" else ("paper", "desk")
    among = published()
    found = {profile: recorded(table, profile, dataset, among=among) for profile in profiles}
    return {name: rows for name, rows in found.items() if rows["seconds"].notna().any()}


def in_words(rows: pd.DataFrame) -> str:
    """Sentences that say what a `frame` shows: what was run, who meets the goal, I-BAU beside the best."""
    means = over_seeds(rows)
    done = means[means["run"] & (means["defence"] != UNDEFENDED)]
    asked = (means["defence"] != UNDEFENDED).sum()
    words = [f"{len(done)} of {asked} defended cells were run."]
    attacked = done[done["attack"] != "clean"].groupby("defence", sort=False)["good"].agg(["sum", "size"])
    if len(attacked):
        best = attacked["sum"] / attacked["size"]
        counts = [f"{label} {int(row['sum'])} of {row['size']}" for label, row in attacked.iterrows()]
        words.append(f"The goal is met on attacked models: {', '.join(counts)}.")
        if len(best) > 1:
            most = " and ".join(best.index[best == best.max()])
            words.append(f"The largest share is that of {most}.")
    pairs = beside_best(rows)
    if len(pairs):
        higher, near = (pairs["ours"] > pairs["best"]).sum(), (pairs["ours"] >= pairs["best"] - NEAR).sum()
        words.append(
            f"On {len(pairs)} models I-BAU and three or more of the six baselines were run: its DER is "
            f"higher than their best one's on {higher}, and no more than {NEAR:g} points lower on {near}."
        )
    else:
        words.append("On no model were both I-BAU and three or more of the six baselines run.")
    return " ".join(words)
