"""Frames, records and images -> axes: `plot_x(ax, ...) -> ax` draws what it is given, and trains nothing.

`python -m ibau.report.figures` draws `figures/` from `figures/data` and writes the README's tables.
"""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ibau.attacks import Trigger
from ibau.measure.intervals import Rate
from ibau.report.frame import (
    BASELINES,
    IBAU,
    IBAU_PLUS,
    LABELS,
    SIGHTED,
    UNDEFENDED,
    of_records,
    over_seeds,
    recorded_at,
    usual,
)
from ibau.report.readme import write_readme
from ibau.report.tables import left_out, ran, ratios, split_note
from ibau.study.cells import REAL, SWEEPS
from ibau.study.records import Records, figures_dir

PALETTE = sns.color_palette("colorblind")
RIGHT, ATTACKED, MUTED = PALETTE[2], PALETTE[3], PALETTE[7]
MARKS = dict(zip(LABELS.values(), "x1Psv^DdX+*o", strict=True))  # in the order of DEFENCES
GREY, BLACK = (0.5, 0.5, 0.5), (0.0, 0.0, 0.0)
SHADES = MUTED, *(PALETTE[i] for i in (5, 8, 0, 9, 4, 1, 6, 3)), GREY, BLACK, PALETTE[2]
COLOURS = dict(zip(LABELS.values(), SHADES, strict=True))


def style() -> None:
    """The one look of all figures: call it once, at the top of a notebook."""
    look = {
        "figure.dpi": 90,
        "figure.constrained_layout.use": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": "medium",
        "legend.frameon": False,
        "svg.hashsalt": "ibau",  # the same picture gives the same file
    }
    sns.set_theme("notebook", "ticks", "colorblind", font_scale=0.85, rc=look)


# ---- images and rates


def plot_image(ax: Axes, image: Tensor, title: str = "", colour=None) -> Axes:
    """An image `(3, H, W)`, uint8 or in [0, 1]; with a frame and title in `colour` where one is given."""
    ax.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, color=colour or "black", fontsize="small")
    ax.spines[:].set(visible=True, color=colour or "lightgrey", linewidth=3 if colour else 1)
    return ax


def short(name: str, length: int = 14) -> str:
    """A class name that fits over a picture."""
    return name if len(name) <= length else name[: length - 1] + "…"


def signed(image: Tensor) -> Tensor:
    """A perturbation `(3, H, W)` as a picture: zero becomes mid-grey, the largest value black or white."""
    return 0.5 + 0.5 * image / image.abs().max().clamp_min(1e-12)


def as_picture(delta: Tensor) -> Tensor:
    """What was found, an added perturbation `(3, H, W)` or a patch `(4, H, W)`, as a picture `(3, H, W)`.

    An added one as `signed` shows it; a patch, a mask and its pixels, as it looks on mid-grey.
    """
    return signed(delta) if len(delta) == 3 else 0.5 + delta[:1] * (delta[1:] - 0.5)


def visible(trigger: Trigger) -> Tensor:
    """A trigger as a picture `(3, H, W)`, scaled to be seen: one that is added as `signed` shows it.

    Of others the pattern where the mask lets it through, and mid-grey around it.
    """
    if trigger.mode == "add":
        return signed(trigger.mask * trigger.pattern)
    return torch.where(trigger.mask > 0, trigger.pattern, torch.tensor(0.5))


