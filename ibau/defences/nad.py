"""NAD: a fine-tuned copy teaches the poisoned model where to look (Li et al., ICLR 2021)."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from ibau.checks import one_of, positive
from ibau.data.images import ImageSet
from ibau.defences.base import Defended
from ibau.defences.finetune import clean_split, held_out_accuracy
from ibau.networks.models import device_of
from ibau.networks.training import AUGMENTS, TrainingError, Watch, augmented, autocast, look, to_float

SHOWN = 8  # held-out images whose attention maps are given back
RETRIES = 4  # how often the rate may be lowered


@dataclass(frozen=True)
class NADSettings:
    """How to distil; the defaults are those of the authors' paper and code for CIFAR-10.

    Published for a Wide-ResNet, the rate can ruin another network. Where the teacher loses more than
    `tolerance` of its held-out accuracy, the rate is divided by sqrt(10) and a new teacher is tuned.
    """

    betas: tuple[float, ...] = (500.0, 1000.0, 1000.0)  # a stage's weight; all 0: the control, no attention
    stages: tuple[str, ...] = ()  # modules whose outputs are compared; (): see `stages_of`
    p: float = 2.0  # exponent of an activation in the attention map
    teacher_epochs: int = 10  # the authors' 5 to 10
    epochs: int = 20
    lr: float = 0.1  # of SGD, in the first `high_epochs`; a tenth of it afterwards
    high_epochs: int = 2
    momentum: float = 0.9  # Nesterov's
    weight_decay: float = 1e-4
    batch_size: int = 64
    augment: str = "crop-flip"  # "crop" where a mirrored image is of another class
    tolerance: float = 0.05  # held-out accuracy that the teacher may lose
    held_out: float = 0.2  # share of the clean images that is only watched, 500 at most

    def __post_init__(self):
        positive(self, "p", "teacher_epochs", "epochs", "lr", "batch_size")
        if not self.betas or min(self.betas) < 0:
            raise ValueError(f"betas are {self.betas}; there must be one or more, none of them negative")
        if self.stages and len(self.stages) != len(self.betas):
            raise ValueError(f"stages {self.stages} and betas {self.betas} must be as many")
        one_of(self, "augment", AUGMENTS)

    @classmethod
    def quick(cls) -> "NADSettings":
        """A budget of seconds, for the digits of mnist5k; at 0.1 and 0.03 held-out accuracy falls there."""
        return cls(teacher_epochs=5, epochs=12, lr=0.01, batch_size=32, augment="crop")

    @classmethod
    def desk(cls) -> "NADSettings":
        """A budget of minutes on a CPU: 5 of the teacher's 10 epochs and 6 of the 20.

        At the published rate of 0.1, and at 0.03, a small VGG loses accuracy on CIFAR-10.
        """
        return cls(teacher_epochs=5, epochs=6, lr=0.01)

    @property
    def work(self) -> int:
        """What its time is proportional to."""
        return self.teacher_epochs + self.epochs

    def scaled(self, share: float) -> "NADSettings":
        """The same with this share of the epochs."""
        teacher, epochs, high = (
            max(1, round(share * n)) for n in (self.teacher_epochs, self.epochs, self.high_epochs)
        )
        return replace(self, teacher_epochs=teacher, epochs=epochs, high_epochs=high)


def nad(
    model: nn.Module,
    data: ImageSet,
    *,
    settings: NADSettings,
    seed: int = 0,
    progress: bool = False,
    watch: Watch | None = None,
) -> Defended:
    """Distil `model`, which is changed, from a fine-tuned copy, on the clean images but for held-out ones.

    history   an epoch's cross-entropy, attention loss (of each stage, by its beta) and held-out accuracy
    evidence  stages; rates tried with the held-out accuracy of each's teacher, and the rate taken; held-out
              accuracy before and after
    tensors   "images" (n, 3, H, W): held-out ones; "before/<stage>", "teacher/<stage>", "after/<stage>"
              (n, h, w): their attention maps

    Raises ValueError for stages the model does not have, and as `clean_split` does; TrainingError where the
    student's loss is not finite at the best of the rates.
    """
    learnt, watched = clean_split(model, data, settings.held_out, seed)
    stages = settings.stages or stages_of(model, watched.images[:1], len(settings.betas))
    shown = watched.images[:SHOWN]
    tensors = {"images": shown.cpu(), **_maps("before", model, stages, shown, settings.p)}
    before = held_out_accuracy(model, watched)
    rates, best = [], -1.0
    for attempt in range(RETRIES + 1):
        rate = settings.lr / math.sqrt(10) ** attempt
        tuned = copy.deepcopy(model)
        label = f"NAD's teacher, rate {rate:.2g}" if progress else None
        accuracy = tune(tuned, learnt, watched, settings, rate, label)[-1]["held_out_acc"]
        rates.append({"rate": rate, "held_out_acc": accuracy})
        if accuracy >= best:
            teacher, chosen, best = tuned, rate, accuracy
        if before - accuracy <= settings.tolerance:
            break
    tensors |= _maps("teacher", teacher, stages, shown, settings.p)
    label = "NAD" if progress else None
    history = tune(model, learnt, watched, settings, chosen, label, teacher, stages, watch)
    tensors |= _maps("after", model, stages, shown, settings.p)
    evidence = {
        "stages": list(stages),
        "rates": rates,
        "rate": chosen,
        "held_out_images": len(watched),
        "held_out_acc_before": before,
        "held_out_acc": history[-1]["held_out_acc"],
    }
    return Defended(model, history, evidence, tensors)


def attention_map(features: Tensor, p: float = 2.0) -> Tensor:
    """sum_c |F_c|^p over its l2 norm: features (N, C, h, w) -> maps (N, h, w)."""
    power = features.float().abs().pow(p).sum(1)
    return power / power.flatten(1).norm(dim=1).clamp_min(1e-6)[:, None, None]


def attention_loss(student: Tensor, teacher: Tensor, p: float = 2.0) -> Tensor:
    """The mean square difference of two features' attention maps; features (N, C, h, w), C may differ.

    The paper writes the norm of the difference; the authors' code, which the betas are tuned for, takes the
    mean of its squares over pixels and images. Nothing flows back to the teacher.
    """
    return F.mse_loss(attention_map(student, p), attention_map(teacher.detach(), p))


def tune(
    model: nn.Module,
    learnt: ImageSet,
    watched: ImageSet,
    settings: NADSettings,
    rate: float,
    progress: str | None,
    teacher: nn.Module | None = None,
    stages: tuple[str, ...] = (),
    watch: Watch | None = None,
) -> list[dict]:
    """SGD on cross-entropy + sum_l beta_l * attention loss_l, in place; `model` ends in eval mode.

    Without a teacher the model becomes one: on the cross-entropy alone. Returns a line an epoch, see `nad`.
    """
    device, history = device_of(model), []
    epochs = settings.teacher_epochs if teacher is None else settings.epochs
    images, labels = learnt.images.to(device), learnt.labels.to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), rate, settings.momentum, weight_decay=settings.weight_decay, nesterov=True
    )
    bar = tqdm(range(1, epochs + 1), desc=progress, unit="epoch", disable=not progress)
    for epoch in bar:
        for group in optimizer.param_groups:
            group["lr"] = rate if epoch <= settings.high_epochs else rate / 10
        model.train()
        losses = torch.zeros(2, device=device)
        batches = torch.randperm(len(images), device=device).split(settings.batch_size)
        for index, batch in enumerate(batches):
            if len(batch) == 1 < len(images):  # it would break BatchNorm
                continue
            x = augmented(to_float(images[batch]), settings.augment)
            loss, attention = _losses(model, teacher, stages, x, labels[batch], settings)
            optimizer.zero_grad()
            (loss + attention).backward()
            optimizer.step()
            losses += torch.stack([loss, attention]).detach() * len(batch) / len(images)
            look(watch, model, (epoch - 1) * len(batches) + index, epochs * len(batches))
        accuracy = held_out_accuracy(model.eval(), watched)
        if teacher is not None and not losses.isfinite().all():
            raise TrainingError(
                f"the loss became {losses.tolist()} in epoch {epoch}; lr={rate:g} is too high"
            )
        line = {"epoch": epoch, "cross_entropy": losses[0].item(), "attention_loss": losses[1].item()}
        history.append({**line, "held_out_acc": accuracy})
        bar.set_postfix(held_out=f"{accuracy:.1%}")
    return history


def _losses(model, teacher, stages, images: Tensor, labels: Tensor, settings) -> tuple[Tensor, Tensor]:
    """The cross-entropy, and the attention loss weighted by the betas (0 without a teacher)."""
    with autocast(images.device, "auto"), outputs_of(model, stages) as seen:
        logits = model(images)
    attention = torch.zeros((), device=images.device)
    if teacher is not None:
        with torch.no_grad(), autocast(images.device, "auto"), outputs_of(teacher, stages) as wanted:
            teacher(images)
        for beta, stage in zip(settings.betas, stages, strict=True):
            attention = attention + beta * attention_loss(seen[stage], wanted[stage], settings.p)
    return F.cross_entropy(logits.float(), labels), attention


@contextmanager
def outputs_of(model: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Within it, the modules of these names leave their outputs in the dict it gives, in calling order.

    Raises ValueError for names the model does not have.
    """
    modules, found = dict(model.named_modules()), {}
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise ValueError(f"no module {unknown[0]!r} in {type(model).__name__}; valid: {', '.join(modules)}")

    def keep(name):
        return lambda module, inputs, output: found.__setitem__(name, output)

    hooks = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def stages_of(model: nn.Module, images: Tensor, count: int) -> tuple[str, ...]:
    """Names of the last `count` stages of a convolutional network, in order.

    A stage ends with a pooling layer, if there are `count` of those; else with the last module, but for
    normalisation, whose maps are of one size. Maps of a single pixel have no attention to compare.
    Raises ValueError where there are fewer stages than that.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    with outputs_of(model, tuple(modules)) as found:
        model(to_float(images.to(device_of(model), copy=True)))
    maps = {
        name: x for name, x in found.items() if isinstance(x, Tensor) and x.dim() == 4 and x[0, 0].numel() > 1
    }
    pools = [name for name in maps if isinstance(modules[name], nn.MaxPool2d | nn.AvgPool2d)]
    by_size = {x.shape[2:]: name for name, x in maps.items() if not isinstance(modules[name], _BatchNorm)}
    stages = pools if len(pools) >= count else list(by_size.values())
    if len(stages) < count:
        raise ValueError(
            f"found {len(stages)} stages ({', '.join(stages)}) for {count} betas; name them in stages"
        )
    return tuple(stages[-count:])


@torch.no_grad()
def _maps(when: str, model: nn.Module, stages, images: Tensor, p: float) -> dict[str, Tensor]:
    with outputs_of(model, stages) as seen:
        model(to_float(images.to(device_of(model), copy=True)))
    for stage in stages:
        if not (isinstance(seen[stage], Tensor) and seen[stage].dim() == 4):
            raise ValueError(f"the output of stage {stage!r} is no map of features (N, C, h, w)")
    return {f"{when}/{stage}": attention_map(seen[stage], p).cpu() for stage in stages}
