"""Fine-Pruning: cut off the channels clean images leave idle, then fine-tune (Liu et al., RAID 2018)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ibau.checks import within
from ibau.data.images import ImageSet
from ibau.defences.base import Defended
from ibau.defences.finetune import clean_split, held_out_accuracy, scaled_epochs
from ibau.defences.nad import outputs_of
from ibau.networks.models import device_of
from ibau.networks.training import TrainSettings, Watch, look, to_float, train


@dataclass(frozen=True)
class FinePruningSettings:
    """How far to prune, and how to fine-tune afterwards (as the control `finetune` does)."""

    tolerance: float = 0.04  # held-out accuracy that pruning may cost; 4 points, as in the paper
    training: TrainSettings = TrainSettings(epochs=20, batch_size=64, augment="crop-flip")
    held_out: float = 0.2  # share of the clean images that pruning is judged on, 500 at most

    def __post_init__(self):
        within(self, "[0, 1]", "tolerance")

    @classmethod
    def quick(cls) -> "FinePruningSettings":
        """A budget of seconds, for the digits of mnist5k."""
        return cls(training=TrainSettings(epochs=20, batch_size=32, augment="crop"))

    @classmethod
    def desk(cls) -> "FinePruningSettings":
        """A budget of minutes on a CPU: 8 of the 20 epochs of fine-tuning; pruning is as published."""
        return cls(training=TrainSettings(epochs=8, batch_size=64, augment="crop-flip"))

    @property
    def work(self) -> int:
        """What its time is proportional to, but for the pruning."""
        return self.training.epochs

    def scaled(self, share: float) -> "FinePruningSettings":
        """The same with this share of the epochs; pruning goes as far as ever."""
        return replace(self, training=scaled_epochs(self.training, share))


def fine_pruning(
    model: nn.Module,
    data: ImageSet,
    *,
    settings: FinePruningSettings,
    seed: int = 0,
    progress: bool = False,
    watch: Watch | None = None,
) -> Defended:
    """Prune `model`, which is changed, and fine-tune it on the clean images but for the held-out ones.

    The channels are those of the last convolution as the classifier reads them. They go one by one, the least
    active on the clean images first, while held-out accuracy stays within the tolerance of what it was.

    history   an epoch's loss and accuracy, of the fine-tuning
    evidence  layer (the one that reads the channels), channels, pruned (how many), order (the first `pruned`
              of it are), curve (held-out accuracy by the number pruned, to the first that was too low or to
              all), tolerance, held-out accuracy before, after pruning and at the end
    tensors   "activation" (channels,): mean over the clean images

    Raises ValueError for a model whose last convolution no linear layer reads, and as `clean_split` does.
    """
    learnt, watched = clean_split(model, data, settings.held_out, seed)
    reader, activation = last_channels(model, learnt.images)
    order = activation.argsort()
    before = held_out_accuracy(model, watched)
    curve = [{"pruned": 0, "held_out_acc": before}]
    original, pruned = reader.weight.detach().clone(), 0
    for count in tqdm(range(1, len(order) + 1), desc="pruning", unit="channel", disable=not progress):
        prune(reader, order[:count], len(order))
        curve.append({"pruned": count, "held_out_acc": held_out_accuracy(model, watched)})
        if before - curve[-1]["held_out_acc"] > settings.tolerance + 1e-9:  # 0.95 - 0.91 is not quite 0.04
            break
        pruned = count
        look(watch, model, count - 1, len(order))
    with torch.no_grad():
        reader.weight.copy_(original)
    keep = prune(reader, order[:pruned], len(order))
    frozen = reader.weight.register_hook(lambda gradient: gradient * keep)
    label = "fine-tuning" if progress else None
    history = train(model, learnt, settings.training, seed=seed, progress=label, watch=watch)
    frozen.remove()
    evidence = {
        "layer": next(name for name, module in model.named_modules() if module is reader),
        "channels": len(order),
        "pruned": pruned,
        "order": order.tolist(),
        "curve": curve,
        "tolerance": settings.tolerance,
        "held_out_images": len(watched),
        "held_out_acc_before": before,
        "held_out_acc_pruned": curve[pruned]["held_out_acc"],
        "held_out_acc": held_out_accuracy(model, watched),
    }
    return Defended(model, history, evidence, {"activation": activation})


@torch.no_grad()
def prune(reader: nn.Linear, channels: Tensor, of: int) -> Tensor:
    """Zero the weights by which `reader` reads these `channels` of its `of`; returns the mask it applied.

    What nobody reads is dead, whatever it is. A zero filter would not be: a shift of BatchNorm or a
    shortcut around the convolution brings its channel back to life.
    """
    keep = torch.ones(of, device=reader.weight.device)
    keep[channels] = 0
    keep = keep.repeat_interleave(reader.in_features // of)  # a channel's pixels lie together
    reader.weight *= keep
    return keep


@torch.no_grad()
def last_channels(model: nn.Module, images: Tensor, batch_size: int = 500) -> tuple[nn.Linear, Tensor]:
    """The linear layer that reads the last convolution's maps, and their channels' mean activation.

    Found by watching one batch: the first linear layer of flat input (N, channels * pixels) that is called
    after the last convolution; the channels are those of the last maps (N, channels, height, width) before
    it, behind normalisation, activation and pooling. Raises ValueError where there is no such layer.
    """
    device = device_of(model)
    modules = {name: module for name, module in model.named_modules() if not list(module.children())}
    with outputs_of(model, tuple(modules)) as found:
        model(to_float(images[:2].to(device)))
    calls = [(modules[name], output) for name, output in found.items()]
    last = max((i for i, (m, _) in enumerate(calls) if isinstance(m, nn.Conv2d)), default=len(calls))
    readers = [i for i, (m, x) in enumerate(calls) if i > last and isinstance(m, nn.Linear) and x.dim() == 2]
    if not readers:
        raise ValueError(
            "fine-pruning needs a linear layer that reads the last convolution; the model has none"
        )
    reader, before = calls[readers[0]][0], calls[last : readers[0]]
    channels = [x.shape[1] for _, x in before if isinstance(x, Tensor) and x.dim() == 4][-1]
    if reader.in_features % channels:
        raise ValueError(f"a layer of {reader.in_features} inputs cannot read {channels} channels")
    total = torch.zeros(reader.in_features, device=device)
    hook = reader.register_forward_pre_hook(lambda m, inputs: total.add_(inputs[0].float().sum(0)))
    for x in images.split(batch_size):
        model(to_float(x.to(device)))
    hook.remove()
    return reader, (total / len(images)).view(channels, -1).mean(1).cpu()
