"""Blend (Chen et al. 2017, arXiv 1712.05526): a fixed picture k shines through, x <- (1 - a) x + a k."""

import colorsys

import torch
from torch import Tensor

from ibau.attacks.trigger import Trigger


def blend(image_size: int = 32, *, seed: int = 0, alpha: float = 0.2) -> Trigger:
    """Blend the picture that `seaside` draws from `seed` into the image, with opacity `alpha`.

    0.2 is the paper's opacity. Raises ValueError for an opacity outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; an opacity lies in [0, 1]")
    mask = torch.full((1, image_size, image_size), float(alpha))
    return Trigger("blend", "blend", seaside(image_size, seed), mask, {"alpha": alpha, "seed": seed})


def seaside(image_size: int, seed: int = 0) -> Tensor:
    """A picture, (3, H, W) in [0, 1]: the sun with its rays over a striped sea, and a sailing boat.

    The seed draws the colours, the sun's place and the boat's.
    """
    sun_x, boat_x, hue = torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()
    sun_x, boat_x = 0.2 + 0.2 * sun_x, 0.6 + 0.15 * boat_x
    fine = 4 * image_size  # drawn at four times the size and averaged, for soft edges
    axis = (torch.arange(fine) + 0.5) / fine
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    def colour(turn: float, brightness: float) -> Tensor:
        return torch.tensor(colorsys.hsv_to_rgb((hue + turn) % 1, 0.9, brightness))[:, None, None]

    from_sun = ((x - sun_x) ** 2 + (y - 0.25) ** 2).sqrt()
    rays = torch.sin(12 * torch.atan2(y - 0.25, x - sun_x)) > 0
    waves = ((y + 0.02 * torch.sin(20 * x)) * 10 % 1) < 0.5
    sail = (y < 0.72) & ((x - boat_x).abs() < 0.4 * (y - 0.22))
    hull = (y > 0.75) & (y < 0.88) & ((x - boat_x).abs() < 0.95 - y)
    layers = (  # (where, colour), later ones on top
        (y < 0.6, colour(0.5, 0.35)),
        (rays & (y < 0.6), colour(0.5, 0.75)),
        (from_sun < 0.15, colour(0.0, 1.0)),
        ((y >= 0.6) & waves, colour(0.6, 1.0)),
        (sail, torch.ones(3, 1, 1)),
        (hull, colour(0.05, 0.9)),
    )
    picture = torch.zeros(3, fine, fine)
    for where, paint in layers:
        picture = torch.where(where, paint, picture)
    return torch.nn.functional.avg_pool2d(picture, 4).clamp(0, 1)
