"""The one training loop: it trains poisoned models, clean ones, and whatever a defence fine-tunes.

Images stay on the device as uint8 and become floats a batch at a time. On a CPU the loop runs in
channels-last memory format and, where the processor multiplies bfloat16 natively, under bfloat16
autocast: `make bench-training` measures what each buys on the machine at hand.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ibau.checks import one_of, positive
from ibau.data.files import whole_file
from ibau.data.images import ImageSet
from ibau.networks.models import device_of, takes_channels_last
from ibau.networks.seeding import seeded

AUGMENTS = ("none", "crop", "crop-flip")
PRECISIONS = ("auto", "float32", "bfloat16")
SCHEDULES = ("constant", "cosine")


class TrainingError(Exception):
    """Training stopped because it could not go on; the message says where and what to try."""


@dataclass(frozen=True)
class TrainSettings:
    """How to train. The paper trains with Adam for 50 epochs; the authors' code uses no augmentation."""

    epochs: int = 50
    batch_size: int = 128
    lr: float = 1e-3  # peak rate of Adam
    schedule: str = "cosine"  # "constant", or "cosine": a short linear warm-up, then cosine to zero
    weight_decay: float = 0.0
    augment: str = "none"  # "crop": pad 4 and crop; "crop-flip": and mirror half of the images
    precision: str = "auto"  # bfloat16 where the device multiplies it natively, else float32

    def __post_init__(self):
        one_of(self, "augment", AUGMENTS)
        one_of(self, "precision", PRECISIONS)
        one_of(self, "schedule", SCHEDULES)
        positive(self, "epochs", "batch_size", "lr")


Watch = Callable[[nn.Module], None]  # looks at a model while a defence runs, and changes nothing
LOOKS = 10  # along a run


def look(watch: Watch | None, model: nn.Module, step: int, steps: int) -> None:
    """After step 0, 1, ... of `steps`: call `watch` with the model in eval mode, LOOKS times in all."""
    if watch and (step + 1) * LOOKS // steps > step * LOOKS // steps:
        training = model.training
        watch(model.eval())
        model.train(training)


def to_float(images: Tensor) -> Tensor:
    """uint8 images become float32 in [0, 1]; floats pass through unchanged."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def native_bfloat16(device: torch.device) -> bool:
    """Does this device multiply bfloat16 in hardware? (Emulated bfloat16 is slower than float32.)"""
    if device.type == "cuda":  # NVIDIA's do from Ampere on; AMD's count from 9
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(k) for k in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast(device: torch.device, precision: str):
    """The autocast context for a precision setting (see TrainSettings.precision)."""
    low = precision == "bfloat16" or (precision == "auto" and native_bfloat16(device))
    return torch.autocast(device.type, torch.bfloat16) if low else nullcontext()


def learning_rate(step: int, total: int, settings: TrainSettings) -> float:
    """The rate at optimiser step `step` of `total`."""
    if settings.schedule == "constant":
        return settings.lr
    warm = max(1, total // 10)
    if step < warm:
        return settings.lr * (step + 1) / warm
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def augmented(images: Tensor, augment: str) -> Tensor:
    """Shift each image by up to 4 pixels (zeros come in) and, for "crop-flip", mirror every second one."""
    return images if augment == "none" else shifted(images, (4, 4), mirror=augment == "crop-flip")


def shifted(
    images: Tensor,
    most: tuple[int, int],
    mode: str = "constant",
    *,
    mirror: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Each image (N, C, H, W) moved by up to `most` (rows, columns); with `mirror` half of them are mirrored.

    mode       what comes in at the edges, as in `torch.nn.functional.pad`: zeros, or "reflect"
    generator  of the random numbers; None: the global one of the images' device
    """
    n, _, *sides = images.shape
    device = images.device if generator is None else generator.device
    padded = F.pad(images, (most[1], most[1], most[0], most[0]), mode)
    rows, columns = (
        torch.randint(0, 2 * far + 1, (n, 1), generator=generator, device=device)
        + torch.arange(side, device=device)
        for far, side in zip(most, sides, strict=True)
    )
    if mirror:
        chosen = torch.rand(n, 1, generator=generator, device=device) < 0.5
        columns = torch.where(chosen, columns.flip(1), columns)
    index = torch.arange(n, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]
    index, rows, columns = (t.to(images.device) for t in index)
    return padded[index, :, rows, columns].permute(0, 3, 1, 2)


