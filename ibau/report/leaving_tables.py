"""What a single notebook uses: it moves there, piece by piece, and this file goes with the last piece."""

from collections.abc import Iterable
from dataclasses import replace
from statistics import mean, stdev

import pandas as pd

from ibau.attacks import ALL_TO_ALL
from ibau.defences import DEFENCES
from ibau.defences.inversion import POLICIES
from ibau.report.frame import match
from ibau.study import grid
from ibau.study.records import key

# ---- notebook 05_baselines


def _cell(rates: list[dict]) -> str:
    values = [100 * rate["value"] for rate in rates]
    if len(values) == 1:
        return f"{values[0]:.1f} [{100 * rates[0]['low']:.1f}, {100 * rates[0]['high']:.1f}]"
    return f"{mean(values):.1f} ± {stdev(values):.1f}"


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
