"""What Neural Cleanse and TABOR share: reverse a trigger for every class, find the odd one out, patch it.

A reversed trigger is a mask m (1, H, W) and a pattern Delta (3, H, W), both in [0, 1]; it makes of an image
x the image (1 - m) x + m Delta. All classes are searched at once, as one batch: they share nothing but the
images of a step, so each finds what it would find alone, and a class that has finished leaves the batch.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ibau.checks import one_of, positive, within
from ibau.data.images import ImageSet
from ibau.defences.base import Defended, hold_out
from ibau.measure.intervals import wilson
from ibau.networks.models import device_of
from ibau.networks.predict import predict
from ibau.networks.training import PRECISIONS, TrainSettings, Watch, autocast, to_float, train

POLICIES = ("leave", "smallest")
CHUNK = 320  # images a forward pass: more gain nothing on a CPU and cost memory
CONSISTENT = 1.4826  # the median absolute deviation times this estimates a Gaussian's standard deviation
SUSPICIOUS = 2.0  # anomaly index above which a class is flagged (Neural Cleanse, section IV)

Classify = Callable[[Tensor], Tensor]  # images (N, 3, H, W) in [0, 1] -> logits (N, classes)
# classify, x (B, 3, H, W), y (B,), m (c, 1, H, W), Delta (c, 3, H, W), t (c,), weight (c,)
# -> loss (c,), ASR (c,)
Objective = Callable[[Classify, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ReverseSettings:
    """How to search for triggers and how to patch them away; the defaults are Neural Cleanse's own.

    Its authors' code draws 1,000 images a step, in batches of 32; the weight of the penalty is zero until a
    trigger works, then `weight`, and from there it rises and falls with the trigger's success.
    """

    steps: int = 1000  # of the search, at most
    batches: int = 31  # a step, each followed by one update
    batch_size: int = 32
    lr: float = 0.1  # of Adam, betas (0.5, 0.9), in the space before tanh
    success: float = 0.99  # share of a step's images a working trigger sends to its class
    weight: float = 1e-3  # lambda: what the penalty weighs once a trigger works
    factor: float = 2.0  # lambda times this after `patience` successes in a row, / factor^1.5 after failures
    patience: int = 5  # steps
    stop_after: int = 25  # steps without a smaller working trigger, lambda having been raised and lowered
    held_out: float = 0.1  # share of the clean images, at most 500, that only watches
    unflagged: str = "leave"  # where no class is flagged: leave the model, or patch the "smallest" trigger
    stamped: float = 0.2  # share of the images that carry a trigger while patching, under their own label
    patch_epochs: int = 1
    patch_lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3)  # of Adam; the paper names none, see `kept_of`
    patch_batch_size: int = 32
    precision: str = "auto"  # bfloat16 where the device multiplies it natively, else float32

    def __post_init__(self):
        positive(self, "steps", "batches", "batch_size", "lr", "weight", "patience", "stop_after")
        positive(self, "patch_epochs", "patch_batch_size")
        within(self, "(0, 1)", "success", "held_out", "stamped")
        within(self, "(1, inf)", "factor")
        if not self.patch_lrs or min(self.patch_lrs) <= 0:
            raise ValueError(f"patch_lrs is {self.patch_lrs}; it takes one positive rate or more")
        one_of(self, "unflagged", POLICIES)
        one_of(self, "precision", PRECISIONS)

    @property
    def work(self) -> int:
        """What its time is proportional to: images that the search sees, a class."""
        return self.steps * self.batches * self.batch_size

    def scaled(self, share: float):
        """The same with this share of the images: first fewer batches a step, then smaller ones, then steps.

        A batch keeps 8 images at least, and the search 30 steps, after which it may stop by itself.
        """
        batches = max(1, round(share * self.batches))
        batch_size = min(self.batch_size, max(8, round(share * self.batches * self.batch_size)))
        steps = round(share * self.work / (batches * batch_size))
        return replace(self, batches=batches, batch_size=batch_size, steps=max(30, steps))

    @classmethod
    def quick(cls, **other):
        """A budget of half a minute for ten classes on one core."""
        return cls(**{"steps": 150, "batches": 1, "batch_size": 16, "patch_epochs": 5, **other})

    @classmethod
    def desk(cls, **other):
        """Minutes on a CPU for ten or 43 classes: 300 of the 1,000 steps, of 8 images each and not of 992."""
        return cls.quick(**{"steps": 300, "batch_size": 8, "patch_epochs": 1, **other})


class Triggers(NamedTuple):
    """One reversed trigger a class, in the order of `classes`; the last one tried where none worked."""

    classes: list[int]
    masks: Tensor  # (c, 1, H, W) in [0, 1]
    patterns: Tensor  # (c, 3, H, W) in [0, 1]
    norms: Tensor  # (c,): |m|_1, in pixels
    found: Tensor  # (c,) bool: whether it ever reached the wanted success
    steps: Tensor  # (c,) int64: how long its search took
    history: list[dict]  # one dict a step: classes still searched, their mean |m|_1 and ASR


def stamp(x: Tensor, m: Tensor, delta: Tensor) -> Tensor:
    """(1 - m) x + m Delta: images (B, 3, H, W) under c triggers -> (c, B, 3, H, W)."""
    return torch.lerp(x[None], delta[:, None], m[:, None])


def fooled(classify: Classify, stamped: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Images (c, B, 3, H, W) under c triggers -> CE(f(x), t) of each, (c, B); the share sent to t, (c,)"""
    c, size = stamped.shape[:2]
    logits = classify(stamped.flatten(0, 1))
    targets = t.repeat_interleave(size)
    loss = F.cross_entropy(logits, targets, reduction="none").view(c, size)
    return loss, (logits.argmax(1) == targets).view(c, size).float().mean(1)


