"""Records and images -> axes and tables: `plot_x(ax, ...) -> ax` draws what it is given, trains nothing."""

import re
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from ibau.attacks import ALL_TO_ALL, Trigger
from ibau.cleaning.recipe import IBAUSettings
from ibau.defences import DEFENCES
from ibau.defences.inversion import POLICIES
from ibau.measure.intervals import Rate
from ibau.measure.stealth import spectrum
from ibau.report import claims, tables
from ibau.report.tables import OURS, UNDEFENDED, attack_label, match, misses, over_seeds
from ibau.study import grid
from ibau.study import records as study_records
from ibau.study import settings as study_settings

PALETTE = sns.color_palette("colorblind")
RIGHT, ATTACKED, MUTED = PALETTE[2], PALETTE[3], PALETTE[7]
VERDICTS = {"right": RIGHT, "what the attacker wants": ATTACKED, "wrong otherwise": MUTED}


def style() -> None:
    """The one look of all figures: call it once, at the top of a notebook."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", font_scale=0.85)
    mpl.rcParams.update(
        {
            "figure.dpi": 90,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": "medium",
            "legend.frameon": False,
        }
    )


def plot_image(ax: Axes, image: Tensor, title: str = "", colour=None) -> Axes:
    """An image `(3, H, W)`, uint8 or in [0, 1]; with a frame and title in `colour` where one is given."""
    ax.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, color=colour or "black", fontsize="small")
    ax.spines[:].set(visible=True, color=colour or "lightgrey", linewidth=3 if colour else 1)
    return ax


def plot_prediction(
    ax: Axes, image: Tensor, label: int, predicted: int, wanted: int | None, classes: tuple[str, ...]
) -> Axes:
    """An image with what the model says, coloured by verdict; `wanted` is the attacker's label, if any."""
    verdict = "right" if predicted == label else "wrong otherwise"
    if wanted is not None and predicted == wanted != label:
        verdict = "what the attacker wants"
    return plot_image(ax, image, short(classes[predicted]), VERDICTS[verdict])


def plot_verdicts(
    axes, images: Tensor, labels: Tensor, predicted: Tensor, wanted: Tensor | None, classes: tuple[str, ...]
):
    """A row of images with their predictions, as plot_prediction draws one. Tensors have an entry an axis."""
    for i, ax in enumerate(axes):
        goal = None if wanted is None else int(wanted[i])
        plot_prediction(ax, images[i], int(labels[i]), int(predicted[i]), goal, classes)
    return axes


def verdict_legend(figure: Figure) -> None:
    """Below the figure: which colour means what."""
    patches = [Patch(color=colour, label=verdict) for verdict, colour in VERDICTS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches))


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
    ticks, names, rotation = _class_ticks(classes)
    ax.set(xlim=(-0.6, n - 0.4), ylim=(n - 0.4, -0.6), aspect="equal")
    ax.set_xticks(ticks, names, rotation=rotation)
    ax.set_yticks(ticks, names)
    ax.set(xlabel="attacker's label", ylabel="true class")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.45 if rotation else -0.2), handletextpad=0)
    return ax


def plot_label_counts(ax: Axes, labels: Tensor, groups: dict[str, Tensor], classes: tuple[str, ...]) -> Axes:
    """How many training images bear each label, clean ones at the bottom.

    `labels` `(N,)` are those the victim sees; `groups` is trigger -> indices of its images.
    """
    clean = labels.bincount(minlength=len(classes))
    counts = {name: labels[indices].bincount(minlength=len(classes)) for name, indices in groups.items()}
    for count in counts.values():
        clean = clean - count
    places = range(len(classes))
    ax.bar(places, clean, color=MUTED, label="clean")
    bottom = clean
    for colour, (name, count) in zip(PALETTE, counts.items(), strict=False):
        ax.bar(places, count, bottom=bottom, color=colour, label=name)
        bottom = bottom + count
    ticks, names, rotation = _class_ticks(classes)
    ax.set_xticks(ticks, names, rotation=rotation)
    ax.set(xlabel="label in the training set", ylabel="images")
    return ax


