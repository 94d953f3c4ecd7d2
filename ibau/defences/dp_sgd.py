"""DP-SGD: training in which no single image counts for much (Du et al., ICLR 2020; Abadi et al., CCS 2016).

A poisoned image can teach the backdoor only through its own gradient. Each image's gradient is cut to norm C,
and noise is added to their sum over a batch L that every image enters with probability q = B / N:

    g = 1/B (sum_{i in L} g_i min(1, C / |g_i|) + N(0, sigma^2 C^2 I))
"""

import copy
import math
import warnings
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from ibau.checks import one_of, positive, within
from ibau.data.images import ImageSet
from ibau.defences.base import Defended
from ibau.networks.models import device_of
from ibau.networks.training import AUGMENTS, TrainingError, Watch, augmented, look, to_float


@dataclass(frozen=True)
class DPSGDSettings:
    """How to train privately.

    The paper tries many noise levels and gives none as its own. The defaults are those of opacus's CIFAR-10
    example: 90 epochs of 25 batches at sigma = 1.5, C = 10.
    """

    epochs: int = 90  # each of N / B steps
    batch_size: int = 2000  # B, on average: every image enters a batch with probability B / N
    lr: float = 0.1  # of SGD; falls to 0 along a cosine
    momentum: float = 0.9
    noise: float = 1.5  # sigma, in units of the clipping norm; 0: none, and no privacy
    clip: float = 10.0  # C, the norm of one image's gradient; inf: not cut
    groups: int = 8  # of GroupNorm: a group of one channel would forget how bright its map is
    augment: str = "none"
    chunk: int = 128  # images whose gradients are held in memory at once

    def __post_init__(self):
        positive(self, "epochs", "batch_size", "lr", "clip", "groups", "chunk")
        within(self, "[0, inf)", "noise")
        if self.noise and math.isinf(self.clip):
            raise ValueError("clip is inf; noise is in its units, so it must be finite, or noise 0")
        one_of(self, "augment", AUGMENTS)

    @classmethod
    def quick(cls) -> "DPSGDSettings":
        """A budget of a minute, for the 3,000 training digits of mnist5k."""
        return cls(epochs=8, batch_size=50, lr=0.05, noise=0.3, clip=1.0, chunk=32)

    @classmethod
    def desk(cls) -> "DPSGDSettings":
        """A budget of minutes on a CPU: 200 steps for CIFAR-10 in place of 90 epochs of 25 steps.

        So few steps bear a fifth of the noise. An eighth of the images a step makes a pass of CIFAR-10's
        training set enough for 200.
        """
        return cls(epochs=1, batch_size=250, lr=0.05, noise=0.3, clip=1.0, chunk=32)

    def control(self) -> "DPSGDSettings":
        """The same training without clipping and noise: what GroupNorm and the budget do by themselves."""
        return replace(self, noise=0.0, clip=math.inf)


def dp_sgd(
    model: nn.Module,
    data: ImageSet,
    *,
    settings: DPSGDSettings,
    seed: int = 0,
    progress: bool = False,
    watch: Watch | None = None,
) -> Defended:
    """Train a new model of the architecture of `model` on the attacker's images; its weights are not used.

    history   an epoch's mean loss and accuracy, over the images as they were seen and labelled
    evidence  epsilon, spent at delta = 1 / N (None without noise); noise, clip (None: not cut), sample_rate,
              steps, images

    The model has GroupNorm for BatchNorm, so its weights load into `with_group_norm(<the architecture>)`.
    Raises ValueError for a batch larger than the data, labels the model has no class for and weights that
    cannot be drawn anew; TrainingError where the loss is not finite; ModuleNotFoundError without opacus.
    """
    if settings.batch_size > len(data):
        raise ValueError(f"batch_size is {settings.batch_size}; there are {len(data)} images")
    model = afresh(with_group_norm(model, settings.groups))
    optimizer = torch.optim.SGD(model.parameters(), settings.lr, settings.momentum)
    make = _private if settings.clip < math.inf else _plain
    step, unwrap = make(model, optimizer, settings)
    device = device_of(model)
    images, labels = data.images.to(device), data.labels.to(device)
    rate = settings.batch_size / len(images)
    steps = round(1 / rate)
    in_all = steps * settings.epochs
    generator = torch.Generator().manual_seed(seed)  # the control draws the same batches
    history = []
    bar = tqdm(range(1, settings.epochs + 1), desc="DP-SGD", unit="epoch", disable=not progress)
    model.train()
    for epoch in bar:
        loss, hits, seen = 0.0, 0, 0
        for taken in range((epoch - 1) * steps, epoch * steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr / 2 * (1 + math.cos(math.pi * taken / in_all))
            batch = (torch.rand(len(images), generator=generator) < rate).nonzero().flatten().to(device)
            if len(batch) == 0:
                continue
            x = augmented(to_float(images[batch]), settings.augment)
            batch_loss, batch_hits = step(x, labels[batch])
            loss, hits, seen = loss + batch_loss, hits + batch_hits, seen + len(batch)
            look(watch, model, taken, in_all)
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss became {loss} in epoch {epoch}; try a lower rate than lr={settings.lr:g}"
            )
        history.append({"epoch": epoch, "loss": loss / max(1, seen), "accuracy": hits / max(1, seen)})
        bar.set_postfix(accuracy=f"{history[-1]['accuracy']:.1%}")
    unwrap()
    evidence = {
        "epsilon": epsilon(settings.noise, rate, in_all, 1 / len(data)) if settings.noise else None,
        "delta": 1 / len(data),
        "noise": settings.noise,
        "clip": settings.clip if settings.clip < math.inf else None,
        "sample_rate": rate,
        "steps": in_all,
        "images": len(data),
    }
    return Defended(model.eval(), history, evidence)