def frozen(model: nn.Module, precision: str) -> Classify:
    """A copy of the model as a function of images alone: fixed weights and statistics, the fastest layout."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    device = device_of(model)
    if device.type in ("cpu", "cuda"):
        model.to(memory_format=torch.channels_last)

    def classify(images: Tensor) -> Tensor:
        with autocast(device, precision):
            logits = model(images.contiguous(memory_format=torch.channels_last))
        return logits.float() if logits.dtype == torch.bfloat16 else logits

    return classify


class Schedule:
    """The weight of one class's penalty, and when its search is over.

    Zero until `patience` steps in a row have worked, it is then `weight`; from there `patience` steps of
    success in a row multiply it by `factor`, and as many of failure divide it by factor^1.5.
    """

    def __init__(self, settings):
        self.settings = settings
        self.weight = 0.0
        self.best = math.inf  # the smallest norm of a working trigger
        self.idle = self.successes = self.failures = 0
        self.raised = self.lowered = False

    def record(self, asr: float, norm: float) -> bool:
        """Take note of a step; is its trigger the best so far?"""
        s, works = self.settings, asr >= self.settings.success
        better = works and norm < self.best
        self.best = min(self.best, norm) if works else self.best
        self.idle = 0 if better or self.best == math.inf else self.idle + 1
        self.successes, self.failures = (self.successes + 1, 0) if works else (0, self.failures + 1)
        if self.successes == s.patience:
            self.raised = self.raised or self.weight > 0
            self.weight = self.weight * s.factor or s.weight
            self.successes = 0
        elif self.failures == s.patience:
            self.lowered = self.lowered or self.weight > 0
            self.weight /= s.factor**1.5
            self.failures = 0
        return better

    @property
    def over(self) -> bool:
        return self.raised and self.lowered and self.idle >= self.settings.stop_after


def reverse(
    classify: Classify,
    data: ImageSet,
    classes: list[int],
    settings: ReverseSettings,
    objective: Objective,
    seed: int,
    progress: str | None = None,
) -> Triggers:
    """For each of `classes` the smallest trigger that sends images to it.

    A class's first trigger depends on `seed` and the class, the images of a step on `seed` and the step: so a
    class finds the same whether it is searched with others or alone. `data` lies where `classify` computes.
    """
    w = torch.stack([_first_trigger(data.images.shape[2:], seed, t) for t in classes])
    w = w.to(data.images.device).requires_grad_()  # (c, 4, H, W): the mask and the pattern before tanh
    targets = torch.tensor(classes, device=w.device)
    optimizer = torch.optim.Adam([w], lr=settings.lr, betas=(0.5, 0.9))
    random = torch.Generator().manual_seed(seed)
    schedules = [Schedule(settings) for _ in classes]
    best, taken, history = w.detach().clone(), torch.zeros(len(classes), dtype=torch.int64), []
    bar = tqdm(range(1, settings.steps + 1), desc=progress, unit="step", disable=not progress)
    for step in bar:
        active = [i for i, schedule in enumerate(schedules) if not schedule.over]
        if not active:
            break
        weights = torch.tensor([schedule.weight for schedule in schedules], dtype=w.dtype, device=w.device)
        asr = torch.zeros(len(active))
        for _ in range(settings.batches):
            chosen = torch.randint(len(data), (settings.batch_size,), generator=random)
            x, y = to_float(data.images[chosen]), data.labels[chosen]
            optimizer.zero_grad()
            shares = []
            for part in torch.tensor(active, device=w.device).split(max(1, CHUNK // len(x))):
                loss, hits = objective(classify, x, y, *_trigger(w[part]), targets[part], weights[part])
                loss.sum().backward()
                shares.append(hits.detach().cpu())
            optimizer.step()
            asr += torch.cat(shares)
        asr /= settings.batches
        norms = _trigger(w.detach())[0].sum((1, 2, 3)).cpu()[active]
        for i, share, norm in zip(active, asr.tolist(), norms.tolist(), strict=True):
            taken[i] = step
            if schedules[i].record(share, norm) or schedules[i].best == math.inf:
                best[i] = w.detach()[i]
        mean = {"asr": asr.mean().item(), "norm": norms.mean().item()}
        history.append({"step": step, "classes": len(active), **mean})
        bar.set_postfix(classes=len(active), norm=f"{mean['norm']:.1f}")
    masks, patterns = (part.cpu() for part in _trigger(best))
    found = torch.tensor([schedule.best < math.inf for schedule in schedules])
    return Triggers(classes, masks, patterns, masks.sum((1, 2, 3)), found, taken, history)


def _first_trigger(shape: tuple[int, ...], seed: int, t: int) -> Tensor:
    """A mask and a pattern, uniform in [0, 1], as they are before tanh: (4, H, W)."""
    u = torch.rand(4, *shape, generator=torch.Generator().manual_seed(seed * 100_003 + t))
    return torch.atanh((2 * u - 1) * (1 - 1e-6))


def _trigger(w: Tensor) -> tuple[Tensor, Tensor]:
    """m (c, 1, H, W) and Delta (c, 3, H, W), in [0, 1]."""
    return (w.tanh() / 2 + 0.5).split((1, 3), dim=1)


def anomaly_indices(sizes: Tensor) -> Tensor:
    """|s - median| / (1.4826 MAD) of each of the sizes (c,), in float64; MAD: the median of |s - median|."""
    distances = (sizes.double() - sizes.double().quantile(0.5)).abs()
    spread = CONSISTENT * distances.quantile(0.5)
    return torch.where(distances == 0, 0.0, distances / spread)


def flagged(sizes: Tensor, found: Tensor) -> list[int]:
    """Positions, smallest size first, of working triggers that are smaller than the median and outliers."""
    odd = (anomaly_indices(sizes) > SUSPICIOUS) & (sizes < sizes.double().quantile(0.5)) & found
    return [i for i in sizes.argsort().tolist() if odd[i]]


def decide(odd: list[int], sizes: Tensor, unflagged: str) -> tuple[list[int], str]:
    """The classes to patch, given those that were flagged, and why these, in words for the evidence."""
    if odd:
        return odd, "flagged classes patched"
    if unflagged == "leave":
        return [], "none flagged, model left as it was"
    return [int(sizes.argmin())], "none flagged, smallest patched"


def rows(columns: dict[str, Tensor | list]) -> list[dict]:
    """One dict of plain values a class, from columns of one entry a class."""
    values = zip(*(torch.as_tensor(column).tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in values]


@torch.no_grad()
def success_rates(classify: Classify, data: ImageSet, triggers: Triggers) -> list[float]:
    """Of the images outside a trigger's class the share that it sends there, for every trigger.

    0 where every image is of that class. `data` lies where `classify` computes.
    """
    rates = []
    for t, m, delta in zip(triggers.classes, triggers.masks, triggers.patterns, strict=True):
        x = to_float(data.images[data.labels != t])
        m, delta = m[None].to(x.device), delta[None].to(x.device)
        hits = [classify(stamp(part, m, delta)[0]).argmax(1) == t for part in x.split(CHUNK) if len(part)]
        rates.append(torch.cat(hits).float().mean().item() if hits else 0.0)
    return rates


def stamp_some(data: ImageSet, masks: Tensor, patterns: Tensor, share: float, seed: int) -> ImageSet:
    """The set with `share` of its images under one of the triggers each, in turn; every label stays."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    chosen = order[: round(share * len(data))]
    images = data.images.clone()
    for i, (m, delta) in enumerate(zip(masks, patterns, strict=True)):
        mine = chosen[i :: len(masks)]
        stamped = stamp(to_float(data.images[mine]), m[None].to(images.device), delta[None].to(images.device))
        whole = images.dtype == torch.uint8  # grey levels
        images[mine] = (stamped[0].mul(255).round() if whole else stamped[0]).to(images.dtype)
    return ImageSet(images, data.labels)