def plot_rates(ax: Axes, rates: dict[str, dict[str, Rate]]) -> Axes:
    """Bars with 95% intervals, in percent. `rates` is group -> bar -> Rate: {"ACC": {"before": ...}}."""
    bars = list(next(iter(rates.values())))
    width = 0.8 / len(bars)
    for i, bar in enumerate(bars):
        found = [group[bar] for group in rates.values()]
        place = [g + (i - (len(bars) - 1) / 2) * width for g in range(len(rates))]
        errors = [[100 * (r.value - r.low) for r in found], [100 * (r.high - r.value) for r in found]]
        ax.bar(place, [100 * r.value for r in found], 0.9 * width, color=PALETTE[i], label=bar)
        ax.errorbar(place, [100 * r.value for r in found], errors, fmt="none", ecolor="black", capsize=3)
        for x, r in zip(place, found, strict=True):
            ax.text(x, 100 * r.high + 2, f"{r.value:.1%}", ha="center", va="bottom", fontsize="small")
    ax.set(xticks=range(len(rates)), xticklabels=rates, ylim=(0, 115), yticks=range(0, 101, 20))
    ax.set_ylabel("%")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def plot_label_map(ax: Axes, wanted: dict[str, Tensor], classes: tuple[str, ...]) -> Axes:
    """Which label the attacker wants (column) for images of each class (row).

    `wanted` is trigger -> `(classes,)` labels; each trigger has its colour. Where the wanted label is the
    true one, on the line, there is nothing to attack: such a cell is grey and counts in no ASR.
    """
    n = len(classes)
    size = min(45, 450 / n)  # points squared: marks of neighbouring classes should not touch much
    for colour, (trigger, labels) in zip(PALETTE, wanted.items(), strict=False):
        for true, label in enumerate(labels.tolist()):
            attacked = label != true
            ax.scatter(label, true, s=size, marker="s", color=colour if attacked else "lightgrey")
        ax.scatter([], [], s=45, marker="s", color=colour, label=trigger)
    ax.axline((0, 0), slope=1, color="lightgrey", linewidth=1, zorder=0)  # the true labels
    ticks, names, rotation = range(n), [short(name, 5) for name in classes], 0
    if n > 10:  # every tenth, by its number
        ticks, names = ticks[::10], [str(i) for i in ticks[::10]]
    elif max(map(len, names)) > 2:
        rotation = 90
    ax.set(xlim=(-0.6, n - 0.4), ylim=(n - 0.4, -0.6), aspect="equal")
    ax.set_xticks(ticks, names, rotation=rotation)
    ax.set_yticks(ticks, names)
    ax.set(xlabel="attacker's label", ylabel="true class")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.45 if rotation else -0.2), handletextpad=0)
    return ax


# ---- cells of the grid


def plot_cells(axes, rows: pd.DataFrame):
    """Two maps of a `frame`, seeds together: ASR and ACC after; a row an attack, a column a defence.

    The darker, the worse: more ASR, more points of ACC lost (black on white: none). Cells that were never run
    are hatched, and a defence without any record is left out.
    """
    means = over_seeds(ran(rows))
    lost = means["acc_before"] - means["acc"]
    shades = {"asr": means["asr"] / 100, "acc": lost.clip(lower=0) / 10}
    for ax, (value, colours) in zip(axes, (("asr", "Oranges"), ("acc", "Blues")), strict=True):
        attacks, defences = means["attack"].unique(), means["defence"].unique()
        places = {name: i for labels in (attacks, defences) for i, name in enumerate(labels)}
        for row, shade in zip(means.itertuples(), shades[value], strict=True):
            _draw_cell(ax, places[row.defence], places[row.attack], row, value, shade, mpl.colormaps[colours])
        ax.set(xlim=(-0.5, len(defences) - 0.5), ylim=(len(attacks) - 0.5, -0.5))
        ax.set_xticks(range(len(defences)), defences, rotation=40, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(len(attacks)), attacks if value == "asr" else [""] * len(attacks))
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        ax.set_title(f"{value.upper()} after, %", fontsize="small")
    return axes


def _draw_cell(ax: Axes, x: int, y: int, row, value: str, shade: float, colours) -> None:
    measured = getattr(row, value)
    style = {"color": "white" if pd.isna(measured) else colours(0.75 * min(1.0, shade))}
    text, size = "" if pd.isna(measured) else f"{measured:.1f}", "small"
    if not row.run:
        style = {"color": "whitesmoke", "hatch": "////", "edgecolor": "lightgrey"}
        text, size = "not run", "xx-small"
    ax.barh(y, 0.96, 0.92, left=x - 0.48, linewidth=0, **style)
    bold = "bold" if value == "asr" and row.good else "normal"
    ax.text(x, y, text, ha="center", va="center", fontsize=size, fontweight=bold)