def plot_splits(ax: Axes, rows: dict[str, dict[str, tuple[int, str]]]) -> Axes:
    """Who sees which images. `rows` is split -> part -> (number of images, who sees it), drawn to scale."""
    colour = iter(PALETTE)
    for y, parts in enumerate(rows.values()):
        left, total = 0.0, sum(count for count, _ in parts.values())
        for name, (count, who) in parts.items():
            share = count / total
            ax.barh(y, share, 0.5, left=left, color=(*next(colour), 0.75), edgecolor="white", linewidth=2)
            middle = left + share / 2
            ax.text(middle, y, f"{name}\n{count:,}", ha="center", va="center", fontsize="small")
            ax.text(middle, y + 0.3, who, ha="center", va="top", fontsize="small")
            left += share
    ax.set(yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.25, -0.35), xlim=(0, 1), xticks=[])
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return ax


ROLES = {"controls": (*PALETTE[0], 0.75), "knows": (*PALETTE[0], 0.25), "nothing": "whitesmoke"}


def plot_roles(ax: Axes, roles: dict[str, dict[str, str]]) -> Axes:
    """Who controls what, who knows what. `roles` is thing -> who -> what is written into their cell.

    The cell has the colour of the first word in it that ROLES has, or else that of "nothing".
    """
    for y, cells in enumerate(roles.values()):
        for x, text in enumerate(cells.values()):
            role = next((word for word in re.findall(r"\w+", text) if word in ROLES), "nothing")
            ax.barh(y, 0.96, 0.92, left=x - 0.48, color=ROLES[role])
            ax.text(x, y, text, ha="center", va="center", fontsize="small")
    people = list(next(iter(roles.values())))
    ax.set_xticks(range(len(people)), people)
    ax.set_yticks(range(len(roles)), roles)
    ax.set(xlim=(-0.5, len(people) - 0.5), ylim=(len(roles) - 0.5, -0.5))
    ax.xaxis.tick_top()
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return ax


def _class_ticks(classes: tuple[str, ...]) -> tuple[list[int], list[str], int]:
    """Places, names and rotation of the ticks of an axis of classes; of many, every tenth by its number."""
    if len(classes) > 10:
        ticks = list(range(0, len(classes), 10))
        return ticks, [str(i) for i in ticks], 0
    names = [short(name, 5) for name in classes]
    return list(range(len(classes))), names, 90 if max(map(len, names)) > 2 else 0


def short(name: str, length: int = 14) -> str:
    """A class name that fits over a picture."""
    return name if len(name) <= length else name[: length - 1] + "…"


def signed(image: Tensor) -> Tensor:
    """A perturbation `(3, H, W)` as a picture: zero becomes mid-grey, the largest value black or white."""
    return 0.5 + 0.5 * image / image.abs().max().clamp_min(1e-12)


def as_picture(delta: Tensor) -> Tensor:
    """What unlearning found, `(3, H, W)` or a mask and a picture `(4, H, W)`, as a picture `(3, H, W)`.

    One that is added as `signed` shows it, one that replaces as it looks on mid-grey.
    """
    return signed(delta) if len(delta) == 3 else 0.5 + delta[:1] * (delta[1:] - 0.5)


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


def results_table(records: list[dict]) -> pd.DataFrame:
    """One row per setting of I-BAU, seeds together: ACC and ASR before and after, RA after, DER; in percent.

    Over several seeds a cell is mean ± standard deviation, for a single one the value with its 95% interval.
    """
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        about, victim = record["settings"], record["settings"]["victim"]
        setting = {
            "data set": victim["dataset"],
            "attack": attack_label(victim),
            "training images": victim["train_images"],
            "epochs": victim["training"]["epochs"],
            "clean images": about["clean_images"],
            "perturbation": about["defence_settings"]["perturbation"],
            "K": about["defence_settings"]["K"],
        }
        groups.setdefault(tuple(setting.items()), []).append(record)
    rows = []
    for setting, same in sorted(groups.items(), key=str):
        cells = {
            f"{name.upper()} {when}": _cell([record[when][name] for record in same])
            for name, when in (
                ("acc", "before"),
                ("acc", "after"),
                ("asr", "before"),
                ("asr", "after"),
                ("ra", "after"),
                ("der", "after"),
            )
        }
        rows.append({**dict(setting), "seeds": len(same), **cells})
    return pd.DataFrame(rows)