def patch(
    model: nn.Module,
    data: ImageSet,
    held_out: ImageSet,
    masks: Tensor,
    patterns: Tensor,
    settings: ReverseSettings,
    seed: int,
    watch: Watch | None = None,
) -> tuple[nn.Module, list[dict]]:
    """Neural Cleanse's unlearning: fine-tune a copy on images; some carry a trigger, all their own label.

    One copy is tuned at each of `patch_lrs`, and `kept_of` chooses by what each gets right of the held-out
    images, half of the count with a trigger and half without. Returns the copy, and one dict a rate.
    """
    tuned_on = stamp_some(data, masks, patterns, settings.stamped, seed)
    pairs = zip(masks.split(1), patterns.split(1), strict=True)
    watched = [held_out, *(stamp_some(held_out, m, delta, 1.0, seed) for m, delta in pairs)]
    tried, candidates = [], []
    for lr in settings.patch_lrs:
        candidate = copy.deepcopy(model).requires_grad_(True)
        epochs, batch_size = settings.patch_epochs, settings.patch_batch_size
        tuning = TrainSettings(epochs, batch_size, lr, precision=settings.precision)
        train(candidate, tuned_on, tuning, seed=seed, watch=watch)
        acc, *robust = [
            (predict(candidate, part.images) == part.labels.cpu()).float().mean().item() for part in watched
        ]
        tried.append({"lr": lr, "held_out_acc": acc, "held_out_ra": sum(robust) / len(robust)})
        candidates.append(candidate.to(memory_format=torch.contiguous_format))
    rights = [(line["held_out_acc"] + line["held_out_ra"]) / 2 for line in tried]
    kept = kept_of(settings.patch_lrs, rights, len(held_out))
    for i, line in enumerate(tried):
        line["kept"] = i == kept
    return candidates[kept], tried


