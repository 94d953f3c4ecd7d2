"""Tiny classifiers, images and labels for the tests of unlearning and cleaning."""

import torch
from torch import nn

IMAGES = torch.randint(0, 256, (20, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
LABELS = torch.arange(20) % 4
ONES = torch.ones(20, dtype=torch.int64)  # labels about which `Sure` is right


def network(channels=3, classes=4, seed=0):
    """A classifier with BatchNorm and dropout, for images of any size; its statistics are not the initial."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ELU(inplace=True),
            nn.Dropout(0.2),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24, classes),
        )
        model(torch.rand(16, channels, 8, 8))
    return model.eval()


class Sure(nn.Module):
    """Says class 1 of 2 as long as its weight is positive."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images):
        return self.scale * torch.tensor([-1.0, 1.0]) + 0 * images.mean((1, 2, 3))[:, None]


def same(a, b):
    """Have these models equal weights and buffers?"""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
