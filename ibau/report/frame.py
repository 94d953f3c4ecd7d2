"""Records -> tidy frames, a row a cell of the grid or a record; all tables, claims and figures start here."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields

import pandas as pd

from ibau.data.splits import CLEAN_SIZE
from ibau.defences import DEFENCES
from ibau.defences.inversion import POLICIES
from ibau.study import grid
from ibau.study.records import Records
from ibau.study.settings import STANDARD, VictimSettings

UNDEFENDED = "none"  # the label of the column without a defence
LABELS = {grid.NONE: UNDEFENDED, **{name: d.label for name, d in DEFENCES.items()}}
IBAU, IBAU_PLUS, CONTROL = (LABELS[name] for name in ("ibau", "ibau_plus", "finetune"))  # the paper's; ours
BASELINES = tuple(d.label for d in DEFENCES.values() if d.label not in (IBAU, IBAU_PLUS, CONTROL))  # the six
SIGHTED = tuple(d.label for d in DEFENCES.values() if d.sees == "clean")  # who use clean images

# What is asked for: at most so many points of ACC lost, and so much ASR left, in percent.
GOAL, SMALL_GOAL = (2, 10), {100: (5, 20)}  # in general, and with so many clean images
CLEAN_GOAL = 1  # points of ACC that a clean model may lose

ASKED = ["dataset", "attack", "defence", "ratio", "clean", "seed"]
MEASURED = ["acc_before", "acc", "change", "asr_before", "asr", "ra", "der"]
COLUMNS = [*ASKED, "run", *MEASURED, "acc_n", "asr_n", "seconds", "memory_mb", "device", "train_images"]


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
    labels = {attack_and_target: label for label, attack_and_target in STANDARD.items()}
    name = f"{victim['attack']} to {victim['target']}"
    return labels.get((victim["attack"], victim["target"]), name)


# ---- a row a cell, or a record


def frame(found: Mapping[grid.Cell, dict | None]) -> pd.DataFrame:
    """A row a cell, rates in percent: what was asked for, and what was measured; nan where it was not run.

    dataset, attack, defence (labels), ratio (percent poisoned), clean (images), seed; run; acc_before, acc,
    change (of ACC, in points), asr_before, asr, ra, der; acc_n, asr_n (test images that ACC, and ASR and RA,
    are shares of); seconds, memory_mb, device (with its threads); train_images (the attacker's). A clean
    model has neither ASR nor RA nor DER. An undefended model is before what it is after.
    """
    return _framed(
        {**_asked(asdict(cell.victim), cell.defence, _clean_size(cell)), **_measured(record)}
        for cell, record in found.items()
    )


def of_records(records: Iterable[dict]) -> pd.DataFrame:
    """The rows of `frame` for records of defences, whether or not the grid has such cells."""
    return _framed(
        {**_asked(about["victim"], about["defence"], about["clean_images"]), **_measured(record)}
        for record in records
        for about in [record["settings"]]
    )


def of_victims(records: Iterable[dict]) -> pd.DataFrame:
    """The rows of `frame` for records of victims, with `trained`: data set, training images and epochs.

    Models that differ in anything but attack, target and seed have another `trained`, with a number where the
    words would not tell them apart.
    """
    rows, names = [], {}
    for record in records:
        about = record["settings"]
        alike = {k: v for k, v in about.items() if k not in ("attack", "target", "seed", "split_seed")}
        words = f"{about['dataset']}, {about['train_images']:,} images, {about['training']['epochs']} epochs"
        same = names.setdefault(words, [])
        if alike not in same:
            same.append(alike)
        number = f" ({same.index(alike) + 1})" if same.index(alike) else ""
        rows.append({**_asked(about, grid.NONE, 0), **_measured(record), "trained": words + number})
    return _framed(rows, "trained")


def of_triggers(records: Iterable[dict]) -> pd.DataFrame:
    """A row a trigger of each victim: trained, attack, seed, trigger, target, its ASR, and how it hides.

    What of `of_victims` names the model; asr in percent; the measures of `ibau.measure.stealth.stealth`.
    """
    records = list(records)
    models = of_victims(records)[["trained", "attack", "seed"]].to_dict("records")
    return pd.DataFrame(
        {**model, "trigger": one["attack"], "target": one["target"], "asr": 100 * one["asr"]["value"]}
        | one["stealth"]
        for model, record in zip(models, records, strict=True)
        for one in record["attacks"]
    )


def _framed(rows: Iterable[dict], *more: str) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=[*COLUMNS, *more]).astype({"device": object})


def _asked(victim: dict, defence: str, clean_images: int) -> dict:
    return {
        "dataset": victim["dataset"],
        "attack": attack_label(victim),
        "defence": LABELS[defence],
        "ratio": 100 * victim["poison_ratio"],
        "clean": clean_images,
        "seed": victim["seed"],
    }


def _measured(record: dict | None) -> dict:
    if record is None:
        return {"run": False}
    undefended = "measured" in record
    before, after = (record["measured"],) * 2 if undefended else (record["before"], record["after"])
    rates = {"acc_before": before["acc"], "acc": after["acc"], "asr_before": before["asr"]}
    rates |= {name: after.get(name) for name in ("asr", "ra", "der")}
    row = {name: 100 * rate["value"] for name, rate in rates.items() if rate}
    row |= {f"{name}_n": after[name]["n"] for name in ("acc", "asr") if after[name]}
    row |= {"run": True, "change": row["acc"] - row["acc_before"]}
    row["train_images"] = record["settings"].get("victim", record["settings"])["train_images"]
    if not undefended:
        where = record["provenance"]
        threads = f"{where['threads']} thread{'s' * (where['threads'] != 1)}"
        row |= {"seconds": record["seconds"], "memory_mb": record["peak_memory_mb"]}
        row["device"] = f"{where['device']}, {threads}"
    return row


def over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for the seeds of a `frame` together: means, `n` seeds that were run, `good`: no goal missed.

    Rows keep their order. `good` is None for a cell that was not run, and for an undefended one.
    """
    groups = rows.groupby(which(rows, "seed"), sort=False)
    means = groups[[*MEASURED, "seconds", "memory_mb"]].mean()
    means = means.assign(n=groups["run"].sum(), run=groups["run"].any()).reset_index()
    means["good"] = [good(row) for row in means.itertuples()]
    return means


def which(rows: pd.DataFrame, *but: str) -> list[str]:
    """The columns that tell the cells of a frame apart, without these."""
    return [name for name in [*ASKED, "profile"] if name in rows and name not in but]


def good(row) -> bool | None:
    """Does this row of a `frame` meet its goal? None: not run, or undefended."""
    if not row.run or row.defence == UNDEFENDED:
        return None
    return not misses(row.change, None if pd.isna(row.asr) else row.asr, row.clean)


# ---- cells and their records


def match(
    cells: Iterable[grid.Cell], records: Iterable[dict], victims: Iterable[dict] = ()
) -> dict[grid.Cell, dict | None]:
    """The record of each cell among `records` and, of undefended ones, `victims`; None where there is none.

    They are told by their settings and the defence's version, so that no data are needed. Where the policy of
    a defence for the case that no class is flagged did not matter, because one was, a record is one of every
    policy. What a model does without a defence is read from a defended one's record where its own is missing.
    """
    known: dict[str, dict] = {}
    for record in records:
        about = record["settings"]
        undefended = {"settings": about["victim"], "measured": record["before"]}
        known.setdefault(_key(about["victim"]), undefended)
        for settings in _leading_to(record):
            asked = about["defence"], about["version"], settings, about["clean_images"], about["seed"]
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
    chosen = DEFENCES[cell.defence]
    images = _clean_size(cell) if chosen.sees == "clean" else 0
    asked = cell.defence, chosen.version, asdict(cell.settings), images, cell.seed
    return _key(asdict(cell.victim), *asked)


def _key(victim: dict, *defence) -> str:
    named = {field.name: victim.get(field.name) for field in fields(VictimSettings)}
    return json.dumps([named, *defence], sort_keys=True)


def _clean_size(cell: grid.Cell) -> int:
    return cell.clean_size or CLEAN_SIZE[cell.victim.dataset]


def published() -> tuple[list[dict], list[dict]]:
    """The records in `figures/data`: of defences, and of victims."""
    return Records().defences(), Records().victims()


def usual(records: Iterable[dict], defence: str) -> list[dict]:
    """Those of this defence at its default settings, against the STANDARD attacks at theirs."""
    chosen, labels = DEFENCES[defence], {"clean", *STANDARD}
    wanted = defence, chosen.version, asdict(chosen.settings())
    return [
        record
        for record in records
        for about, victim in [(record["settings"], record["settings"]["victim"])]
        if (about["defence"], about["version"], about["defence_settings"]) == wanted
        and (victim["strength"], victim["poison_ratio"]) == (None, VictimSettings.poison_ratio)
        and attack_label(victim) in labels
    ]


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


def recorded_at(table: str, dataset: str) -> dict[str, pd.DataFrame]:
    """Profile -> what is `recorded` of a table at it, for the profiles at which any defence was run."""
    profiles = ("quick",) if dataset == "mnist5k" else ("paper", "desk")
    among = published()
    found = {profile: recorded(table, profile, dataset, among=among) for profile in profiles}
    return {name: rows for name, rows in found.items() if rows["seconds"].notna().any()}


def where_run(rows: pd.DataFrame, along: str) -> tuple[pd.DataFrame, list]:
    """The `frame`'s rows at those values of a column where any defence was run, and the other values.

    Defences without clean images do not count: what they did at one size of the clean set stands at all.
    """
    there = set(rows[rows["seconds"].notna() & rows["defence"].isin(SIGHTED)][along])
    return rows[rows[along].isin(there)], sorted(set(rows[along]) - there)
