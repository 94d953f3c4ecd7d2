"""The classifiers, and the device they are computed on.

Every model maps images `(N, 3, H, W)` in [0, 1] to logits `(N, num_classes)`. A model that was trained on
normalised inputs carries the normalisation as its first layer, so triggers always live in pixel space.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibau.checks import known
from ibau.networks.seeding import seeded


class Dropout(nn.Dropout):
    """Dropout whose CPU mask costs one 64-bit random number for eight elements; `p` is rounded to 1/256.

    torch draws CPU masks one element at a time, which took an eighth of a training step of SmallVGG.
    """

    def forward(self, x: Tensor) -> Tensor:
        dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        dropped = round(256 * self.p)
        if not self.training or x.device.type != "cpu" or not dense or dropped == 256:
            return super().forward(x)
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        keep = words.view(torch.uint8)[: x.numel()] >= dropped
        return x * keep.as_strided(x.shape, x.stride()).to(x.dtype).mul_(256 / (256 - dropped))


def _scaled(channels: tuple[int, ...], width: float, num_classes: int) -> list[int]:
    """`channels` times `width`. Raises ValueError where one is left without any, or classes are too few."""
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; a classifier needs at least 2")
    scaled = [round(count * width) for count in channels]
    if min(scaled) < 1:
        raise ValueError(f"width is {width}; it must be positive and leave at least one channel")
    return scaled


class SmallVGG(nn.Module):
    """The network of the I-BAU authors' repository, for 32x32 RGB images in [0, 1] without normalisation.

    Three times two 3x3 convolutions, each followed by BatchNorm and ELU, a max-pool and dropout; then one
    linear layer. `width` scales the channels, which are 32, 64 and 128.
    State-dict keys are `features.<i>.*` and `classifier.*`, as in the authors' checkpoints.
    """

    def __init__(self, num_classes: int, width: float = 1.0):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out, dropout in zip(_scaled((32, 64, 128), width, num_classes), (0.3, 0.4, 0.4), strict=True):
            for _ in range(2):
                layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ELU(inplace=True)]
                channels = out
            layers += [nn.MaxPool2d(2), Dropout(dropout)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * 4 * 4, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))


class PreActBlock(nn.Module):
    """The basic pre-activation residual block (He et al. 2016, "Identity mappings", fig. 4e)."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        reshaped = stride != 1 or channels != out
        self.shortcut = nn.Conv2d(channels, out, 1, stride=stride, bias=False) if reshaped else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(active)
        return skip + self.conv2(F.relu(self.bn2(self.conv1(active))))


class PreActResNet18(nn.Module):
    """Pre-activation ResNet-18 in its CIFAR form (3x3 stem, no max-pool), as in BackdoorBench."""

    def __init__(self, num_classes: int, width: float = 1.0):
        super().__init__()
        widths = _scaled((64, 128, 256, 512), width, num_classes)
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        blocks, channels = [], widths[0]
        for stage, out in enumerate(widths):
            blocks += [PreActBlock(channels, out, 1 if stage == 0 else 2), PreActBlock(out, out, 1)]
            channels = out
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(self.bn(self.blocks(self.stem(images))))
        return self.classifier(maps.mean(dim=(2, 3)))


MODELS = {"small_vgg": SmallVGG, "preact_resnet18": PreActResNet18}


def build(architecture: str, num_classes: int, width: float = 1.0, seed: int = 0) -> nn.Module:
    """A freshly initialised model; `seed` fixes its weights without touching the global generator."""
    known("architecture", architecture, MODELS)
    with seeded(seed):
        return MODELS[architecture](num_classes, width)


@torch.no_grad()
def takes_channels_last(model: nn.Module, images: Tensor) -> bool:
    """Can `model` work on channels-last tensors, which is faster on CPUs and CUDA devices?

    Not if it calls `view` on what a convolution returns. Tried on a copy, with two of `images`.
    """
    if images.device.type not in ("cpu", "cuda"):
        return False
    trial = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
    few = images[:2] / 255 if images.dtype == torch.uint8 else images[:2].clone()
    try:
        trial(few.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return False
    return True


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lives (the CPU for a model without any)."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def default_device() -> torch.device:
    """The first CUDA device; without one Apple's GPU (MPS), and without that the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
