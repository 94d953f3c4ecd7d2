"""DeepInspect (Chen et al., IJCAI 2019): find and patch a backdoor without a single image.

1. Model inversion: from noise to images that the model takes for each class. They stand in for clean ones.
2. A conditional generator G(z, t) learns perturbations that send these images to any class t:

       CE(f(x + G), t)  +  gamma1 (p_t(x + G) - 1)^2  +  gamma2 max(0, |G|_1 - gamma)

   The second is the GAN's loss; its discriminator is the inspected model, which stays as it is.
3. A class that needs an outlying little perturbation is the attacker's target: the test is one-sided, with
   the median absolute deviation of the half below the median.
4. The model is fine-tuned on inverted images, some of which carry G's perturbations, under their own labels.

How sure this is: the steps, and the conditional generator with its negative log-likelihood and its norm, were
read in a public port (TrojanZoo) and in summaries of the paper; that the inspected model is the
discriminator, the hinge, and the success of 95% wanted are recalled and were not read there. Sizes of
networks and numbers of steps are ours. Approximate on purpose: gamma2 is one number a class and follows its
success, as lambda does in Neural Cleanse; inversion has a smoothness prior and no other; patching keeps
BatchNorm's statistics, since those of inverted images would ruin them. Nothing is tuned on held-out data:
there are none.
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ibau.checks import not_negative, one_of, positive, within
from ibau.data.images import ImageSet
from ibau.defences.base import Defended
from ibau.defences.inversion import (
    CHUNK,
    CONSISTENT,
    POLICIES,
    SUSPICIOUS,
    Classify,
    Schedule,
    decide,
    fooled,
    frozen,
    rows,
)
from ibau.networks.models import device_of
from ibau.networks.predict import predict
from ibau.networks.seeding import seeded
from ibau.networks.training import PRECISIONS, TrainSettings, Watch, train

SAMPLES = 8  # of a class's perturbations that worked, the newest: patching stamps with them


@dataclass(frozen=True)
class DeepInspectSettings:
    """How to invert, inspect and patch. The paper's own numbers are not known here but for those it says."""

    image_size: int = 32  # pixels, a multiple of 4: without images nothing else tells it
    inverted: int = 100  # images a class
    inversion_steps: int = 300
    inversion_lr: float = 0.1  # of Adam, in the space before tanh
    smoothness: float = 1e-2  # weight of an inverted image's total variation
    noise: int = 100  # length of z
    steps: int = 1000  # of the generator
    batch_size: int = 32  # inverted images a step, each under every class's perturbation
    lr: float = 2e-3  # of the generator's Adam
    gamma1: float = 1.0  # weight of the GAN's loss
    gamma: float = 0.0  # |G|_1 that costs nothing: sum over pixels and channels
    success: float = 0.95  # share of images a working perturbation sends to its class (the paper's)
    weight: float = 3e-3  # gamma2 once a perturbation works
    factor: float = 2.0  # gamma2 times this after `patience` successes in a row, / factor^1.5 after failures
    patience: int = 5  # steps
    unflagged: str = "leave"  # where no class is flagged: leave the model, or patch the "smallest"
    stamped: float = 0.5  # share of the inverted images that carry a perturbation while patching
    patch_epochs: int = 5
    patch_lr: float = 1e-4  # of Adam
    precision: str = "auto"  # bfloat16 where the device multiplies it natively, else float32

    def __post_init__(self):
        positive(self, "inverted", "inversion_steps", "inversion_lr", "noise", "steps", "batch_size", "lr")
        positive(self, "weight", "patience", "patch_epochs", "patch_lr", "image_size")
        not_negative(self, "smoothness", "gamma1", "gamma")
        within(self, "(0, 1)", "success", "stamped")
        within(self, "(1, inf)", "factor")
        if self.image_size % 4:
            raise ValueError(f"image_size is {self.image_size}; it must be a multiple of 4")
        one_of(self, "unflagged", POLICIES)
        one_of(self, "precision", PRECISIONS)

    @property
    def work(self) -> int:
        """What its time is proportional to: images that are inverted or perturbed, step by step, a class."""
        return self.inverted * self.inversion_steps + self.batch_size * self.steps

    def scaled(self, share: float) -> "DeepInspectSettings":
        """The same with this share of the work: fewer images in fewer steps, by the same factor."""
        by = math.sqrt(share)
        return replace(
            self,
            inverted=max(5, round(by * self.inverted)),
            inversion_steps=max(15, round(by * self.inversion_steps)),
            batch_size=max(2, round(by * self.batch_size)),
            steps=max(30, round(by * self.steps)),
        )

    @classmethod
    def quick(cls, **other) -> "DeepInspectSettings":
        """A budget of forty seconds for ten classes on one core."""
        budget = {"inverted": 20, "inversion_steps": 50, "steps": 400, "batch_size": 8, "patience": 3}
        return cls(**{**budget, **other})

    @classmethod
    def desk(cls, **other) -> "DeepInspectSettings":
        """Minutes on a CPU for ten or 43 classes: as `quick`, with 4 images a step under every class.

        So 20 and not 100 inverted images a class, in 50 and not 300 steps; G learns for 400 and not 1,000.
        """
        return cls.quick(**{"batch_size": 4, **other})


