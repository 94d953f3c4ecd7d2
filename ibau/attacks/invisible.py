"""Two invisible triggers (Li et al. 2019, arXiv 1909.02742): few pixels, or a small norm.

Both raise the mean activation a of chosen neurons of a clean model, those with the largest total absolute
weight to the next layer.

    l0-inv   fix the set S of the most salient pixels, |da/dx| being largest; then maximise mean_x a over
             their values in [0, 1]
    l2-inv   maximise mean_x a(clip(x + d)) - w |d|_2, starting from noise far above the threshold, with w
             growing until |d|_2 is at or below it
"""

import math

import torch
from torch import Tensor, nn

from ibau.attacks.neurons import ascend, by_weight, looking_into, risen, sample
from ibau.attacks.trigger import Trigger

NEURONS = 10  # how many are driven
LARGEST = 68 / 255  # change of a value by l2-inv, as in the I-BAU authors' trigger


def l0_inv(
    image_size: int = 32, *, model: nn.Module, images: Tensor, seed: int = 0, pixels: int = 9, steps: int = 60
) -> Trigger:
    """Replace `pixels` pixels; 9 as in the I-BAU authors' trigger.

    model, images: a clean model and clean images (N, 3, H, W), uint8 or in [0, 1]. Raises ValueError for
    fewer than one pixel or more than there are, and images of another size.
    """
    if not 1 <= pixels <= image_size**2:
        raise ValueError(f"pixels is {pixels}; valid: 1 to {image_size**2}")
    random = torch.Generator().manual_seed(seed)
    x = sample(images, model, image_size, 256, random)
    start = torch.rand(3, image_size, image_size, generator=random).to(x)
    with looking_into(model) as look:
        chosen = by_weight(model)[:NEURONS]
        seen = x[:100].detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(look(seen)[0][:, chosen].sum(), seen)
        salient = gradient.abs().mean(0).sum(0).flatten().argsort(descending=True, stable=True)[:pixels]
        m = torch.zeros(image_size**2).to(x).index_fill(0, salient, 1).view(1, image_size, image_size)

        def objective(values: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
            activation = look(torch.lerp(some, values, m))[0][:, chosen].mean()
            return activation, activation

        values, history = ascend(objective, start, x, steps=steps, random=random)
        about = risen(look, chosen, x, torch.lerp(x, values, m), history)
    settings = {"pixels": pixels, "steps": steps, "seed": seed, **about}
    return Trigger("l0_inv", "replace", (values * m).cpu(), m.cpu(), settings)


def l2_inv(
    image_size: int = 32,
    *,
    model: nn.Module,
    images: Tensor,
    seed: int = 0,
    norm: float | None = None,
    steps: int = 60,
) -> Trigger:
    """Add a perturbation of l2 norm `norm`, no value beyond +-LARGEST; the sum is clipped to [0, 1].

    norm counts over the 3 x H x W values of an image in [0, 1]. None means 3.1 at 32x32 and the same root
    mean square, 0.056, at other sizes: a PSNR of 25 dB or more, whatever the image. The I-BAU authors'
    trigger has 3.22. steps: the most; the norm usually meets its threshold earlier. The other inputs are
    those of `l0_inv`. Raises ValueError for a norm that no perturbation can have.
    """
    norm = 3.1 * image_size / 32 if norm is None else norm
    values = 3 * image_size**2
    most = 0.8 * LARGEST * math.sqrt(values)  # beyond, nearly every value would lie at its bound
    if not 0 < norm <= most:
        raise ValueError(f"norm is {norm}; valid with largest={LARGEST:.3g}: above 0, at most {most:.4g}")
    random = torch.Generator().manual_seed(seed)
    x = sample(images, model, image_size, 256, random)
    noise = torch.randn(3, image_size, image_size, generator=random).to(x)
    with looking_into(model) as look:
        chosen = by_weight(model)[:NEURONS]
        # Activations count in units of their spread over clean images, so w means the same for every model.
        with torch.no_grad():
            scale = look(x)[0][:, chosen].std().clamp(min=1e-6)
        weight = 0.1

        def objective(delta: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal weight
            weight *= 1.1
            activation = look((some + delta).clamp(0, 1))[0][:, chosen].mean()
            return activation / scale - weight * delta.norm(), activation

        delta, history = ascend(
            objective,
            (3 * norm * noise / noise.norm()).clamp(-LARGEST, LARGEST),
            x,
            steps=steps,
            lr=0.2 * norm / math.sqrt(values),  # a fifth of the root mean square to arrive at
            low=-LARGEST,
            high=LARGEST,
            random=random,
            until=lambda d: d.norm() <= norm,
        )
        delta = (delta * norm / delta.norm()).clamp(-LARGEST, LARGEST)
        about = risen(look, chosen, x, (x + delta).clamp(0, 1), history)
    settings = {"norm": norm, "largest": LARGEST, "steps": len(history), "seed": seed, **about}
    return Trigger("l2_inv", "add", delta.cpu(), torch.ones(1, image_size, image_size), settings)
