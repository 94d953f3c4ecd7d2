"""A trigger: what it looks like, how it is applied to images, and how it is kept."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ibau.checks import one_of
from ibau.data.files import whole_file

MODES = ("add", "replace", "blend")


@dataclass(frozen=True, eq=False)
class Trigger:
    """A backdoor trigger in pixel space.

    mode  "add": clip(x + pattern), the mask says where; "replace": the pattern where the mask is 1; "blend":
          (1 - mask) x + mask pattern, with the opacity as mask
    """

    name: str  # the attack it comes from
    mode: str
    pattern: Tensor  # (3, H, W) float32; in [0, 1] to replace or blend, in [-1, 1] to add
    mask: Tensor  # (1, H, W) float32 in [0, 1]
    settings: dict = field(default_factory=dict)  # what made it: plain values that JSON can hold

    def __post_init__(self):
        one_of(self, "mode", MODES)
        if self.pattern.dim() != 3 or self.mask.shape != (1, *self.pattern.shape[1:]):
            raise ValueError(
                f"trigger {self.name}: pattern {tuple(self.pattern.shape)} and mask {tuple(self.mask.shape)} "
                "must be (3, H, W) and (1, H, W)"
            )
        low = -1.0 if self.mode == "add" else 0.0
        for label, values, bottom in (("pattern", self.pattern, low), ("mask", self.mask, 0.0)):
            if not (torch.isfinite(values).all() and values.min() >= bottom and values.max() <= 1):
                raise ValueError(f"trigger {self.name}: {label} has values outside [{bottom:g}, 1]")

    def __call__(self, images: Tensor) -> Tensor:
        """Stamp the trigger on images `(N, 3, H, W)`, uint8 or float in [0, 1].

        Shape, dtype and range stay; the input is left alone. uint8 images are rounded to whole grey levels,
        as a poisoned image in a file would be. Raises ValueError for images of another size.
        """
        if images.shape[-3:] != self.pattern.shape:
            raise ValueError(
                f"trigger {self.name} is {tuple(self.pattern.shape)}, "
                f"the images are {tuple(images.shape[-3:])}"
            )
        if images.dtype == torch.uint8:
            return self(images.float() / 255).mul(255).round().to(torch.uint8)
        pattern, mask = self.pattern.to(images), self.mask.to(images)
        if self.mode == "add":
            return (images + mask * pattern).clamp(0, 1)
        return torch.lerp(images, pattern.expand_as(images), mask.expand_as(images))

    def save(self, path: str | Path) -> None:
        """Write pattern and mask as plain arrays (safetensors), the rest into the file's metadata."""
        settings = json.dumps(self.settings, sort_keys=True)
        metadata = {"name": self.name, "mode": self.mode, "settings": settings}
        arrays = {"pattern": self.pattern.contiguous(), "mask": self.mask.contiguous()}
        with whole_file(path) as temporary:
            save_file(arrays, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> "Trigger":
        """The trigger that `save` wrote."""
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
            pattern, mask = file.get_tensor("pattern"), file.get_tensor("mask")
        return cls(about["name"], about["mode"], pattern, mask, json.loads(about["settings"]))