def with_group_norm(model: nn.Module, groups: int = DPSGDSettings.groups) -> nn.Module:
    """A copy of `model` with GroupNorm, of new weights, where it has BatchNorm.

    BatchNorm mixes the images of a batch, so that none has a gradient of its own. The groups are as many as
    `groups` where these divide the channels, else their greatest common divisor. Activations no longer work
    in place: the hooks that take single images' gradients need what those would overwrite.
    """
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    for module in list(model.modules()):
        if getattr(module, "inplace", False):
            module.inplace = False
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm):
                count = math.gcd(groups, child.num_features)
                norm = nn.GroupNorm(count, child.num_features, eps=child.eps, affine=child.affine)
                setattr(module, name, norm.to(device_of(model)).train(child.training))
    return model


def afresh(model: nn.Module) -> nn.Module:
    """Draw all weights of `model` anew, in place. Raises ValueError where a module cannot do that."""
    for name, module in model.named_modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        elif list(module.parameters(recurse=False)):
            raise ValueError(f"{name or 'the model'} ({type(module).__name__}) has no reset_parameters")
    return model


def epsilon(noise: float, sample_rate: float, steps: int, delta: float) -> float:
    """The privacy budget of `steps` steps, by Renyi accounting: smaller is more private."""
    accountant = _opacus().accountants.RDPAccountant()
    accountant.history = [(noise, sample_rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at budgets this large its best order is the smallest it tries
        return accountant.get_epsilon(delta)


def _private(model: nn.Module, optimizer, settings: DPSGDSettings):
    """(a function that takes a private step, one that takes opacus's hooks off the model again)"""
    opacus = _opacus()
    hooked = opacus.GradSampleModule(model)
    how = {"noise_multiplier": settings.noise, "max_grad_norm": settings.clip}
    private = opacus.optimizers.DPOptimizer(optimizer, expected_batch_size=settings.batch_size, **how)

    def step(images: Tensor, labels: Tensor) -> tuple[float, int]:
        """One step on a batch of any size; returns the sum of its losses and the right answers in it."""
        chunks = list(zip(images.split(settings.chunk), labels.split(settings.chunk), strict=True))
        total, hits = 0.0, 0
        for left, (x, y) in zip(reversed(range(len(chunks))), chunks, strict=True):
            private.signal_skip_step(left > 0)  # gather now, add noise and move after the last
            logits = hooked(x)
            loss = F.cross_entropy(logits, y)
            with warnings.catch_warnings():  # that the first layer's input has no gradient is as it should be
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                loss.backward()
            private.step()
            private.zero_grad()
            total, hits = total + loss.item() * len(y), hits + (logits.argmax(1) == y).sum().item()
        return total, hits

    return step, hooked.to_standard_module


def _plain(model: nn.Module, optimizer, settings: DPSGDSettings):
    """As `_private`, without clipping and noise."""

    def step(images: Tensor, labels: Tensor) -> tuple[float, int]:
        logits = model(images)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        optimizer.zero_grad()
        (loss / settings.batch_size).backward()
        optimizer.step()
        return loss.item(), (logits.argmax(1) == labels).sum().item()

    return step, lambda: None


def _opacus():
    try:
        import opacus
        import opacus.accountants
        import opacus.optimizers
    except ModuleNotFoundError:
        raise ModuleNotFoundError("DP-SGD needs the package opacus: pip install opacus") from None
    return opacus
