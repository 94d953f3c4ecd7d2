"""README.md's tables, from the records in `figures/data`: what stands between its marks."""

import re
from pathlib import Path

import pandas as pd

from ibau.report import claims, tables
from ibau.report.frame import LABELS, attack_label, of_records, of_victims, usual
from ibau.study.records import Records
from ibau.study.settings import STANDARD


def results_markdown(records: list[dict]) -> str:
    """What I-BAU and I-BAU+ leave at their default settings: a table each, and what there is no record of."""
    parts, frames = [], {name: of_records(usual(records, name)) for name in ("ibau", "ibau_plus")}
    for name, rows in frames.items():
        label = LABELS[name]
        if rows.empty:
            parts.append(f"{label}: no record at its default settings.")
            continue
        table = tables.removal_table(rows)
        parts.append(_markdown(table, f"{label}: ACC change / ASR after"))
        missing = [attack for attack in ("clean", *STANDARD) if attack not in table.index]
        parts += [f"{label} was not run on: {', '.join(missing)}."] if missing else []
    return "\n\n".join(filter(None, [*parts, tables.split_note(pd.concat(frames.values()))]))


def victims_markdown(records: list[dict]) -> str:
    """ACC and ASR of each victim of the STANDARD settings, a column for each way of training."""
    plain = [record for record in records if record["settings"]["strength"] is None]
    rows = of_victims(record for record in plain if attack_label(record["settings"]) in {"clean", *STANDARD})
    table = _markdown(tables.victims_table(rows), "ACC / ASR in %")
    return "\n\n".join(filter(None, [table, tables.split_note(rows)]))


def claims_markdown(found: claims.Evidence) -> str:
    """The paper's claims, judged for the paper's algorithm; what I-BAU+ does beside it."""
    table = _markdown(claims.judged(found), "claim")
    notes = tables.left_out(found.cells), tables.split_note(found.cells)
    return "\n\n".join(filter(None, [table, *notes]))


def _markdown(table: pd.DataFrame, corner: str) -> str:
    lines = [[corner, *table.columns], ["---"] * (1 + table.shape[1])]
    lines += [[name, *row] for name, row in zip(table.index, table.values.tolist(), strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_readme(readme: Path) -> None:
    """Put the tables of the recorded runs between README.md's marks."""
    text = readme.read_text(encoding="utf-8")
    for mark, table in (
        ("results", results_markdown(Records().defences())),
        ("attacks", victims_markdown(Records().victims())),
        ("claims", claims_markdown(claims.gather())),
    ):
        block = re.compile(rf"(<!-- {mark}:.*?-->\n).*?(<!-- end of {mark} -->)", re.DOTALL)
        text = block.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)
    readme.write_text(text, encoding="utf-8")