def kept_of(lrs: Sequence[float], rights: Sequence[float], images: int) -> int:
    """The position of the highest rate that is right as often as the best, but for one standard error.

    The one-standard-error rule (Breiman et al. 1984) with the strongest remedy in the simplest model's place:
    clean images hardly tell small rates apart, and the smallest leaves the backdoor. `rights` are shares of
    so many `images`. The error is Wilson's, which is not 0 where all are right.
    """
    least, _ = wilson(max(rights), images, z=1)
    return max((i for i, right in enumerate(rights) if right >= least), key=lambda i: lrs[i])


# classify, held-out images, triggers, their ASR there -> (c,), on which outliers are sought: small is odd
Score = Callable[[Classify, ImageSet, Triggers, list[float]], Tensor]


def cleanse(
    label: str,
    objective: Objective,
    score: Score,
    model: nn.Module,
    clean: ImageSet,
    settings: ReverseSettings,
    seed: int,
    progress: bool,
    watch: Watch | None,
) -> Defended:
    """Reverse a trigger for every class, flag the classes whose `score` is an outlier, patch their triggers.

    model  any classifier of images in [0, 1]; it is left as it was
    clean  images it was not trained on, (N, 3, H, W) uint8 or in [0, 1], with their true labels

    Where no class is flagged, `settings.unflagged` says what to do. Raises ValueError for a clean set too
    small to hold images out of.

    Evidence: `classes`, a dict a class (norm, score, anomaly_index, flagged, found, held_out_asr, steps);
    `decision`, `patched` and `patching` say what was done about it. Tensors: `masks` (classes, 1, H, W) and
    `patterns` (classes, 3, H, W).
    """
    device = device_of(model)
    learned, held_out = (
        ImageSet(part.images.to(device), part.labels.to(device))
        for part in hold_out(clean, settings.held_out, seed)
    )
    classify = frozen(model, settings.precision)
    with torch.no_grad():
        classes = list(range(classify(to_float(held_out.images[:1])).shape[1]))
    triggers = reverse(classify, learned, classes, settings, objective, seed, label if progress else None)
    asr = success_rates(classify, held_out, triggers)
    sizes = score(classify, held_out, triggers, asr)
    indices = anomaly_indices(sizes)
    odd = flagged(sizes, triggers.found)
    chosen, decision = decide(odd, sizes, settings.unflagged)
    cleaned, patching = copy.deepcopy(model), []
    if chosen:
        masks, patterns = triggers.masks[chosen], triggers.patterns[chosen]
        cleaned, patching = patch(model, learned, held_out, masks, patterns, settings, seed, watch)
    about = {
        "class": classes,
        "norm": triggers.norms,
        "score": sizes,
        "anomaly_index": indices,
        "flagged": [t in odd for t in classes],
        "found": triggers.found,
        "held_out_asr": asr,
        "steps": triggers.steps,
    }
    evidence = {"classes": rows(about), "decision": decision, "patched": chosen, "patching": patching}
    tensors = {"masks": triggers.masks, "patterns": triggers.patterns}
    return Defended(cleaned.eval(), triggers.history, evidence, tensors)
