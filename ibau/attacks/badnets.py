"""BadNets (Gu et al. 2017, arXiv 1708.06733): a small patch of fixed colour."""

import torch
from torch import Tensor

from ibau.attacks.trigger import Trigger


def badnets(image_size: int = 32, *, size: int = 4, margin: int = 1, value: float = 1.0) -> Trigger:
    """A square of `size` pixels and grey level `value`, `margin` pixels from the lower right corner.

    The defaults are the I-BAU authors': white, 4x4, rows and columns 27 to 30 of a 32x32 image.
    Raises ValueError for a square that does not fit into the image.
    """
    mask = square(image_size, size, margin)
    settings = {"size": size, "margin": margin, "value": value}
    return Trigger("badnets", "replace", mask.repeat(3, 1, 1) * value, mask, settings)


def square(image_size: int, size: int, margin: int) -> Tensor:
    """Its mask, (1, H, W). Raises ValueError for a square that does not fit into the image."""
    start = image_size - margin - size
    if size < 1 or margin < 0 or start < 0:
        raise ValueError(
            f"a square of {size} pixels with margin {margin} does not fit into {image_size} pixels"
        )
    mask = torch.zeros(1, image_size, image_size)
    mask[:, start : start + size, start : start + size] = 1
    return mask
