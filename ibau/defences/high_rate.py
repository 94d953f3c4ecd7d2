"""Fine-tuning at a high rate on batch statistics: how much of a cure is the optimiser's doing.

SGD with Nesterov's momentum, BatchNorm on the statistics of each batch, no dropout, images shifted by a few
pixels. The rate is high at first, then falls to zero. Where networks were trained for a few epochs only, this
alone removes most backdoors, so whatever claims to unlearn has to be compared with it.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from tqdm import tqdm

from ibau.checks import not_negative, positive
from ibau.data.images import ImageSet
from ibau.defences.base import Defended
from ibau.defences.finetune import clean_split, held_out_accuracy
from ibau.networks.models import device_of
from ibau.networks.training import LOOKS, TrainingError, Watch, autocast, look, shifted, to_float


@dataclass(frozen=True)
class HighRateSettings:
    """How to fine-tune at a high rate; no publication has these numbers, they are ours."""

    warm_up: int = 20  # steps in which the rate rises to `lr`
    high_steps: int = 160  # steps at `lr`, with the warm-up
    steps: int = 360  # in all; after the high ones the rate falls from 2/3 of `lr` to 0 along a cosine
    lr: float = 0.03  # of SGD
    momentum: float = 0.9  # Nesterov's
    batch_size: int = 100
    shift: int = 4  # pixels by which an image may move; what comes in is black
    held_out: float = 0.2  # share of the clean images that is only watched, 500 at most

    def __post_init__(self):
        positive(self, "high_steps", "steps", "lr", "batch_size")
        not_negative(self, "warm_up", "momentum", "shift")
        if not self.warm_up <= self.high_steps <= self.steps:
            raise ValueError(
                f"warm_up is {self.warm_up}, high_steps {self.high_steps} and steps {self.steps}; each must "
                "be at most the next"
            )

    def rate(self, step: int) -> float:
        """The rate of step 0, 1, ..."""
        if step < self.high_steps:
            return self.lr * min(1.0, (step + 1) / max(1, self.warm_up))
        done = (step - self.high_steps) / (self.steps - self.high_steps)
        return self.lr / 3 * (1 + math.cos(math.pi * done))

    @property
    def work(self) -> int:
        """What its time is proportional to."""
        return self.steps

    def scaled(self, share: float) -> "HighRateSettings":
        """The same with this share of its steps."""
        steps = max(3, round(share * self.steps))
        high = max(1, round(steps * self.high_steps / self.steps))
        return replace(self, steps=steps, high_steps=high, warm_up=min(high, self.warm_up))


def high_rate(
    model: nn.Module,
    data: ImageSet,
    *,
    settings: HighRateSettings,
    seed: int = 0,
    progress: bool = False,
    watch: Watch | None = None,
) -> Defended:
    """Train `model`, which is changed, on the clean images but for the held-out ones.

    history: the mean loss of every tenth of the steps; evidence: held-out accuracy before and after. Raises
    ValueError as `clean_split` does, TrainingError where the loss is not finite.
    """
    learnt, watched = clean_split(model, data, settings.held_out, seed)
    device, before = device_of(model), held_out_accuracy(model, watched)
    images, labels = learnt.images.to(device), learnt.labels.to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), settings.lr, settings.momentum, nesterov=settings.momentum > 0
    )
    losses, order = [], []
    for step in tqdm(range(settings.steps), desc="fine-tuning", unit="step", disable=not progress):
        _learning(model)
        order = order or [b for b in torch.randperm(len(images)).split(settings.batch_size) if len(b) > 1]
        batch = order.pop().to(device)
        x = shifted(to_float(images[batch]), (settings.shift, settings.shift))
        with autocast(device, "auto"):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), labels[batch])
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        look(watch, model, step, settings.steps)
    means = [part.mean().item() for part in torch.stack(losses).split(math.ceil(settings.steps / LOOKS))]
    if not math.isfinite(sum(means)):
        raise TrainingError(f"the loss became {means[-1]}; lr={settings.lr:g} is too high")
    history = [{"tenth": i, "loss": mean} for i, mean in enumerate(means, start=1)]
    evidence = {
        "held_out_images": len(watched),
        "held_out_acc_before": before,
        "held_out_acc": held_out_accuracy(model.eval(), watched),
    }
    return Defended(model, history, evidence)


def _learning(model: nn.Module) -> None:
    """Training mode, but for dropout: BatchNorm uses and follows the statistics of each batch."""
    model.train()
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.eval()