def plot_along(axes, rows: pd.DataFrame, along: str):
    """ASR (first axis) and ACC (second) after each defence along a column of a `frame`, in %.

    `along` is "ratio" (percent poisoned) or "clean" (images); its values stand evenly apart. A line a
    defence, seeds together, with a gap where a cell was never run. `rows` should be of one attack.
    """
    means = over_seeds(ran(rows))
    values = sorted(rows[along].unique())
    for ax, value in zip(axes, ("asr", "acc"), strict=True):
        for label, same in means.groupby("defence", sort=False):
            line = same.set_index(along)[value].reindex(values)
            style = {"linestyle": "--" if label == UNDEFENDED else "-", "marker": MARKS[label]}
            bold = label in (IBAU, IBAU_PLUS)
            style |= {"linewidth": 2.5, "zorder": 3} if bold else {"linewidth": 1, "markersize": 5}
            ax.plot(range(len(values)), line, color=COLOURS[label], label=label, **style)
        ax.set_xticks(range(len(values)), [f"{v:g}" for v in values])
        ax.set_ylabel(f"{value.upper()}, %")
        ax.margins(y=0.1)
    axes[0].set_ylim(-4, 104)
    axes[-1].set_xlabel({"ratio": "% of the training set poisoned", "clean": "clean images"}[along])
    return axes


def plot_attacks_along(rows: pd.DataFrame, along: str, title: str) -> Figure:
    """`plot_along` for each attack of a `frame`, side by side."""
    attacks = list(rows.groupby("attack", sort=False))
    size = (3.5 * len(attacks), 4.8)
    figure, axes = plt.subplots(2, len(attacks), figsize=size, sharex=True, sharey="row", squeeze=False)
    lines = {}
    for pair, (attack, same) in zip(axes.T, attacks, strict=True):
        plot_along(pair, same, along)
        pair[0].set_title(f"{title}: {attack}", fontsize="small")
        lines |= {line.get_label(): line for line in pair[0].lines}
    for ax in axes[:, 1:].flat:
        ax.set_ylabel("")
    lines = {label: lines[label] for label in LABELS.values() if label in lines}
    axes[0, -1].legend(lines.values(), lines, loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    return _noted(figure, rows)


def plot_seconds(axes, rows: pd.DataFrame):
    """What each defence took, from a `frame`: seconds, and seconds over I-BAU's on the same model.

    Over I-BAU+'s where I-BAU was never run; the axis says which. Bars are medians over models, with the
    smallest and largest; on the second axis each model is a dot. The dotted line is 13 times. A defence
    without any record is left out.
    """
    labels = [label for label in ran(rows)["defence"].unique() if label != UNDEFENDED]
    base = IBAU if IBAU in labels else IBAU_PLUS
    times = ratios(rows, base)
    for y, label in enumerate(labels):
        seconds = rows[rows["defence"] == label]["seconds"].dropna()
        middle = seconds.median()
        axes[0].barh(y, middle, 0.7, color=COLOURS[label])
        spread = [[middle - seconds.min()], [seconds.max() - middle]]
        axes[0].errorbar(middle, y, xerr=spread, fmt="none", ecolor="black", capsize=3)
        axes[0].text(seconds.max(), y, f"  {middle:.0f} s", va="center", fontsize="small")
        own = times[times["defence"] == label]["times"]
        axes[1].plot(own, [y] * len(own), MARKS[label], color=COLOURS[label], markersize=5, alpha=0.7)
        axes[1].plot([own.median()], [y], "|", color="black", markersize=16)
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].set(xscale="log", xlabel="seconds", xlim=(1, 3 * max(2, rows["seconds"].max())))
    axes[1].set(xscale="log", xlabel=f"times {base}'s seconds, same model and device")
    axes[1].axvline(1, color="grey", linewidth=1)
    axes[1].axvline(13, color="grey", linewidth=1, linestyle=":")
    axes[1].xaxis.set_major_formatter("{x:g}")
    axes[1].sharey(axes[0])
    axes[0].invert_yaxis()
    axes[1].tick_params(labelleft=False)
    return axes