def _cell(rates: list[dict]) -> str:
    values = [100 * rate["value"] for rate in rates]
    if len(values) == 1:
        return f"{values[0]:.1f} [{100 * rates[0]['low']:.1f}, {100 * rates[0]['high']:.1f}]"
    return f"{mean(values):.1f} ± {stdev(values):.1f}"


def usual(records: list[dict], settings: IBAUSettings | None = None) -> list[dict]:
    """The records of I-BAU at these settings (None: the default), against the STANDARD attacks at theirs."""
    labels, wanted = {"clean", *study_settings.STANDARD}, asdict(settings or IBAUSettings())
    return [
        record
        for record in records
        if record["settings"]["defence_settings"] == wanted
        and record["settings"]["victim"]["strength"] is None
        and record["settings"]["victim"]["poison_ratio"] == study_settings.VictimSettings.poison_ratio
        and attack_label(record["settings"]["victim"]) in labels
    ]


def removal_table(records: list[dict]) -> pd.DataFrame:
    """Change of ACC in points / ASR after in percent: a row an attack, a column a data set and clean set.

    The largest clean set of each data set and the smallest; notebook 10 has those between. Means over seeds,
    whose number the column names where it is not 1. A * marks what misses its goal: ACC down by at most 2
    points and ASR at most 10% (with 100 clean images: 5 and 20), a clean model's ACC down by at most 1 (5).
    Cells that were never run say so.
    """
    columns: dict[tuple, dict[str, list[dict]]] = {}
    for record in usual(records):
        about = record["settings"]
        column = columns.setdefault((about["victim"]["dataset"], -about["clean_images"]), {})
        column.setdefault(attack_label(about["victim"]), []).append(record)
    labels = ("clean", *study_settings.STANDARD)
    sizes = {dataset: [size for name, size in columns if name == dataset] for dataset, _ in columns}
    return pd.DataFrame(
        {
            f"{dataset}, {-size:,} clean": [_removal(found.get(label, []), -size) for label in labels]
            for (dataset, size), found in sorted(columns.items())
            if size in (min(sizes[dataset]), max(sizes[dataset]))
        },
        index=pd.Index(labels, name="ACC change / ASR after"),
    )


def variants_table(records: list[dict], variants: dict[str, IBAUSettings]) -> pd.DataFrame:
    """The cells of `removal_table` for settings that differ: a row an attack, a column a variant.

    All records should be of one data set and clean set.
    """
    labels = ("clean", *study_settings.STANDARD)
    columns = {}
    for name, settings in variants.items():
        found: dict[str, list[dict]] = {}
        for record in usual(records, settings):
            found.setdefault(attack_label(record["settings"]["victim"]), []).append(record)
        sizes = {r["settings"]["clean_images"] for same in found.values() for r in same} or {0}
        columns[name] = [_removal(found.get(label, []), max(sizes)) for label in labels]
    return pd.DataFrame(columns, index=pd.Index(labels, name="ACC change / ASR after"))


def _removal(same: list[dict], clean_images: int) -> str:
    if not same:
        return "not run"
    change = 100 * mean(r["after"]["acc"]["value"] - r["before"]["acc"]["value"] for r in same)
    attacked = same[0]["after"]["asr"] is not None
    asr = 100 * mean(r["after"]["asr"]["value"] for r in same) if attacked else None
    rates = f"{change:+.1f} / {asr:.1f}" if attacked else f"{change:+.1f}"
    seeds = f" (n = {len(same)})" if len(same) > 1 else ""
    return f"{rates}{'*' * misses(change, asr, clean_images)}{seeds}"