class Generator(nn.Module):
    """G(z, t): noise (N, noise) and classes (N,) -> perturbations (N, 3, H, W) in [-1, 1]"""

    def __init__(self, num_classes: int, noise: int, image_size: int):
        super().__init__()
        self.num_classes, self.side = num_classes, image_size // 4
        self.stem = nn.Linear(noise + num_classes, 64 * self.side**2)
        self.grow = nn.Sequential(
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(32, 3, 4, stride=2, padding=1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        code = torch.cat([z, F.one_hot(t, self.num_classes).to(z)], dim=1)
        return self.grow(self.stem(code).view(-1, 64, self.side, self.side))


def invert(
    classify: Classify, num_classes: int, settings: DeepInspectSettings, device, seed: int
) -> ImageSet:
    """Images that the model takes for each class: min over x of CE(f(x), t) + smoothness TV(x), from noise.

    `inverted` images a class, float32 in [0, 1], labelled with the class they were made for.
    """
    s = settings
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_classes).repeat(s.inverted)
    shape = (len(labels), 3, s.image_size, s.image_size)
    # Grounds from black to white: what is learned on grey ones alone does not carry over to real images.
    start = 4 * torch.rand(len(labels), 1, 1, 1, generator=random) - 2
    start = start + 0.3 * torch.randn(shape, generator=random)
    done = []
    for w, t in zip(start.to(device).split(CHUNK), labels.to(device).split(CHUNK), strict=True):
        w = w.requires_grad_()
        optimizer = torch.optim.Adam([w], lr=s.inversion_lr)
        for _ in range(s.inversion_steps):
            x = w.tanh() / 2 + 0.5
            variation = x.diff(dim=2).abs().sum() + x.diff(dim=3).abs().sum()
            loss = F.cross_entropy(classify(x), t, reduction="sum") + s.smoothness * variation
            (w.grad,) = torch.autograd.grad(loss, w)
            optimizer.step()
        done.append((w.detach().tanh() / 2 + 0.5, t))
    return ImageSet(*(torch.cat(parts) for parts in zip(*done, strict=True)))


def objective(
    classify: Classify, x: Tensor, delta: Tensor, t: Tensor, gamma1: float, gamma2: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """The generator's loss for each of c perturbations of images (B, 3, H, W), and its success: (c,), (c,)"""
    loss, hits = fooled(classify, (x[None] + delta[:, None]).clamp(0, 1), t)
    gan = ((-loss).exp() - 1).square().mean(1)
    norm = (delta.abs().sum((1, 2, 3)) - gamma).clamp_min(0)
    return loss.mean(1) + gamma1 * gan + gamma2 * norm, hits


class Perturbations(NamedTuple):
    """What the generator found for each class; the last one tried stands in where none worked."""

    smallest: Tensor  # (classes, 3, H, W) in [-1, 1]: the least in |.|_1 of those that worked
    samples: list[Tensor]  # for each class up to SAMPLES of the newest that worked, (s, 3, H, W)
    norms: Tensor  # (classes,): |smallest|_1, over pixels and channels
    found: Tensor  # (classes,) bool: whether any worked
    history: list[dict]  # one dict a step: mean |G|_1 and success over the classes


def inspect(
    classify: Classify, inverted: ImageSet, settings: DeepInspectSettings, seed: int, progress: bool
) -> Perturbations:
    """Train G on inverted images; each step shows some of them every perturbation, from one z a class."""
    s, images, device = settings, inverted.images, inverted.images.device
    num_classes = int(inverted.labels.max()) + 1
    random = torch.Generator().manual_seed(seed)
    with seeded(seed):
        generator = Generator(num_classes, s.noise, s.image_size).to(device)
    optimizer = torch.optim.Adam(generator.parameters(), lr=s.lr, betas=(0.5, 0.9))
    schedules = [Schedule(s) for _ in range(num_classes)]
    targets = torch.arange(num_classes, device=device)
    smallest, samples, history = torch.zeros(num_classes, *images.shape[1:]), [[] for _ in targets], []
    for step in tqdm(range(1, s.steps + 1), desc="DeepInspect", unit="step", disable=not progress):
        x = images[torch.randint(len(images), (s.batch_size,), generator=random)]
        z = torch.randn(num_classes, s.noise, generator=random).to(device)
        delta = generator(z, targets)
        gamma2 = torch.tensor([schedule.weight for schedule in schedules], device=device)
        shares, gradients = [], []
        for part in torch.arange(num_classes, device=device).split(max(1, CHUNK // len(x))):
            mine = delta.detach()[part].requires_grad_()
            loss, hits = objective(classify, x, mine, targets[part], s.gamma1, gamma2[part], s.gamma)
            gradients += torch.autograd.grad(loss.sum(), mine)
            shares.append(hits.cpu())
        optimizer.zero_grad()
        delta.backward(torch.cat(gradients))
        optimizer.step()
        tried, asr = delta.detach().cpu(), torch.cat(shares)
        norms = tried.abs().sum((1, 2, 3))
        for t, (share, norm) in enumerate(zip(asr.tolist(), norms.tolist(), strict=True)):
            if schedules[t].record(share, norm) or schedules[t].best == math.inf:
                smallest[t] = tried[t]
            if share >= s.success:
                samples[t] = [*samples[t][1 - SAMPLES :], tried[t]]
        history.append({"step": step, "norm": norms.mean().item(), "asr": asr.mean().item()})
    samples = [torch.stack(some or [last]) for some, last in zip(samples, smallest, strict=True)]
    found = torch.tensor([schedule.best < math.inf for schedule in schedules])
    return Perturbations(smallest, samples, smallest.abs().sum((1, 2, 3)), found, history)


def small_side_indices(sizes: Tensor) -> Tensor:
    """(median - s) / (1.4826 MAD) of each of the sizes (c,), in float64, and 0 above the median.

    MAD: the median of |s - median| over those that are not above the median.
    """
    below = sizes.double().quantile(0.5) - sizes.double()
    spread = CONSISTENT * below[below >= 0].quantile(0.5)
    return torch.where(below <= 0, 0.0, below / spread)


class Still(nn.Sequential):
    """A model that stays in evaluation mode while it is trained: BatchNorm's statistics and dropout rest."""

    def train(self, mode: bool = True):
        return super().train(False)


def patch(
    model: nn.Module,
    inverted: ImageSet,
    samples: list[Tensor],
    settings: DeepInspectSettings,
    seed: int,
    watch: Watch | None,
) -> nn.Module:
    """Fine-tune a copy on inverted images, a share of which carry one of the perturbations, own labels kept.

    samples  for each class to patch away its perturbations (s, 3, H, W)
    """
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(inverted), generator=random)[: round(settings.stamped * len(inverted))]
    images, pool = inverted.images.clone(), torch.cat(samples).to(inverted.images.device)
    which = torch.randint(len(pool), (len(order),), generator=random)
    images[order] = (images[order] + pool[which]).clamp(0, 1)
    cleaned = copy.deepcopy(model).requires_grad_(True)
    epochs, precision = settings.patch_epochs, settings.precision
    tuning = TrainSettings(epochs, settings.batch_size, settings.patch_lr, "constant", precision=precision)
    train(Still(cleaned), ImageSet(images, inverted.labels), tuning, seed=seed, watch=watch)
    return cleaned.to(memory_format=torch.contiguous_format)


def deepinspect(
    model: nn.Module,
    data: None,
    *,
    settings: DeepInspectSettings,
    seed: int = 0,
    progress: bool = False,
    watch: Watch | None = None,
) -> Defended:
    """Invert images, learn every class's perturbation, flag the classes that need outlying little, patch.

    model  any classifier of images (N, 3, image_size, image_size) in [0, 1]; it is left as it was
    data   None: DeepInspect sees nothing

    Evidence: `classes`, a dict a class (norm, anomaly_index, flagged, found); `decision` and `patched` say
    what was done about it; `inverted_acc`, the share of inverted images the model takes for their class.
    Tensors: `perturbations` (classes, 3, H, W) in [-1, 1] and `inverted`, an image a class.
    Raises ValueError where the model does not take images of this size.
    """
    device = device_of(model)
    classify = frozen(model, settings.precision)
    blank = torch.zeros(1, 3, settings.image_size, settings.image_size, device=device)
    try:
        with torch.no_grad():
            num_classes = classify(blank).shape[1]
    except RuntimeError as error:
        raise ValueError(f"the model takes no images of image_size {settings.image_size}: {error}") from None
    inverted = invert(classify, num_classes, settings, device, seed)
    found = inspect(classify, inverted, settings, seed, progress)
    indices = small_side_indices(found.norms)
    odd = ((indices > SUSPICIOUS) & found.found).nonzero().flatten().tolist()
    chosen, decision = decide(odd, found.norms, settings.unflagged)
    cleaned = copy.deepcopy(model)
    if chosen:
        cleaned = patch(model, inverted, [found.samples[t] for t in chosen], settings, seed, watch)
    about = {
        "class": list(range(num_classes)),
        "norm": found.norms,
        "anomaly_index": indices,
        "flagged": [t in odd for t in range(num_classes)],
        "found": found.found,
    }
    evidence = {
        "classes": rows(about),
        "decision": decision,
        "patched": chosen,
        "inverted_acc": (predict(model, inverted.images) == inverted.labels.cpu()).float().mean().item(),
    }
    tensors = {"perturbations": found.smallest, "inverted": inverted.images[:num_classes].cpu()}
    return Defended(cleaned.eval(), found.history, evidence, tensors)
