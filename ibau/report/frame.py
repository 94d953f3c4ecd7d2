"""Records -> tidy frames, a row a cell of the grid or a record; all tables, claims and figures start here."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields

import pandas as pd

from ibau.data.splits import CLEAN_SIZE
from ibau.defences import DEFENCES
from ibau.defences.inversion import POLICIES
from ibau.study.cells import NONE, SWEEPS, Cell
from ibau.study.records import Records
from ibau.study.settings import STANDARD, VictimSettings

UNDEFENDED = "none"  # the label of the column without a defence
LABELS = {NONE: UNDEFENDED, **{name: d.label for name, d in DEFENCES.items()}}
IBAU, IBAU_PLUS, CONTROL = (LABELS[name] for name in ("ibau", "ibau_plus", "finetune"))  # the paper's; ours
SIX = ("nc", "tabor", "deepinspect", "fine_pruning", "nad", "dp_sgd")
BASELINES = tuple(LABELS[name] for name in SIX)  # the paper's
SIGHTED = tuple(d.label for d in DEFENCES.values() if d.sees == "clean")  # who use clean images

# What is asked for: at most so many points of ACC lost, and so much ASR left, in percent.
GOAL, SMALL_GOAL = (2, 10), {100: (5, 20)}  # in general, and with so many clean images
CLEAN_GOAL = 1  # points of ACC that a clean model may lose

ASKED = ["dataset", "attack", "defence", "ratio", "clean", "seed"]
MEASURED = ["acc_before", "acc", "change", "asr_before", "asr", "ra", "der"]
COLUMNS = [*ASKED, "run", *MEASURED, "acc_n", "asr_n", "seconds", "memory_mb", "device", "train_images"]
COLUMNS += ["share", "to_effect", "to_effect_few"]


def attack_label(victim: dict) -> str:
    """What a victim's settings are called: their label in STANDARD, "clean", or attack and target."""
    if victim["attack"] == "none":
        return "clean"
    attack_and_target = victim["attack"], victim["target"]
    labels = [label for label, standard in STANDARD.items() if standard == attack_and_target]
    return labels[0] if labels else "{} to {}".format(*attack_and_target)


# ---- a row a cell, or a record


def frame(found: Mapping[Cell, dict | None]) -> pd.DataFrame:
    """A row a cell, rates in percent: what was asked for, and what was measured; nan where it was not run.

    dataset, attack, defence (labels), ratio (percent poisoned), clean (images), seed; run; acc_before, acc,
    change (of ACC, in points), asr_before, asr, ra, der; acc_n, asr_n (test images that ACC, and ASR and RA,
    are shares of); seconds, memory_mb, device (with its threads); train_images (the attacker's); share
    (percent of the published schedule, where it was scaled); to_effect, to_effect_few (seconds until GOAL, or
    the goal with 100 images, is met on the watched images; inf: never). A clean model has neither ASR nor RA
    nor DER. An undefended model is before what it is after.
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
        rows.append({**_asked(about, NONE, 0), **_measured(record), "trained": words + number})
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
        row |= {"to_effect": _to_effect(record.get("curve", []), *GOAL)}
        row |= {"to_effect_few": _to_effect(record.get("curve", []), *SMALL_GOAL[100])}
        if record.get("effort"):
            row["share"] = 100 * record["effort"]["share"]
    return row


def _to_effect(curve: list[dict], lost: float, most: float) -> float:
    """Seconds until the first point with at most `lost` points of ACC lost and `most` percent of ASR left.

    inf where there is none; nan of curves without seconds, as of older records, and of clean models.
    """
    if len(curve) < 2 or not curve[0]["asr"] or "seconds" not in curve[0]:
        return math.nan
    least = curve[0]["acc"]["value"] - lost / 100
    good = (p["seconds"] for p in curve if p["acc"]["value"] >= least and p["asr"]["value"] <= most / 100)
    return next(good, math.inf)


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
    """Does this row of a `frame` meet its goal, as it is shown? None: not run, or undefended."""
    if not row.run or row.defence == UNDEFENDED:
        return None
    lost, most = SMALL_GOAL.get(row.clean, GOAL)
    clean_model = pd.isna(row.asr)
    if clean_model and row.clean not in SMALL_GOAL:
        lost = CLEAN_GOAL
    return round(row.change, 1) >= -lost and (clean_model or round(row.asr, 1) <= most)


# ---- cells and their records


def match(
    cells: Iterable[Cell], records: Iterable[dict], victims: Iterable[dict] = ()
) -> dict[Cell, dict | None]:
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
            asked = *asked, about.get("effort", 0.0)
            known.setdefault(_key(about["victim"], *asked), record)
    known |= {_key(record["settings"]): record for record in victims}
    return {cell: known.get(_key_of(cell)) for cell in cells}


def _leading_to(record: dict) -> list[dict]:
    """The defence's settings that lead to this record: its own, or with any policy where it had no say."""
    settings = record["settings"]["defence_settings"]
    if "unflagged" in settings and any(line["flagged"] for line in record["evidence"]["classes"]):
        return [{**settings, "unflagged": policy} for policy in POLICIES]
    return [settings]


def _key_of(cell: Cell) -> str:
    if cell.defence == NONE:
        return _key(asdict(cell.victim))
    chosen = DEFENCES[cell.defence]
    images = _clean_size(cell) if chosen.sees == "clean" else 0
    asked = cell.defence, chosen.version, asdict(cell.settings), images, cell.seed, cell.effort
    return _key(asdict(cell.victim), *asked)


def _key(victim: dict, *defence) -> str:
    named = {field.name: victim.get(field.name) for field in fields(VictimSettings)}
    return json.dumps([named, *defence], sort_keys=True)


def _clean_size(cell: Cell) -> int:
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


def recorded(sweep: str, profile: str, dataset: str, *, among: tuple | None = None) -> pd.DataFrame:
    """The `frame` of one of SWEEPS, from the records in `among` (None: what `published` gives).

    Of seed 0 all cells, of others those that were run; with the profile in a column of its own.
    """
    records, victims = among or published()
    known = [record["settings"] for record in [*records, *victims]]
    seeds = {0} | {about["seed"] for about in known if about.get("victim", about)["dataset"] == dataset}
    rows = frame(match(SWEEPS[sweep].cells(profile, dataset, sorted(seeds)), records, victims))
    return rows[rows["run"] | (rows["seed"] == 0)].reset_index(drop=True).assign(profile=profile)


def recorded_at(sweep: str, dataset: str) -> dict[str, pd.DataFrame]:
    """Profile -> what is `recorded` of a sweep at it, for the profiles at which any defence was run."""
    profiles = ("quick",) if dataset == "mnist5k" else ("paper", "desk")
    among = published()
    found = {profile: recorded(sweep, profile, dataset, among=among) for profile in profiles}
    return {name: rows for name, rows in found.items() if rows["seconds"].notna().any()}


def where_run(rows: pd.DataFrame, along: str) -> tuple[pd.DataFrame, list]:
    """The `frame`'s rows at those values of a column where any defence was run, and the other values.

    Defences without clean images do not count: what they did at one size of the clean set stands at all.
    """
    there = set(rows[rows["seconds"].notna() & rows["defence"].isin(SIGHTED)][along])
    return rows[rows[along].isin(there)], sorted(set(rows[along]) - there)