def train(
    model: nn.Module,
    data: ImageSet,
    settings: TrainSettings,
    *,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: str | None = None,
    watch: Watch | None = None,
) -> list[dict]:
    """Train `model` in place, on the device it is on, and leave it in eval mode.

    The same seed, machine and settings give the same weights. With `checkpoint`, the state is saved there
    after every epoch; a later call with the same settings goes on from it, to the same weights an
    undisturbed run gives, and the file is removed at the end. `progress` labels a progress bar. `watch` is
    called with the model, in eval mode, LOOKS times along the way; it changes nothing.

    Returns one dict an epoch: epoch, loss, accuracy (both over the training images as they were seen),
    seconds. Raises TrainingError when the loss is not finite, or the checkpoint is of another run.
    """
    device = device_of(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    run = {"settings": asdict(settings), "seed": seed, "images": len(data)}
    history = _resume(model, optimizer, checkpoint, run)
    images, labels = data.images.to(device), data.labels.to(device)
    layout = torch.channels_last if takes_channels_last(model, images) else torch.contiguous_format
    model.to(memory_format=layout)
    bar = tqdm(total=settings.epochs, initial=len(history), desc=progress, unit="epoch", disable=not progress)
    with bar:
        for epoch in range(len(history), settings.epochs):
            started = time.perf_counter()
            # Seeding each epoch by itself makes a resumed run equal to an undisturbed one.
            with seeded(seed * 100_003 + epoch):
                loss, accuracy = _epoch(model, optimizer, images, labels, epoch, settings, layout, watch)
            seconds = time.perf_counter() - started
            history.append({"epoch": epoch + 1, "loss": loss, "accuracy": accuracy, "seconds": seconds})
            bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.1%}")
            bar.update()
            if checkpoint and epoch + 1 < settings.epochs:
                _save_checkpoint(checkpoint, model, optimizer, run, history)
    if checkpoint:
        Path(checkpoint).unlink(missing_ok=True)
    model.eval()
    return history


def _epoch(
    model, optimizer, images, labels, epoch, settings: TrainSettings, layout, watch
) -> tuple[float, float]:
    """One pass over the shuffled images; returns mean loss and accuracy."""
    model.train()
    device = images.device
    order = torch.randperm(len(images), device=device)
    # A last batch of one image would break BatchNorm, so a lone straggler is left out of this epoch.
    alone = len(images) == 1 or settings.batch_size == 1
    batches = [b for b in order.split(settings.batch_size) if len(b) > 1 or alone]
    total_loss = torch.zeros((), device=device)
    correct = torch.zeros((), device=device)
    for index, batch in enumerate(batches):
        step, steps = epoch * len(batches) + index, settings.epochs * len(batches)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, settings)
        x = augmented(to_float(images[batch]), settings.augment).contiguous(memory_format=layout)
        y = labels[batch]
        with autocast(device, settings.precision):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total_loss += loss.detach() * len(batch)
        correct += (logits.argmax(1) == y).sum()
        look(watch, model, step, steps)
    seen = sum(len(b) for b in batches)
    mean_loss = total_loss.item() / seen
    if not math.isfinite(mean_loss):
        raise TrainingError(
            f"the loss became {mean_loss} in epoch {epoch + 1}; try a lower rate than lr={settings.lr:g}, "
            "or precision='float32'"
        )
    return mean_loss, correct.item() / seen


def _save_checkpoint(path: str | Path, model, optimizer, run: dict, history: list[dict]) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "run": run, "history": history}
    with whole_file(path) as temporary:
        torch.save(state, temporary)


def _resume(model, optimizer, path: str | Path | None, run: dict) -> list[dict]:
    if not path or not Path(path).exists():
        return []
    try:
        state = torch.load(path, map_location=device_of(model), weights_only=True)
    except Exception:  # a checkpoint cut short by a full disk is worth no more than none
        return []
    if state["run"] != run:
        raise TrainingError(f"{path}: a checkpoint of another run ({state['run']}, wanted {run}); remove it")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["history"]