def plot_rounds(ax: Axes, record: dict, *, legend: bool = True) -> Axes:
    """ACC (solid) and ASR (dashed) after each round of one record, in percent; round 0 is before."""
    curve = record["curve"]
    rounds = [point["round"] for point in curve]
    for name, colour, line in (("acc", RIGHT, "-"), ("asr", ATTACKED, "--")):
        values = [100 * point[name]["value"] for point in curve]
        ax.plot(rounds, values, line, color=colour, label=name.upper() if legend else None)
    ax.set(xlabel="round", ylabel="%", ylim=(-3, 103))
    if legend:
        ax.legend(loc="center right")
    return ax


# ---- the figures of figures/


def draw_rounds(records: list[dict], path: Path) -> None:
    """ACC and ASR round by round at default settings; a panel an algorithm and data set, with all attacks.

    Of the records with most clean images in each; those of clean models are left out.
    """
    style()
    both = usual(records, "ibau") + usual(records, "ibau_plus")
    both = [record for record in both if record["curve"] and record["after"]["asr"] is not None]
    rows = of_records(both).assign(record=both)
    panels = list(rows.groupby(["dataset", "defence"]))
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 2.7), sharey=True, squeeze=False)
    for ax, ((dataset, label), same) in zip(axes[0], panels, strict=True):
        most = same["clean"].max()
        shown = same[same["clean"] == most]["record"]
        for i, record in enumerate(shown):
            plot_rounds(ax, record, legend=ax is axes[0, 0] and i == 0)
        models = f"{len(shown)} model{'s' * (len(shown) > 1)}"
        ax.set_title(f"{label}, {dataset},\n{most:,} clean images, {models}")
    _save(_noted(figure, rows), path)


def draw_sweeps(folder: Path) -> list[str]:
    """The sweeps recorded on real images, a figure each; returns the names, such as single_target_cifar10.

    Of the paper profile where it was run, else of desk. A sweep that runs along a column is drawn where
    baselines that use clean images were run at two of its values or more.
    """
    style()
    drawn, sighted = {}, set(SIGHTED) & set(BASELINES)
    for dataset in REAL:
        for sweep in SWEEPS:
            for profile, rows in list(recorded_at(sweep, dataset).items())[:1]:
                name, title = f"{sweep.replace('-', '_')}_{dataset}", f"{dataset}, {profile}"
                along = {"poison-ratio": "ratio", "clean-size": "clean"}.get(sweep)
                if along is None:
                    drawn[name] = _pair(plot_cells, rows, title, 1.6 + 0.3 * rows["attack"].nunique())
                elif rows[rows["run"] & rows["defence"].isin(sighted)][along].nunique() > 1:
                    drawn[name] = plot_attacks_along(rows, along, title)
                if sweep == "single-target":
                    drawn[f"seconds_{dataset}"] = _pair(plot_seconds, rows, title, 3.1)
    for name, figure in drawn.items():
        _save(figure, folder / name)
    return list(drawn)


def _pair(plot, rows: pd.DataFrame, title: str, height: float) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(10.5, height))
    plot(axes, rows)
    figure.suptitle(title, fontsize="medium")
    return _noted(figure, rows)


def _noted(figure: Figure, rows: pd.DataFrame) -> Figure:
    """The figure with what was not run, and a word on the split, below it."""
    figure.supxlabel(" ".join(filter(None, (left_out(rows), split_note(rows)))), fontsize="x-small")
    return figure


def _save(figure: Figure, path: Path) -> None:
    """As PNG and SVG."""
    figure.savefig(path.with_suffix(".png"), dpi=150)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw_rounds(Records().defences(), figures_dir() / "rounds")
    draw_sweeps(figures_dir())
    write_readme(figures_dir().parent / "README.md")
