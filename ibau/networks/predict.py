"""The classes a network predicts for images."""

import torch
from torch import Tensor, nn

from ibau.networks.models import device_of, takes_channels_last
from ibau.networks.training import to_float


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, batch_size: int = 500) -> Tensor:
    """Predicted classes `(N,)`, on the CPU, for images `(N, 3, H, W)`, uint8 or in [0, 1]; in eval mode."""
    modes = [(module, module.training) for module in model.modules()]  # a part may be frozen in eval mode
    model.eval()
    device = device_of(model)
    layout = torch.contiguous_format
    if len(images) and takes_channels_last(model, images[:2].to(device)):
        layout = torch.channels_last
    parts = [
        model(to_float(x.to(device)).contiguous(memory_format=layout)).argmax(1).cpu()
        for x in images.split(batch_size)
    ]
    for module, training in modes:
        module.training = training
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
