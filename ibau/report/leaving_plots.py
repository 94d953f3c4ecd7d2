"""What a single notebook uses: it moves there, piece by piece, and this file goes with the last piece."""

import re

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from ibau.report.figures import (
    ATTACKED,
    MUTED,
    PALETTE,
    RIGHT,
    as_picture,
    class_ticks,
    plot_image,
    short,
)

# ---- notebook 00_start_here


VERDICTS = {"right": RIGHT, "what the attacker wants": ATTACKED, "wrong otherwise": MUTED}


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


# ---- notebook 01_threat_models


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
    ticks, names, rotation = class_ticks(classes)
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


# ---- notebook 05_baselines


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