def results_markdown(records: list[dict]) -> str:
    """README.md's results: `removal_table` as a Markdown table."""
    table = removal_table(records).reset_index()
    return _markdown(list(table.columns), table.values.tolist())


def victims_markdown(records: list[dict]) -> str:
    """README.md's attacks: ACC and ASR of each victim, a column for each way of training."""
    groups = trained_alike(records)
    rows = [
        [label, *(_acc_and_asr(found.get(label, [])) for found in groups.values())]
        for label in ("clean", *study_settings.STANDARD)
    ]
    return _markdown(["ACC / ASR in %", *groups], rows)


def claims_markdown(found: claims.Evidence) -> str:
    """README.md's claims: `claims.judged` as a Markdown table."""
    table = claims.judged(found).reset_index()
    return _markdown(list(table.columns), table.values.tolist())


def _acc_and_asr(same: list[dict]) -> str:
    if not same:
        return "not run"
    acc = f"{_mean(same, 'acc'):.1%}".rstrip("%")
    return acc if same[0]["measured"]["asr"] is None else f"{acc} / {_mean(same, 'asr'):.1%}".rstrip("%")


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def visible(trigger: Trigger) -> Tensor:
    """A trigger as a picture `(3, H, W)`, scaled to be seen: one that is added as `signed` shows it.

    Of others the pattern where the mask lets it through, and mid-grey around it.
    """
    if trigger.mode == "add":
        return signed(trigger.mask * trigger.pattern)
    return torch.where(trigger.mask > 0, trigger.pattern, torch.tensor(0.5))


