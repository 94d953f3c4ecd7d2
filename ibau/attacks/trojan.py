"""The Trojan attack (Liu et al., NDSS 2018): a patch optimised to excite one neuron of a clean model.

    maximise over the pixels p in the mask m:   mean_x a((1 - m) x + m p) - w TV(p),   p in [0, 1]

a is the activation of the neuron with the largest total absolute weight to the next layer, TV the total
variation that keeps the patch smooth. Both triggers differ in their mask alone.
"""

import torch
from torch import Tensor, nn

from ibau.attacks.badnets import square
from ibau.attacks.neurons import Look, ascend, by_weight, looking_into, risen, sample
from ibau.attacks.trigger import Trigger


def trojan_square(
    image_size: int = 32,
    *,
    model: nn.Module,
    images: Tensor,
    seed: int = 0,
    size: int = 9,
    margin: int = 1,
    smoothing: float = 0.1,
    steps: int = 60,
) -> Trigger:
    """A square of `size` pixels, `margin` from the lower right corner; 9x9 = 81 pixels as the I-BAU authors'.

    model, images: a clean model and clean images (N, 3, H, W), uint8 or in [0, 1]. smoothing: the weight of
    the total variation. Raises ValueError for a square that does not fit, or images of another size.
    """
    mask, drawn = square(image_size, size, margin), {"size": size, "margin": margin}
    return _trojan("trojan_square", mask, drawn, model, images, seed, smoothing, steps)


def trojan_watermark(
    image_size: int = 32,
    *,
    model: nn.Module,
    images: Tensor,
    seed: int = 0,
    width: float = 0.31,
    smoothing: float = 0.1,
    steps: int = 150,
) -> Trigger:
    """A flower across the image: see `watermark`. The inputs are those of `trojan_square`.

    width: of the flower's strokes, where the image is 2 wide. 0.31 makes 321 pixels of 32x32, as many as the
    authors' watermark has. Raises ValueError for one outside (0, 1], or too narrow to hold a pixel.
    """
    if not 0 < width <= 1:
        raise ValueError(f"width is {width}; it must lie in (0, 1]")
    mask = watermark(image_size, width)
    if not mask.any():
        raise ValueError(
            f"width is {width}; strokes so narrow hold none of {image_size} x {image_size} pixels"
        )
    return _trojan("trojan_watermark", mask, {"width": width}, model, images, seed, smoothing, steps)


def watermark(image_size: int, width: float = 0.31) -> Tensor:
    """Our watermark's mask, (1, H, W): a flower's outline, its strokes `width` wide."""
    axis = (torch.arange(image_size) + 0.5) / image_size * 2 - 1  # pixel centres, the image being [-1, 1]^2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    radius, angle = (x**2 + y**2).sqrt(), torch.atan2(-y, x)
    petals = 0.64 + 0.18 * torch.sin(5 * angle + 0.3)
    return ((radius - petals).abs() < width / 2).float()[None]


def _trojan(name: str, mask: Tensor, drawn: dict, model, images, seed, smoothing, steps) -> Trigger:
    """The trigger with the optimised patch under `mask`; `drawn` are the settings that drew the mask."""
    random = torch.Generator().manual_seed(seed)
    x = sample(images, model, mask.shape[-1], 256, random)
    m = mask.to(x)
    start = torch.rand(3, *mask.shape[1:], generator=random).to(x)
    with looking_into(model) as look:
        neuron = _strongest_in_sight(look, by_weight(model), x[:32], m)

        def objective(patch: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
            activation = look(torch.lerp(some, patch, m))[0][:, neuron].mean()
            return activation - smoothing * total_variation(patch, m), activation

        patch, history = ascend(objective, start, x, steps=steps, random=random)
        about = risen(look, neuron, x, torch.lerp(x, patch, m), history)
    pixels = int(mask.sum())
    settings = {**drawn, "pixels": pixels, "smoothing": smoothing, "steps": steps, "seed": seed, **about}
    return Trigger(name, "replace", (patch * m).cpu(), mask, settings)


def total_variation(patch: Tensor, mask: Tensor) -> Tensor:
    """Absolute differences of neighbours of `patch` (3, H, W) inside the mask, summed, per masked value."""
    down = (patch[:, 1:] - patch[:, :-1]).abs() * (mask[:, 1:] * mask[:, :-1])
    right = (patch[..., 1:] - patch[..., :-1]).abs() * (mask[..., 1:] * mask[..., :-1])
    return (down.sum() + right.sum()) / (3 * mask.sum())


def _strongest_in_sight(look: Look, ranked: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """The first of the ranked neurons whose gradient reaches 90% of the masked pixels, as a tensor (1,).

    A neuron above a convolution sees a part of the image only: the strongest may be blind to the patch.
    """
    images = images.detach().requires_grad_(True)
    neurons = look(images)[0]
    inside = mask[0] > 0
    for neuron in ranked:
        (gradient,) = torch.autograd.grad(neurons[:, neuron].sum(), images, retain_graph=True)
        if (gradient.abs().amax((0, 1))[inside] > 0).float().mean() >= 0.9:
            return neuron[None]
    raise ValueError("no neuron of the model's last linear layer sees the whole patch; use a smaller patch")
