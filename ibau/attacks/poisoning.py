"""What the attacker does to the training set, given a trigger."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ibau.attacks.trigger import Trigger
from ibau.data.images import ImageSet

ALL_TO_ALL = "all-to-all"


@dataclass(frozen=True)
class Poisoned:
    """A poisoned training set."""

    data: ImageSet  # as the victim sees it
    indices: Tensor  # int64, ascending: the images that carry a trigger
    per_trigger: tuple[Tensor, ...]  # the indices of each trigger's images, ascending


def target_labels(labels: Tensor, target: int | str, num_classes: int) -> Tensor:
    """The label the attacker wants for images of class `labels`: one class for all, or y+1 for all-to-all."""
    if target == ALL_TO_ALL:
        return (labels + 1) % num_classes
    if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target < num_classes:
        raise ValueError(f"target is {target!r}; valid: 0 to {num_classes - 1}, or {ALL_TO_ALL!r}")
    return torch.full_like(labels, target)


def poison(
    train: ImageSet, trigger: Trigger, *, ratio: float, target: int | str, num_classes: int, seed: int = 0
) -> Poisoned:
    """Stamp `trigger` on a share of the training images and give them the attacker's label.

    `ratio`, in (0, 1), counts against the *whole* training set; the images are drawn from those whose label
    the attack changes, so never from the target class. The same seed draws the same images.

    Raises ValueError for a ratio outside (0, 1), an unknown class, a trigger of another size, or a ratio
    that asks for more images than there are to draw from.
    """
    return _poisoned(train, [trigger], [target_labels(train.labels, target, num_classes)], ratio, seed)


def poison_several(
    train: ImageSet,
    triggers: Sequence[Trigger],
    targets: Sequence[int],
    *,
    ratio: float,
    num_classes: int,
    seed: int = 0,
) -> Poisoned:
    """Poison with two or more triggers, each of which has a target class of its own.

    `ratio`, in (0, 1), is the share of the whole training set that the triggers poison together. They divide
    it equally (the first ones take one image more where it does not divide), no image carries two of them,
    and none of a trigger's images comes from its own target class. The same seed draws the same images.

    Raises ValueError for fewer than two triggers, targets that are not one class each and all different, an
    unknown class, a trigger of another size, a ratio outside (0, 1), or one that asks for less than an image
    a trigger or for more images than the training set has outside any one of the target classes.
    """
    if len(triggers) < 2 or len(triggers) != len(targets) or len(set(targets)) != len(targets):
        raise ValueError(
            f"{len(triggers)} triggers with targets {list(targets)}; "
            "valid: two triggers or more, a different target each"
        )
    if ALL_TO_ALL in targets:
        raise ValueError(f"targets are {list(targets)}; valid: one class from 0 to {num_classes - 1} each")
    wanted = [target_labels(train.labels, target, num_classes) for target in targets]
    return _poisoned(train, triggers, wanted, ratio, seed)


def _poisoned(train: ImageSet, triggers, wanted: list[Tensor], ratio: float, seed: int) -> Poisoned:
    """The share `ratio` of the images divided among the triggers, each with its own wanted labels."""
    if not 0 < ratio < 1:
        raise ValueError(f"poison ratio is {ratio}; it must lie strictly between 0 and 1")
    count, k = round(ratio * len(train)), len(triggers)
    most = min(int((train.labels != new).sum()) for new in wanted)
    if not k <= count <= most:
        raise ValueError(
            f"poison ratio {ratio} of {len(train)} images asks for {count}; between {k} and {most} can be "
            f"poisoned, at least one a trigger and none of the {'largest ' if k > 1 else ''}target class"
        )
    random = torch.Generator().manual_seed(seed)
    images, labels, groups = train.images.clone(), train.labels.clone(), []
    free = torch.ones(len(train), dtype=torch.bool)
    for i, (trigger, new) in enumerate(zip(triggers, wanted, strict=True)):
        # The bound leaves every trigger enough: the others took at most count minus its share.
        eligible = (free & (train.labels != new)).nonzero().squeeze(1)
        drawn = torch.randperm(len(eligible), generator=random)[: count // k + (i < count % k)]
        group = eligible[drawn].sort().values
        images[group], labels[group], free[group] = trigger(images[group]), new[group], False
        groups.append(group)
    return Poisoned(ImageSet(images, labels), torch.cat(groups).sort().values, tuple(groups))