def plot_spectrum(ax: Axes, change: Tensor, title: str = "") -> Axes:
    """DCT magnitudes of a change `(3, H, W)`, averaged over channels, as powers of ten from 10^-3 to 10.

    The mean is in the upper left corner; beyond the dashed line `stealth` calls frequencies high.
    """
    magnitude = spectrum(change).mean(0).clamp(min=1e-9).log10()
    height, width = magnitude.shape
    ax.imshow(magnitude.numpy(), cmap="magma", vmin=-3, vmax=1, interpolation="nearest")
    ax.plot([-0.5, width - 0.5], [height - 0.5, -0.5], "--", color="white", linewidth=1)
    ax.set(xticks=[], yticks=[], xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    ax.set_title(title, fontsize="small")
    ax.spines[:].set(visible=True, color="lightgrey")
    return ax


def plot_rise(ax: Axes, settings: dict) -> Axes:
    """How an optimised trigger grew, from its settings: its neurons' activation, or the share it fooled.

    Where neurons were driven, the line is their highest activation on any clean image. An axis stays empty
    for a trigger that was not optimised.
    """
    if "activation_by_step" in settings:
        steps, before_after = settings["activation_by_step"], settings["activation"]
        ax.plot(range(1, len(steps) + 1), steps, color=ATTACKED)
        ax.axhline(before_after["clean_max"], color=MUTED, linestyle="--", linewidth=1)
        ax.axhline(before_after["before"], color=MUTED, linestyle=":", linewidth=1)
        ax.set(xlabel="step", ylim=(min(0, *steps), 1.1 * max(*steps, before_after["clean_max"])))
        ax.set_title("activation", fontsize="small")
    elif "fooled_by_pass" in settings:
        shares = settings["fooled_by_pass"]
        ax.plot(range(1, len(shares) + 1), [100 * share for share in shares], "o-", color=ATTACKED)
        ax.set(xlabel="pass", xticks=range(1, len(shares) + 1), ylim=(0, 115 * max(shares) or 1))
        ax.set_title("% fooled", fontsize="small")
    else:
        ax.set_axis_off()
    ax.yaxis.tick_right()  # on the left it would run into the picture beside it
    ax.spines[["left", "right"]].set_visible(False)
    return ax


def plot_gallery(axes, image: Tensor, trigger: Trigger):
    """One trigger on one image `(3, H, W)` in [0, 1], on six axes.

    The image; the trigger, scaled to be seen; the image with it; their difference, scaled; its DCT spectrum;
    and how the trigger grew.
    """
    poisoned = trigger(image[None])[0]
    change = poisoned - image
    plot_image(axes[0], image, "clean")
    plot_image(axes[1], visible(trigger), "trigger, scaled")
    plot_image(axes[2], poisoned, "poisoned")
    plot_image(axes[3], signed(change), f"difference, max {change.abs().max():.2f}")
    plot_spectrum(axes[4], change, "its DCT spectrum")
    plot_rise(axes[5], trigger.settings)
    return axes


def plot_strengths(ax: Axes, curves: pd.DataFrame) -> Axes:
    """PSNR against strength, a line an attack, each one's default marked.

    `curves` has the columns attack, times (the strength as a multiple of the default) and psnr. Beyond
    45 dB, where next to nothing changes, a line leaves the chart.
    """
    markers = "osD^vP*X"
    for i, (attack, line) in enumerate(curves.groupby("attack", sort=False)):
        line, colour = line.sort_values("times"), PALETTE[i % len(PALETTE)]
        marker = markers[i % len(markers)]
        ax.plot(line["times"], line["psnr"], marker=marker, color=colour, markersize=4, label=attack)
        default = line[line["times"] == 1]
        ax.plot(
            default["times"],
            default["psnr"],
            marker=marker,
            color=colour,
            markersize=9,
            markeredgecolor="black",
        )
    ax.axhline(25, color="black", linestyle="--", linewidth=1)
    ax.set_xscale("log", base=2)
    ticks = [2.0**power for power in range(-2, 2)]
    ax.set_xticks(ticks, ["¼", "½", "1", "2"])
    ax.set(xlabel="strength, in multiples of the default", ylabel="PSNR, dB", ylim=(0, 45))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def plot_tradeoff(ax: Axes, curve: pd.DataFrame) -> Axes:
    """What a lower PSNR buys one attack; its default is marked.

    `curve` has the columns times (the strength as a multiple of the default), psnr and gain.
    """
    curve = curve.sort_values("times")
    default = curve[curve["times"] == 1]
    ax.plot(curve["psnr"], curve["gain"], "o-", markersize=4)
    ax.plot(default["psnr"], default["gain"], "o", color=PALETTE[0], markersize=9, markeredgecolor="black")
    ax.axvline(25, color="black", linestyle="--", linewidth=1)
    ax.set(xlabel="PSNR, dB", ylim=(0, None))
    ax.invert_xaxis()
    return ax


def trained_alike(records: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """Victims' records by how they were trained, and in that by their label in the STANDARD settings.

    The outer key names the data set, its training images and the epochs; records that differ in anything
    but attack, target and seed are kept apart, with a number where the name would not tell them. Records of
    other attacks, or of another strength than the default, are left out.
    """
    labels = {"clean", *study_settings.STANDARD}
    groups: dict[str, dict[str, list[dict]]] = {}
    names: dict[str, str] = {}
    for record in records:
        about = record["settings"]
        label = attack_label(about)
        if label not in labels or about["strength"] is not None:
            continue
        common = {k: v for k, v in about.items() if k not in ("attack", "target", "seed", "split_seed")}
        key = study_records.key(common)
        if key not in names:
            name = (
                f"{about['dataset']}, {about['train_images']:,} images, {about['training']['epochs']} epochs"
            )
            same = sum(other.startswith(name) for other in names.values())
            names[key] = f"{name} ({same + 1})" if same else name
        groups.setdefault(names[key], {}).setdefault(label, []).append(record)
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
    return table.reindex([label for label in study_settings.STANDARD if label in rows])


def triggers_table(groups: dict[str, list[dict]]) -> pd.DataFrame:
    """ASR of each trigger of models with several, in percent: a row a trigger, a column a group."""
    columns = {}
    for name, same in groups.items():
        each = zip(*(record["attacks"] for record in same), strict=True)
        columns[name] = {f"{a[0]['attack']} → {a[0]['target']}": _cell([x["asr"] for x in a]) for a in each}
    return pd.DataFrame(columns)


def write_readme(readme: Path) -> None:
    """Put the tables of the recorded runs between README.md's marks."""
    text = readme.read_text(encoding="utf-8")
    for mark, table in (
        ("results", results_markdown(study_records.recorded(defence="ibau"))),
        ("attacks", victims_markdown(study_records.recorded_victims())),
        ("claims", claims_markdown(claims.gather())),
    ):
        block = re.compile(rf"(<!-- {mark}:.*?-->\n).*?(<!-- end of {mark} -->)", re.DOTALL)
        text = block.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)
    readme.write_text(text, encoding="utf-8")


def draw_rounds(records: list[dict], path: Path) -> None:
    """ACC and ASR round by round, a panel a data set with all its attacks in it; PNG and SVG.

    Of the records with most clean images in each data set; those of clean models are left out.
    """
    style()
    attacked = [record for record in records if record["curve"] and record["after"]["asr"] is not None]
    panels: dict[str, dict[int, list[dict]]] = {}
    for record in attacked:
        about = record["settings"]
        panels.setdefault(about["victim"]["dataset"], {}).setdefault(about["clean_images"], []).append(record)
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 2.6), sharey=True, squeeze=False)
    for i, (ax, (name, sizes)) in enumerate(zip(axes[0], sorted(panels.items()), strict=True)):
        same = sizes[max(sizes)]
        for j, record in enumerate(same):
            plot_rounds(ax, record, legend=i == j == 0)
        ax.set_title(f"{name}, {max(sizes):,} clean images, {len(same)} model{'s' * (len(same) > 1)}")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """As PNG and SVG; the same picture gives the same file."""
    mpl.rcParams["svg.hashsalt"] = "ibau"
    figure.savefig(path.with_suffix(".png"), dpi=150)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)


