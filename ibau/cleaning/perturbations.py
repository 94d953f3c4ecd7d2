"""What I-BAU+ maximises over: a perturbation that is added, or a patch that replaces pixels.

The paper's perturbation is added: x + delta, |delta|_2 <= C. Most triggers replace pixels instead: a patch
delta = (m, p), a mask and a picture, turns x into (1 - m) x + m p, the form that Neural Cleanse gives to
triggers; m and p lie in [0, 1], and sum(m) <= A pixels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ibau.networks.training import autocast
from ibau.unlearning import ibau as paper
from ibau.unlearning.common import Perturbation
from ibau.unlearning.ibau import cross_entropy

FAINT = 1e-3  # the least mask at which the ascent looks for colours


def perturbed(images: Tensor, delta: Tensor, carries: Tensor | None = None) -> Tensor:
    """`images` (N, C, H, W) under delta: x + delta, or (1 - m) x + m p for a delta of one channel more.

    carries (N, 1, 1, 1), of 0 and 1, says which images carry it; None: all.
    """
    if delta.shape[1] == images.shape[1]:
        return images + (delta if carries is None else carries * delta)
    mask, picture = delta[:, :1], delta[:, 1:]
    return images + (mask if carries is None else carries * mask) * (picture - images)


def maximise_patch(objective, delta: Tensor, *, area: float, steps: int) -> Tensor:
    """Maximise `objective(delta)` over delta = (m, p) with m, p in [0, 1] and sum(m) <= area, in pixels.

    The mask steps along its gradient, by a third of the largest norm a binary mask of that area has; the
    picture by 0.5 along the signs of its own, whose size says more about the mask than about the colour.
    Both steps fall to zero. A mask that is zero would hide what colour its pixel should have: it is taken a
    little above.
    """
    delta = project_patch(delta.detach(), area)
    for step in range(steps):
        delta = torch.cat([delta[:, :1].clamp_min(FAINT), delta[:, 1:]], dim=1).requires_grad_()
        (gradient,) = torch.autograd.grad(objective(delta), delta)
        mask, picture = gradient[:, :1], gradient[:, 1:]
        mask = math.sqrt(area) / 3 * mask / mask.norm().clamp_min(1e-12)
        move = torch.cat([mask, 0.5 * picture.sign()], dim=1)
        delta = project_patch(delta.detach() + (1 - step / steps) * move, area)
    return delta.detach()


def project_patch(delta: Tensor, area: float) -> Tensor:
    """The closest (m, p) to delta with m, p in [0, 1] and sum(m) <= area; differentiable almost everywhere.

    The mask m loses one number tau >= 0 throughout before it is cut to [0, 1]. What is left of its sum falls
    with tau, linearly between the breakpoints m_i and m_i - 1: sorting them gives tau in closed form, without
    waiting for the device. On the pixels that end strictly between 0 and 1, tau is what their sum says.
    """
    mask, picture = delta[:, :1], delta[:, 1:].clamp(0, 1)
    values = mask.detach().flatten()
    values = values if values.device.type == "mps" else values.double()  # MPS has no float64
    # Sum over pixels of clamp(m - tau, 0, 1) at each breakpoint: -slope pixels lie strictly between there.
    breaks, order = torch.cat([values, values - 1]).sort(descending=True)
    ones = torch.ones_like(values)
    slope = torch.cat([ones, -ones])[order].cumsum(0)
    left = torch.cat([breaks.new_zeros(1), (slope[:-1] * (breaks[:-1] - breaks[1:])).cumsum(0)])
    i = torch.searchsorted(left, torch.full_like(left[:1], area)).clamp(1, len(left) - 1)
    tau = breaks[i - 1] - (area - left[i - 1]) / slope[i - 1].clamp_min(1)
    tau = torch.where(values.clamp(0, 1).sum() <= area, torch.zeros_like(tau), tau).clamp_min(0)
    between = (values > tau) & (values < 1 + tau)
    full, count = (values >= 1 + tau).sum(), between.sum()
    on = between.view_as(mask).to(mask.dtype)
    exact = ((mask * on).sum() + full - area) / count.clamp_min(1)
    tau = torch.where((tau > 0) & (count > 0), exact, tau.to(mask.dtype)).squeeze()
    return torch.cat([(mask - tau).clamp(0, 1), picture], dim=1)


class InnerProblem(paper.InnerProblem):
    """The paper's inner problem, or the same over patches of at most `area` pixels.

    With a class to `aim` at, the images of other classes alone count, and the objective is minus the
    cross-entropy of that class.
    """

    def __init__(self, model, images, labels, settings, area: float | None = None, aim: int | None = None):
        self.area, self.aim = area, aim
        if aim is not None:
            others = labels != aim
            others |= ~others.any()  # all of them, where there are none
            images, labels = images[others], torch.full_like(labels[others], aim)
        super().__init__(model, images, labels, settings)

    def objective(self, delta: Tensor, params: Sequence[Tensor]) -> Tensor:
        """H(delta, theta) on the sample."""
        theta = dict(zip(self.names, params, strict=True))
        value = cross_entropy(self.model, theta, perturbed(self.images, delta), self.labels)
        return value if self.aim is None else -value

    def project(self, delta: Tensor) -> Tensor:
        """The closest perturbation that is allowed."""
        return super().project(delta) if self.area is None else project_patch(delta, self.area)

    def solve(self, generator: torch.Generator) -> Perturbation:
        """Ascend from a small random delta, or from a faint random mask over noise."""
        if self.area is None:
            return super().solve(generator)
        settings, theta = self.settings, self.weights()
        _, channels, height, width = self.images.shape

        def objective(delta: Tensor) -> Tensor:
            with autocast(self.images.device, settings.precision):
                return self.objective(delta, theta)

        start = torch.rand(1, 1 + channels, height, width, generator=generator)
        start[:, :1] *= 2 * self.area / (height * width)  # on average the mask is as large as it may be
        start = start.to(self.images.device)
        return self.solved(maximise_patch(objective, start, area=self.area, steps=settings.inner_steps))
