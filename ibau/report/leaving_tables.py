"""What a single notebook uses: it moves there, piece by piece, and this file goes with the last piece."""

from collections.abc import Iterable
from dataclasses import replace
from statistics import mean, stdev

import pandas as pd

from ibau.attacks import ALL_TO_ALL
from ibau.defences import DEFENCES
from ibau.defences.inversion import POLICIES
from ibau.report.frame import attack_label, match
from ibau.study import grid
from ibau.study.records import key
from ibau.study.settings import STANDARD

# ---- notebook 02_attack_generation


def _cell(rates: list[dict]) -> str:
    values = [100 * rate["value"] for rate in rates]
    if len(values) == 1:
        return f"{values[0]:.1f} [{100 * rates[0]['low']:.1f}, {100 * rates[0]['high']:.1f}]"
    return f"{mean(values):.1f} ± {stdev(values):.1f}"


def trained_alike(records: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """Victims' records by how they were trained, and in that by their label in the STANDARD settings.

    The outer key names the data set, its training images and the epochs; records that differ in anything
    but attack, target and seed are kept apart, with a number where the name would not tell them. Records of
    other attacks, or of another strength than the default, are left out.
    """
    labels = {"clean", *STANDARD}
    groups: dict[str, dict[str, list[dict]]] = {}
    names: dict[str, str] = {}
    for record in records:
        about = record["settings"]
        label = attack_label(about)
        if label not in labels or about["strength"] is not None:
            continue
        common = {k: v for k, v in about.items() if k not in ("attack", "target", "seed", "split_seed")}
        named = key(common)
        if named not in names:
            name = (
                f"{about['dataset']}, {about['train_images']:,} images, {about['training']['epochs']} epochs"
            )
            same = sum(other.startswith(name) for other in names.values())
            names[named] = f"{name} ({same + 1})" if same else name
        groups.setdefault(names[named], {}).setdefault(label, []).append(record)
    return groups


def victims_table(found: dict[str, list[dict]], expected: dict[str, float]) -> pd.DataFrame:
    """One row per label of `expected`, the clean model first: ACC and ASR in percent, and what was expected.

    `found` is one of the groups of `trained_alike`, `expected` label -> the least ASR. ACC should be within
    2 points of the clean model's. A model that was never trained has "not run" in its row.
    """
    clean = _mean(found["clean"], "acc") if "clean" in found else None
    rows = {}
    for label in ("clean", *expected):
        same = found.get(label, [])
        if not same:
            rows[label] = {"ACC": "not run", "ASR": "", "n": "", "ACC - clean": "", "as expected": ""}
            continue
        attacked = same[0]["measured"]["asr"] is not None
        change = None if clean is None or not attacked else 100 * (_mean(same, "acc") - clean)
        rows[label] = {
            "ACC": _cell([record["measured"]["acc"] for record in same]),
            "ASR": _cell([record["measured"]["asr"] for record in same]) if attacked else "",
            "n": sum(record["measured"]["asr" if attacked else "acc"]["n"] for record in same),
            "ACC - clean": "" if change is None else f"{change:+.1f}",
            "as expected": _verdict(same, change, expected[label]) if attacked else "",
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def _verdict(same: list[dict], change: float | None, least: float) -> str:
    if _mean(same, "asr") < least:
        return f"no: ASR < {least:.0%}"
    if change is None:
        return "no clean model"
    return "yes" if round(change, 6) >= -2 else "no: ACC"


def _mean(records: list[dict], rate: str) -> float:
    return mean(record["measured"][rate]["value"] for record in records)


STEALTH = {  # the measures shown, see attacks.stealth
    "l0": "l0, pixels",
    "l2": "l2",
    "linf": "l∞",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "high_frequency": "HF of change",
    "high_frequency_clean": "HF clean",
    "high_frequency_poisoned": "HF poisoned",
}


def stealth_table(found: dict[str, list[dict]]) -> pd.DataFrame:
    """How well each trigger hides: a row per label of a single trigger, from a group of `trained_alike`."""
    rows = {}
    for label, same in found.items():
        if len(same[0]["attacks"]) != 1 or same[0]["settings"]["target"] == ALL_TO_ALL:
            continue  # no trigger, several, or one that has a row already
        measured = [record["attacks"][0]["stealth"] for record in same]
        rows[label] = {name: mean(values[name] for values in measured) for name in STEALTH}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(STEALTH)).rename(columns=STEALTH)
    return table.reindex([label for label in STANDARD if label in rows])


def triggers_table(groups: dict[str, list[dict]]) -> pd.DataFrame:
    """ASR of each trigger of models with several, in percent: a row a trigger, a column a group."""
    columns = {}
    for name, same in groups.items():
        each = zip(*(record["attacks"] for record in same), strict=True)
        columns[name] = {f"{a[0]['attack']} → {a[0]['target']}": _cell([x["asr"] for x in a]) for a in each}
    return pd.DataFrame(columns)


# ---- notebook 05_baselines


def by_defence(cells: Iterable[grid.Cell], records: list[dict]) -> dict[str, list[dict]]:
    """The records of these cells by their defence's label; an empty list where there is none.

    They are told by their settings, so that no data are needed. A defence with a policy for the case that no
    class is flagged has two labels, "<label>, leave" and "<label>, smallest". Where one is flagged the
    policies coincide, and a record of either is one of both.
    """
    asked: dict[str, list[grid.Cell]] = {}
    for cell in cells:
        if cell.defence == grid.NONE:
            continue
        either = {DEFENCES[cell.defence].label: cell}
        if hasattr(cell.settings, "unflagged"):
            either = {
                f"{label}, {policy}": replace(cell, settings=replace(cell.settings, unflagged=policy))
                for label in either
                for policy in POLICIES
            }
        for label, one in either.items():
            asked.setdefault(label, []).append(one)
    found = match([one for same in asked.values() for one in same], records)
    return {label: [found[one] for one in same if found[one]] for label, same in asked.items()}


def defences_table(found: dict[str, list[dict]]) -> pd.DataFrame:
    """A row per label of `found`, its records' seeds together, after one for the models before any defence.

    ACC, ASR and RA in percent (see `results_table`), seconds, these over I-BAU's, and the largest memory the
    process took. A label without records has "not run" in its row; a clean model no ASR and RA.
    """
    models = {key(r["settings"]["victim"]): r["before"] for same in found.values() for r in same}
    rows = {"undefended": _measured_cells(list(models.values()))}
    own = [record["seconds"] for record in found.get(DEFENCES["ibau"].label, [])]
    for label, same in found.items():
        rows[label] = _measured_cells([record["after"] for record in same])
        if same:
            seconds = [record["seconds"] for record in same]
            memory = [record["peak_memory_mb"] for record in same if record["peak_memory_mb"]]
            spread = f" ± {stdev(seconds):.0f}" if len(seconds) > 1 else ""
            rows[label] |= {
                "seconds": f"{mean(seconds):.0f}{spread}",
                "× I-BAU": f"{mean(seconds) / mean(own):.1f}" if own else "",
                "peak, MB": f"{max(memory):.0f}" if memory else "",
            }
    columns = ["ACC", "ASR", "RA", "seconds", "× I-BAU", "peak, MB"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["seeds", *columns]).fillna("")


def _measured_cells(measured: list[dict]) -> dict[str, str]:
    if not measured:
        return {"seeds": "", "ACC": "not run"}
    rates = {name.upper(): [m[name] for m in measured] for name in ("acc", "asr", "ra")}
    cells = {name: "" if same[0] is None else _cell(same) for name, same in rates.items()}
    return {"seeds": str(len(measured)), **cells}


def flags_table(found: dict[str, list[dict]]) -> pd.DataFrame:
    """What the defences that flag classes said: a row each, a column for each kind of victim in `found`.

    Of models that have one target in how many it was flagged, of all others in how many no class was.
    """
    flagging = {name: d.label for name, d in DEFENCES.items() if hasattr(d.settings, "unflagged")}
    rows: dict[str, dict[str, str]] = {label: {} for label in flagging.values()}
    for kind, records in found.items():
        for name, label in flagging.items():
            same = [record for record in records if record["settings"]["defence"] == name]
            if same:
                rows[label][kind] = _flagged(same)
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(found)).fillna("not run")


def _flagged(records: list[dict]) -> str:
    victim = records[0]["settings"]["victim"]
    aimed = victim["attack"] != "none" and victim["target"] != ALL_TO_ALL
    flags = [[line["class"] for line in r["evidence"]["classes"] if line["flagged"]] for r in records]
    right = sum(victim["target"] in some if aimed else not some for some in flags)
    return f"{'the target' if aimed else 'no class'} in {right} of {len(records)}"