def draw_tables(folder: Path) -> list[str]:
    """The tables recorded on real images, a figure each; returns the names, such as single_target_cifar10.

    Of the paper profile where it was run, else of desk. A table that runs along a column is drawn where
    baselines that use clean images were run at two of its values or more.
    """
    style()
    drawn, sighted = {}, set(tables.SIGHTED) & set(tables.BASELINES)
    for dataset in ("cifar10", "gtsrb"):
        for table in grid.TABLES:
            for profile, rows in list(tables.recorded_at(table, dataset).items())[:1]:
                name, title = f"{table.replace('-', '_')}_{dataset}", f"{dataset}, {profile}"
                along = {"poison-ratio": "ratio", "clean-size": "clean"}.get(table)
                if along is None:
                    drawn[name] = _pair(plot_cells, rows, title, 1.5 + 0.3 * rows["attack"].nunique())
                elif rows[rows["run"] & rows["defence"].isin(sighted)][along].nunique() > 1:
                    drawn[name] = plot_attacks_along(rows, along, title)
                if table == "single-target":
                    drawn[f"seconds_{dataset}"] = _pair(plot_seconds, rows, title, 2.9)
    for name, figure in drawn.items():
        _save(figure, folder / name)
    return list(drawn)


def _pair(plot, rows: pd.DataFrame, title: str, height: float) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(10.5, height))
    plot(axes, rows)
    figure.suptitle(title, fontsize="medium")
    return figure


# ---- defences


def plot_classes(axes, found: Tensor, classes: list[dict]):
    """What was reversed for each class, one an axis, the smallest first: class and anomaly index above it.

    `found` (classes, 3 or 4, H, W) is shown by `as_picture`; `classes` are the lines of the evidence, sorted
    here by their score, or norm where they have none. Those that were flagged are framed. Of more classes
    than axes the smallest are shown, and axes without a class stay empty.
    """
    order = sorted(classes, key=lambda line: line.get("score", line["norm"]))
    for ax, line in zip(axes, order, strict=False):
        title = f"{line['class']}: {line['anomaly_index']:.1f}"
        plot_image(ax, as_picture(found[line["class"]]), title, ATTACKED if line["flagged"] else None)
    for ax in axes[len(order) :]:
        ax.set_axis_off()
    return axes


