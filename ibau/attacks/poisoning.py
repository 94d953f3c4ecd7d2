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
    """A poisoned training set.

    data         as the victim sees it
    indices      int64, ascending: the images that carry a trigger
    per_trigger  for each trigger the indices of its images, ascending; together they are `indices`
    """

    data: ImageSet
    indices: Tensor
    per_trigger: tuple[Tensor, ...]


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
    _check_ratio(ratio)
    wanted = target_labels(train.labels, target, num_classes)
    eligible = (wanted != train.labels).nonzero().squeeze(1)
    count = round(ratio * len(train))
    if not 1 <= count <= len(eligible):
        raise ValueError(
            f"poison ratio {ratio} of {len(train)} images asks for {count}; "
            f"between 1 and {len(eligible)} (those outside the target class) can be poisoned"
        )
    random = torch.Generator().manual_seed(seed)
    indices = _draw(eligible, count, random)
    return _stamped(train, [trigger], [indices], wanted)


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
    _check_ratio(ratio)
    if len(triggers) < 2 or len(triggers) != len(targets) or len(set(targets)) != len(targets):
        raise ValueError(
            f"{len(triggers)} triggers with targets {list(targets)}; "
            "valid: two triggers or more, a different target each"
        )
    if ALL_TO_ALL in targets:
        raise ValueError(f"targets are {list(targets)}; valid: one class from 0 to {num_classes - 1} each")
    wanted = [target_labels(train.labels, target, num_classes) for target in targets]
    count, k = round(ratio * len(train)), len(triggers)
    most = min(int((train.labels != target).sum()) for target in targets)
    if not k <= count <= most:
        raise ValueError(
            f"poison ratio {ratio} of {len(train)} images asks for {count}; "
            f"{k} triggers take between {k} and {most} (those outside the largest target class)"
        )
    random = torch.Generator().manual_seed(seed)
    free = torch.ones(len(train), dtype=torch.bool)
    groups, labels = [], train.labels.clone()
    for i, target in enumerate(targets):
        # The bound above leaves every trigger enough: what the others took lies within count minus its share.
        eligible = (free & (train.labels != target)).nonzero().squeeze(1)
        groups.append(_draw(eligible, count // k + (i < count % k), random))
        free[groups[-1]] = False
        labels[groups[-1]] = wanted[i][groups[-1]]
    return _stamped(train, triggers, groups, labels)


def _check_ratio(ratio: float) -> None:
    if not 0 < ratio < 1:
        raise ValueError(f"poison ratio is {ratio}; it must lie strictly between 0 and 1")


def _draw(eligible: Tensor, count: int, random: torch.Generator) -> Tensor:
    return eligible[torch.randperm(len(eligible), generator=random)[:count]].sort().values


def _stamped(train: ImageSet, triggers, groups: list[Tensor], wanted: Tensor) -> Poisoned:
    """The training set with each trigger on its group of images, and on these the wanted labels."""
    images, labels = train.images.clone(), train.labels.clone()
    for trigger, group in zip(triggers, groups, strict=True):
        images[group] = trigger(images[group])
        labels[group] = wanted[group]
    return Poisoned(ImageSet(images, labels), torch.cat(groups).sort().values, tuple(groups))
