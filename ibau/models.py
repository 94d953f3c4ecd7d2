"""The classifiers, and how their weights are saved and read.

Every model maps images `(N, 3, H, W)` in [0, 1] to logits `(N, num_classes)`. A model that was trained on
normalised inputs carries the normalisation as its first layer, so triggers always live in pixel space.
"""

import copy
import json
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ibau.files import whole_file

SMALL_VGG_PLAN = (32, 32, "M", 64, 64, "M", 128, 128, "M")
SMALL_VGG_DROPOUT = (0.3, 0.4, 0.4)


class ModelError(Exception):
    """A checkpoint that cannot be used; the message says what was found and what was expected."""


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


class SmallVGG(nn.Module):
    """The network of the I-BAU authors' repository, for 32x32 RGB images in [0, 1] without normalisation.

    3x3 convolutions of 32, 32, M, 64, 64, M, 128, 128, M channels, each followed by BatchNorm and ELU,
    dropout of 0.3, 0.4 and 0.4 after the three max-pools, then one linear layer. `width` scales the channels.
    State-dict keys are `features.<i>.*` and `classifier.*`, as in the authors' checkpoints.
    """

    def __init__(self, num_classes: int, width: float = 1.0):
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; a classifier needs at least 2")
        if width <= 0 or round(32 * width) < 1:
            raise ValueError(f"width is {width}; it must be positive and leave at least one channel")
        layers: list[nn.Module] = []
        dropout = iter(SMALL_VGG_DROPOUT)
        channels = 3
        for step in SMALL_VGG_PLAN:
            if step == "M":
                layers += [nn.MaxPool2d(2), Dropout(next(dropout))]
                continue
            out = round(step * width)
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ELU(inplace=True)]
            channels = out
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
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; a classifier needs at least 2")
        widths = [round(c * width) for c in (64, 128, 256, 512)]
        if min(widths) < 1:
            raise ValueError(f"width is {width}; it must be positive and leave at least one channel")
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
    if architecture not in MODELS:
        raise ValueError(f"unknown architecture {architecture!r}; valid: {', '.join(MODELS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
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


def save(model: nn.Module, path: str | Path, settings: dict | None = None) -> Path:
    """Write the weights as safetensors, with `settings` (anything JSON can hold) in the metadata.

    The file appears whole or not at all: it is written beside its final name and then renamed.
    """
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={"settings": json.dumps(settings or {}, sort_keys=True)})
    return Path(path)


def read_settings(path: str | Path) -> dict:
    """The settings stored by `save` in a safetensors file's metadata."""
    return json.loads(read_metadata(path).get("settings", "{}"))


def load_state(path: str | Path) -> dict[str, Tensor]:
    """Read a checkpoint's tensors: safetensors, or a foreign `.pth`/`.pt` of plain tensors, see `read`.

    One level of wrapping is taken off, `{"net": ...}`, `{"state_dict": ...}` or `{"model": ...}`, and so is
    DataParallel's `module.`. Raises ModelError for a missing or damaged file, and one that holds more.
    """
    state, _ = unwrap(read(path), path)
    return {bare(key): value for key, value in state.items()}


def read(path: str | Path) -> dict:
    """A checkpoint's content as it stands in the file.

    A pickle is only ever read with `weights_only=True`, so it cannot run code.

    Raises ModelError for a missing or damaged file, and for a pickle that holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such checkpoint file")
    if path.suffix == ".safetensors":
        with _open_safetensors(path) as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no __iter__)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in torch's reader in as many ways as there are damages
        reason = str(error)
        found = next((line.strip() for line in reason.splitlines() if "unsupported" in line.lower()), None)
        if isinstance(error, pickle.UnpicklingError) and found:
            raise ModelError(
                f"{path}: refused, because reading it would need more than plain tensors "
                f"({found.split('. Please use')[0]}). "
                "Expected: a state dict saved with torch.save(model.state_dict(), path), or safetensors."
            ) from None
        raise ModelError(f"{path}: not a readable checkpoint ({type(error).__name__})") from None


def unwrap(content: object, path: str | Path) -> tuple[dict[str, Tensor], str | None]:
    """The state dict in a checkpoint's content, and the key it lies under: None where it is the content."""
    wrapper = None
    if isinstance(content, dict):
        keys = ("net", "state_dict", "model")
        wrapper = next((key for key in keys if isinstance(content.get(key), dict)), None)
    state = content if wrapper is None else content[wrapper]
    if not isinstance(state, dict) or not state:
        raise ModelError(f"{path}: holds a {type(state).__name__}, expected a dict of named tensors")
    foreign = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if foreign:
        raise ModelError(
            f"{path}: entries that are not tensors: {_some(foreign)}; expected a state dict, bare or under "
            "'net', 'state_dict' or 'model'"
        )
    return state, wrapper


def bare(key: object) -> str:
    """A checkpoint's key as the model names it: without DataParallel's `module.`."""
    return str(key).removeprefix("module.")


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts in a safetensors file's metadata; none for another format."""
    if Path(path).suffix != ".safetensors":
        return {}
    with _open_safetensors(Path(path)) as file:
        return file.metadata() or {}


def load(path: str | Path, model: nn.Module) -> nn.Module:
    """Fill `model` with the weights at `path` and return it in eval mode.

    Raises ModelError, listing them, where keys or shapes do not match; the model is then unchanged.
    """
    state = load_state(path)
    expected = model.state_dict()
    # A Norm's counter is bookkeeping that older checkpoints and other tools leave out.
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in expected]
    misshapen = [
        f"{k} is {tuple(state[k].shape)}, expected {tuple(expected[k].shape)}"
        for k in expected
        if k in state and state[k].shape != expected[k].shape
    ]
    problems = [
        f"{label}: {_some(items)}"
        for label, items in (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen))
        if items
    ]
    if problems:
        raise ModelError(f"{path}: does not fit {type(model).__name__}; " + "; ".join(problems))
    model.load_state_dict(state, strict=False)
    return model.eval()


def _some(items: list[str], most: int = 6) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def _open_safetensors(path: Path):
    if not path.is_file():
        raise ModelError(f"{path}: no such checkpoint file")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error})") from None
