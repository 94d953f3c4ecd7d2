"""Layers whose second derivatives cost no more than they must.

A hypergradient differentiates gradients. torch's own convolution then also computes the derivative by the
weights where nobody asked for it, and its BatchNorm goes through its general formula although evaluation
mode makes it one multiplication and one addition. The layers here compute the same numbers without either.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function


def cheapen(model: nn.Module) -> nn.Module:
    """Make the model's convolutions and BatchNorms such layers, in place, until `restore`.

    Parameters, buffers and their names stay. BatchNorm behaves as in evaluation mode, whatever the mode.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and module.padding_mode == "zeros" and module.padding != "same":
            module.__class__ = Conv2d
        elif type(module) is nn.BatchNorm2d and module.affine and module.track_running_stats:
            module.__class__ = FixedBatchNorm2d
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `cheapen`."""
    for module in model.modules():
        module.__class__ = {Conv2d: nn.Conv2d, FixedBatchNorm2d: nn.BatchNorm2d}.get(
            type(module), type(module)
        )
    return model


class FixedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with the running statistics: a x + b a channel, a = weight / sqrt(var + eps)."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.weight * (self.running_var + self.eps).rsqrt()
        b = self.bias - self.running_mean * a
        return torch.addcmul(b[:, None, None].to(x.dtype), x, a[:, None, None].to(x.dtype))


class Conv2d(nn.Conv2d):
    """A convolution; under autocast torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        padding = (0, 0) if self.padding == "valid" else self.padding
        return _Conv.apply(x, self.weight, self.bias, (self.stride, padding, self.dilation, self.groups))


class _Conv(Function):
    """y = conv(x, w) + b"""

    @staticmethod
    def forward(ctx, x, w, b, how):
        ctx.save_for_backward(x, w)
        ctx.how = how
        return F.conv2d(x, w, b, *how)

    @staticmethod
    def backward(ctx, g):
        (x, w), needs = ctx.saved_tensors, ctx.needs_input_grad
        return (
            _ConvInput.apply(g, w, x.shape, ctx.how) if needs[0] else None,
            _ConvWeight.apply(g, x, w.shape, ctx.how) if needs[1] else None,
            g.sum((0, 2, 3)) if needs[2] else None,
            None,
        )


class _ConvInput(Function):
    """The derivative by x: linear in g, and in w"""

    @staticmethod
    def forward(ctx, g, w, shape, how):
        ctx.save_for_backward(g, w)
        ctx.how = how
        return _backward(g, g.new_empty(1).expand(shape), w, how, 0)

    @staticmethod
    def backward(ctx, gg):
        (g, w), needs = ctx.saved_tensors, ctx.needs_input_grad
        return (
            _Conv.apply(gg, w, None, ctx.how) if needs[0] else None,
            _ConvWeight.apply(g, gg, w.shape, ctx.how) if needs[1] else None,
            None,
            None,
        )


class _ConvWeight(Function):
    """The derivative by w: linear in g, and in x"""

    @staticmethod
    def forward(ctx, g, x, shape, how):
        ctx.save_for_backward(g, x)
        ctx.how = how
        return _backward(g, x, g.new_empty(1).expand(shape), how, 1)

    @staticmethod
    def backward(ctx, gg):
        (g, x), needs = ctx.saved_tensors, ctx.needs_input_grad
        return (
            _Conv.apply(x, gg, None, ctx.how) if needs[0] else None,
            _ConvInput.apply(g, gg, x.shape, ctx.how) if needs[1] else None,
            None,
            None,
        )


def _backward(g: Tensor, x: Tensor, w: Tensor, how: tuple, which: int) -> Tensor:
    """torch's derivative of a convolution by its input (which = 0) or its weight (1)."""
    stride, padding, dilation, groups = how
    wanted = [which == 0, which == 1, False]
    return torch.ops.aten.convolution_backward(
        g, x, w, None, stride, padding, dilation, False, (0, 0), groups, wanted
    )[which]