def plot_pruning(ax: Axes, evidence: dict) -> Axes:
    """Held-out accuracy in percent by the number of channels cut off; dashed: the least that was allowed.

    The dot is where pruning stopped.
    """
    curve, stop = evidence["curve"], evidence["pruned"]
    accuracy = [100 * point["held_out_acc"] for point in curve]
    ax.plot([point["pruned"] for point in curve], accuracy)
    ax.plot([stop], [accuracy[stop]], "o", color="black")
    least = 100 * (evidence["held_out_acc_before"] - evidence["tolerance"])
    ax.axhline(least, color=MUTED, linestyle="--", linewidth=1)
    ax.set(xlabel=f"channels cut off, of {evidence['channels']}", ylabel="held-out ACC, %")
    ax.set_xlim(0, evidence["channels"])
    return ax


def plot_attention(axes, maps: dict[str, Tensor]):
    """Where a network looks: attention maps `(h, w)` by their titles, one an axis; bright is much."""
    for ax, (title, attention) in zip(axes, maps.items(), strict=True):
        ax.imshow(attention.numpy(), cmap="magma", vmin=0, interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.set_title(title, fontsize="small")
    return axes


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
    models = {
        study_records.key(r["settings"]["victim"]): r["before"] for same in found.values() for r in same
    }
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


# ---- the grid


MARKS = dict(zip((UNDEFENDED, *(d.label for d in DEFENCES.values())), "xPsv^DdXo", strict=True))
COLOURS = dict(zip(MARKS, (MUTED, *(PALETTE[i] for i in (5, 0, 9, 4, 1, 6, 3, 2))), strict=True))


def plot_cells(axes, rows: pd.DataFrame, *, names: bool = True):
    """Two maps of a `tables.frame`, seeds together: ASR and ACC after; a row an attack, a column a defence.

    The darker, the worse: more ASR, more points of ACC lost (black on white: none). Cells that were never run
    are hatched. `names` writes the attacks on the left map.
    """
    means = over_seeds(rows)
    lost = means["acc_before"] - means["acc"]
    shades = {"asr": means["asr"] / 100, "acc": lost.clip(lower=0) / 10}
    for ax, (value, colours) in zip(axes, (("asr", "Oranges"), ("acc", "Blues")), strict=True):
        attacks, defences = means["attack"].unique(), means["defence"].unique()
        places = {name: i for labels in (attacks, defences) for i, name in enumerate(labels)}
        for row, shade in zip(means.itertuples(), shades[value], strict=True):
            _draw_cell(ax, places[row.defence], places[row.attack], row, value, shade, mpl.colormaps[colours])
        ax.set(xlim=(-0.5, len(defences) - 0.5), ylim=(len(attacks) - 0.5, -0.5))
        ax.set_xticks(range(len(defences)), defences, rotation=40, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(len(attacks)), attacks if names and value == "asr" else [""] * len(attacks))
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        ax.set_title(f"{value.upper()} after, %", fontsize="small")
    return axes


def _draw_cell(ax: Axes, x: int, y: int, row, value: str, shade: float, colours) -> None:
    measured = getattr(row, value)
    style = {"color": "whitesmoke", "hatch": "////", "edgecolor": "lightgrey"}
    if row.run:
        style = {"color": "white" if pd.isna(measured) else colours(0.75 * min(1.0, shade))}
    ax.barh(y, 0.96, 0.92, left=x - 0.48, **{**style, "linewidth": 0})
    text = "not run" if not row.run else "" if pd.isna(measured) else f"{measured:.1f}"
    bold = "bold" if value == "asr" and row.good else "normal"
    size = "small" if row.run else "xx-small"
    ax.text(x, y, text, ha="center", va="center", fontsize=size, fontweight=bold)


def plot_along(axes, rows: pd.DataFrame, along: str):
    """ASR (first axis) and ACC (second) after each defence along a column of a `tables.frame`, in %.

    `along` is "ratio" (percent poisoned) or "clean" (images); its values stand evenly apart. A line a
    defence, seeds together, with a gap where a cell was never run. `rows` should be of one attack.
    """
    means = over_seeds(rows)
    values = sorted(means[along].unique())
    for ax, value in zip(axes, ("asr", "acc"), strict=True):
        for label, same in means.groupby("defence", sort=False):
            line = same.set_index(along)[value].reindex(values)
            style = {"linestyle": "--" if label == UNDEFENDED else "-", "marker": MARKS[label]}
            style |= {"linewidth": 2.5, "zorder": 3} if label == OURS else {"linewidth": 1, "markersize": 5}
            name = label if same["run"].any() else f"{label} (not run)"
            ax.plot(range(len(values)), line, color=COLOURS[label], label=name, **style)
        ax.set_xticks(range(len(values)), [f"{v:g}" for v in values])
        ax.set_ylabel(f"{value.upper()}, %")
        ax.margins(y=0.1)
    axes[0].set_ylim(-4, 104)
    axes[-1].set_xlabel({"ratio": "% of the training set poisoned", "clean": "clean images"}[along])
    return axes


def plot_attacks_along(rows: pd.DataFrame, along: str, title: str) -> Figure:
    """`plot_along` for each attack of a `tables.frame`, side by side."""
    attacks = list(rows.groupby("attack", sort=False))
    figure, axes = plt.subplots(
        2, len(attacks), figsize=(3.5 * len(attacks), 4.6), sharex=True, sharey="row", squeeze=False
    )
    for pair, (attack, same) in zip(axes.T, attacks, strict=True):
        plot_along(pair, same, along)
        pair[0].set_title(f"{title}: {attack}", fontsize="small")
    for ax in axes[:, 1:].flat:
        ax.set_ylabel("")
    ran = set(rows[rows["run"]]["defence"])
    lines, labels = axes[0, -1].get_legend_handles_labels()
    labels = [label.removesuffix(" (not run)") for label in labels]
    labels = [label if label in ran else f"{label} (not run)" for label in labels]
    axes[0, -1].legend(lines, labels, loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    return figure


def plot_seconds(axes, rows: pd.DataFrame):
    """What each defence took, from a `tables.frame`: seconds, and seconds over I-BAU's on the same model.

    Bars are medians over models, with the smallest and largest; on the second axis each model is a dot. The
    dotted line is 13 times I-BAU's. Defences that were never run say so.
    """
    labels = [label for label in rows["defence"].unique() if label != UNDEFENDED]
    ratios = tables.ratios(rows)
    for y, label in enumerate(labels):
        seconds = rows[rows["defence"] == label]["seconds"].dropna()
        if seconds.empty:
            axes[0].text(1, y, " not run", va="center", fontsize="small", color=MUTED)
            continue
        middle = seconds.median()
        axes[0].barh(y, middle, 0.7, color=COLOURS[label])
        spread = [[middle - seconds.min()], [seconds.max() - middle]]
        axes[0].errorbar(middle, y, xerr=spread, fmt="none", ecolor="black", capsize=3)
        axes[0].text(seconds.max(), y, f"  {middle:.0f} s", va="center", fontsize="small")
        times = ratios[ratios["defence"] == label]["times"]
        axes[1].plot(times, [y] * len(times), MARKS[label], color=COLOURS[label], markersize=5, alpha=0.7)
        axes[1].plot([times.median()], [y], "|", color="black", markersize=16)
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].set(xscale="log", xlabel="seconds", xlim=(1, 3 * max(2, rows["seconds"].max())))
    axes[1].set(xscale="log", xlabel="times I-BAU's seconds, same model and device")
    axes[1].axvline(1, color="grey", linewidth=1)
    axes[1].axvline(13, color="grey", linewidth=1, linestyle=":")
    axes[1].xaxis.set_major_formatter("{x:g}")
    axes[1].sharey(axes[0])
    axes[0].invert_yaxis()
    axes[1].tick_params(labelleft=False)
    return axes


if __name__ == "__main__":
    draw_rounds(usual(study_records.recorded(defence="ibau")), study_records.figures_dir() / "rounds")
    draw_tables(study_records.figures_dir())
    write_readme(study_records.figures_dir().parent / "README.md")
