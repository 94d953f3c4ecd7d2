"""How well a trigger hides: distances and likeness of poisoned and clean images, and their frequencies."""

import torch
import torch.nn.functional as F
from scipy.fft import dctn
from torch import Tensor

from ibau.attacks.trigger import Trigger
from ibau.networks.training import to_float


def stealth(trigger: Trigger, images: Tensor) -> dict[str, float]:
    """Means over `images` (N, 3, H, W), uint8 or in [0, 1], of what stamping `trigger` on them changes.

    l0      pixels changed (in any channel)
    l2      Euclidean norm of the change over all 3 x H x W values, images in [0, 1]
    linf    its largest absolute value
    psnr    peak signal-to-noise ratio in dB; 100 at most, which is also what an unchanged image counts
    ssim    structural similarity, see `ssim`
    high_frequency           share of the change's energy in high DCT frequencies, see `high_frequency_share`
    high_frequency_clean     the same share of the clean images,
    high_frequency_poisoned  and of the poisoned ones

    uint8 images are stamped in whole grey levels, and measured so. Raises ValueError without images.
    """
    if len(images) == 0:
        raise ValueError("stealth is a mean over images: give at least one")
    clean, poisoned = to_float(images), to_float(trigger(images))
    change = poisoned - clean
    flat = change.flatten(1)
    values = {
        "l0": (change != 0).any(1).flatten(1).sum(1),
        "l2": flat.norm(dim=1),
        "linf": flat.abs().amax(1),
        "psnr": psnr(clean, poisoned),
        "ssim": ssim(clean, poisoned),
        "high_frequency": high_frequency_share(change),
        "high_frequency_clean": high_frequency_share(clean),
        "high_frequency_poisoned": high_frequency_share(poisoned),
    }
    return {name: value.float().mean().item() for name, value in values.items()}


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair of images in [0, 1], (N,), in dB, at most 100."""
    return -10 * ((a - b) ** 2).flatten(1).mean(1).clamp(min=1e-10).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of each pair of images (N, 3, H, W) in [0, 1], (N,).

    Their Gaussian window: 11 x 11 pixels, sigma 1.5, only where it lies inside the image; K1 = 0.01,
    K2 = 0.03; averaged over places and channels. Raises ValueError for images of less than 11 pixels.
    """
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"images are {tuple(a.shape[-2:])}; SSIM's window takes 11 x 11 pixels")
    window = torch.exp(-0.5 * (torch.arange(-5, 6, dtype=torch.float64) / 1.5) ** 2)
    window = (window / window.sum()).expand(3, 1, 1, -1)

    def local_mean(images: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(images, window, groups=3), window.mT, groups=3)

    a, b = a.double().cpu(), b.double().cpu()  # variances are differences of near equals
    mean_a, mean_b = local_mean(a), local_mean(b)
    variance_a, variance_b = local_mean(a * a) - mean_a**2, local_mean(b * b) - mean_b**2
    covariance = local_mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).flatten(1).mean(1)


def spectrum(images: Tensor) -> Tensor:
    """Magnitudes of the orthonormal DCT-II of images (..., H, W), channel by channel; [0, 0] is the mean."""
    return torch.from_numpy(dctn(images.double().cpu().numpy(), axes=(-2, -1), norm="ortho")).abs()


def high_frequency_share(images: Tensor) -> Tensor:
    """Each image's share of DCT energy at frequencies (u, v) with u/H + v/W >= 1, (N,), in [0, 1].

    That is the half of the spectrum beyond its antidiagonal. The mean, (0, 0), is left out of the energy:
    brightness is no variation. An image without any variation has share 0.
    """
    energy = spectrum(images) ** 2
    energy[..., 0, 0] = 0
    height, width = images.shape[-2:]
    u, v = torch.arange(height)[:, None] / height, torch.arange(width) / width
    high = (energy * (u + v >= 1)).flatten(1).sum(1)
    return high / energy.flatten(1).sum(1).clamp(min=1e-12)
