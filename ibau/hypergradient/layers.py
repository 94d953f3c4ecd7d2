"""Layers whose second derivatives cost no more than they must.

A hypergradient differentiates gradients. torch's own convolution then also computes the derivative by the
weights where nobody asked for it, its BatchNorm goes through its general formula although evaluation mode
makes it one multiplication and one addition, and its ELU computes with every product what no product changes.
The layers here compute the same numbers without any of that. A product with the Hessian of a recorded
gradient then costs one convolution forward and one backward a layer, as much as a gradient by the input.
"""

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

# Which derivatives the backward pass under way asks for; a torch without it computes all that exist.
_executes = getattr(torch._C, "_will_engine_execute_node", lambda node: True)
_reduced = False  # see `reduced`


@contextmanager
def reduced():
    """Within, these layers' float32 convolutions multiply in bfloat16; what they return stays float32.

    For products with a recorded graph: the point of linearisation (the choices of the max-pools, the slopes
    of the activations) is then the exact one, and a product's relative error is that of a bfloat16
    multiplication, 2^-9 a factor.
    """
    global _reduced
    before, _reduced = _reduced, True
    try:
        yield
    finally:
        _reduced = before


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within, float32 is float32: no matrix product or convolution on a GPU rounds its factors to TF32.

    torch lets convolutions do so by default, with a relative error of 2^-11 a factor.
    """
    backends = torch.backends
    modern = []  # since torch 2.9 each has its own switch
    if hasattr(backends.cudnn, "conv"):
        modern = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    switches = [m.fp32_precision for m in modern]
    matmul, convolution = _readable(torch.get_float32_matmul_precision), _readable(_cudnn_tf32)
    try:
        if matmul is not None:
            torch.set_float32_matmul_precision("highest")
        if convolution is not None:
            backends.cudnn.allow_tf32 = False
        for m in modern:
            m.fp32_precision = "ieee"
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if convolution is not None:
            backends.cudnn.allow_tf32 = convolution
        for m, before in zip(modern, switches, strict=True):
            m.fp32_precision = before


def _cudnn_tf32() -> bool:
    return torch.backends.cudnn.allow_tf32


def _readable(flag):
    """The value of one of torch's older flags; None where it cannot be told for what the newer ones say."""
    try:
        return flag()
    except RuntimeError:
        return None


def cheapen(model: nn.Module, images: Tensor | None = None) -> nn.Module:
    """Make the model's convolutions, BatchNorms and ELUs such layers, in place, until `restore`.

    Parameters, buffers and their names stay. BatchNorm behaves as in evaluation mode, whatever the mode; one
    that follows a convolution in an `nn.Sequential` is folded into its weights.

    images  (N, 3, H, W) in [0, 1], of the model's type and device; two will do. They go through a copy of the
            model in evaluation mode, with its BatchNorms varied. Where folding changes what comes out, as it
            does if the forward pass takes the layers in another order, nothing is folded; where the layers
            still do, they are left as they are. Without images nothing is folded, and nothing compared
    """
    if images is None:
        return _replace(model, fold=False)
    trial = _varied(copy.deepcopy(model).eval())
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False), exact_float32():
        expected = trial(images.clone())
        for fold in (True, False):
            try:
                found = _replace(trial, fold)(images.clone())
            except Exception:  # whatever this forward pass does with its layers, it needs torch's own
                found = None
            if found is not None and _same(found, expected):
                return _replace(model, fold)
            restore(trial)
    return model


@torch.no_grad()
def _varied(model: nn.Module) -> nn.Module:
    """The model with other affine maps in its BatchNorms, none of which is near the identity."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d and module.affine:
            scale, shift = torch.rand(2, module.num_features, generator=generator).to(module.weight)
            module.weight.data = module.weight * (0.5 + scale)
            module.bias.data = module.bias + shift - 0.5
    return model


def _same(found: Tensor, expected: Tensor) -> bool:
    """Whether two outputs are equal up to rounding, element by element and by their typical size."""
    size = expected.abs().median().item()
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * size)


def _replace(model: nn.Module, fold: bool) -> nn.Module:
    """Give the layers their cheap classes, and fold BatchNorms into convolutions if told to."""
    for module in model.modules():
        if type(module) is nn.Conv2d and module.padding_mode == "zeros" and module.padding != "same":
            module.__class__ = Conv2d
        elif type(module) is nn.BatchNorm2d and module.affine and module.track_running_stats:
            module.__class__ = FixedBatchNorm2d
        elif type(module) is nn.ELU and module.alpha == 1:
            module.__class__ = ELU
        elif type(module) is nn.Hardsigmoid:
            module.__class__ = Hardsigmoid
    for module in model.modules():
        if fold and type(module) is nn.Sequential:
            for first, second in itertools.pairwise(module):
                if type(first) is Conv2d and type(second) is FixedBatchNorm2d:
                    first.__dict__["norm"] = second  # not a submodule: no parameter is to be named twice
                    second.__class__ = FoldedBatchNorm2d
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `cheapen`."""
    for module in model.modules():
        module.__dict__.pop("norm", None)
        if type(module) in (Conv2d, FixedBatchNorm2d, FoldedBatchNorm2d, ELU, Hardsigmoid):
            module.__class__ = next(c for c in type(module).__mro__ if c.__module__.startswith("torch."))
    return model


class FixedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with the running statistics: a x + b a channel, a = weight / sqrt(var + eps)."""

    def affine_map(self) -> tuple[Tensor, Tensor]:
        a = self.weight * (self.running_var + self.eps).rsqrt()
        return a, self.bias - self.running_mean * a

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.affine_map()
        return torch.addcmul(b[:, None, None].to(x.dtype), x, a[:, None, None].to(x.dtype))


class FoldedBatchNorm2d(FixedBatchNorm2d):
    """A BatchNorm that the convolution before it has done already."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Conv2d(nn.Conv2d):
    """A convolution, with the BatchNorm that follows it where there is one."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        norm = self.__dict__.get("norm")
        if norm is not None:
            a, b = norm.affine_map()
            weight = weight * a[:, None, None, None]
            bias = b if bias is None else b + bias * a
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        padding = (0, 0) if self.padding == "valid" else self.padding
        return _Conv.apply(x, weight, bias, (self.stride, padding, self.dilation, self.groups))


class ELU(nn.ELU):
    """ELU with alpha = 1."""

    def forward(self, x: Tensor) -> Tensor:
        return _ELU.apply(x)


class _ELU(Function):
    """y = x where x > 0, exp(x) - 1 elsewhere"""

    @staticmethod
    def forward(ctx, x):
        y = F.elu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        return _Slope.apply(g, *ctx.saved_tensors)


class _Slope(Function):
    """g dy/dx = g where y > 0, g (y + 1) elsewhere: linear in g, and in y on either side of 0"""

    @staticmethod
    def forward(ctx, g, y):
        ctx.save_for_backward(g, y)
        ctx.bend = None
        return torch.ops.aten.elu_backward(g, 1, 1, 1, True, y)

    @staticmethod
    def backward(ctx, gg):
        g, y = ctx.saved_tensors
        bend = torch.where(y < 0, g, 0) if ctx.bend is None else ctx.bend
        ctx.bend = None if torch.is_grad_enabled() else bend  # the same for every product
        return _Slope.apply(gg, y), gg * bend


def _wanted(ctx, i: int) -> bool:
    """Whether the backward pass under way asks for the derivative by the i-th tensor a function was given."""
    node = ctx.next_functions[i][0] if i < len(ctx.next_functions) else None
    try:
        return node is not None and _executes(node)
    except RuntimeError:  # the engine does not tell about a leaf it was asked for
        return True


class _Conv(Function):
    """y = conv(x, w) + b"""

    @staticmethod
    def forward(ctx, x, w, b, how):
        ctx.save_for_backward(x, w)
        ctx.how = how
        low = _low(x.dtype)
        return F.conv2d(x.to(low), w.to(low), None if b is None else b.to(low), *how).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return (
            _ConvInput.apply(g, w, x.shape, ctx.how) if _wanted(ctx, 0) else None,
            _ConvWeight.apply(g, x, w.shape, ctx.how) if _wanted(ctx, 1) else None,
            g.sum((0, 2, 3)) if _wanted(ctx, 2) else None,
            None,
        )


class _ConvInput(Function):
    """The derivative by x: linear in g, and in w"""

    @staticmethod
    def forward(ctx, g, w, shape, how):
        ctx.save_for_backward(g, w)
        ctx.how = how
        return _backward(g, shape, w, how).to(g.dtype)

    @staticmethod
    def backward(ctx, gg):
        g, w = ctx.saved_tensors
        return (
            _Conv.apply(gg, w, None, ctx.how) if _wanted(ctx, 0) else None,
            _ConvWeight.apply(g, gg, w.shape, ctx.how) if _wanted(ctx, 1) else None,
            None,
            None,
        )


class _ConvWeight(Function):
    """The derivative by w: linear in g, and in x"""

    @staticmethod
    def forward(ctx, g, x, shape, how):
        ctx.save_for_backward(g, x)
        ctx.how = how
        return _backward(g, x, shape, how).to(g.dtype)

    @staticmethod
    def backward(ctx, gg):
        g, x = ctx.saved_tensors
        return (
            _Conv.apply(x, gg, None, ctx.how) if _wanted(ctx, 0) else None,
            _ConvInput.apply(g, gg, x.shape, ctx.how) if _wanted(ctx, 1) else None,
            None,
            None,
        )


def _backward(g: Tensor, x: Tensor | torch.Size, w: Tensor | torch.Size, how: tuple) -> Tensor:
    """torch's derivative of a convolution by its input or its weight: the one that is given as a shape."""
    stride, padding, dilation, groups = how
    wanted, low = [isinstance(t, torch.Size) for t in (x, w)], _low(g.dtype)
    g = g.to(low)
    x, w = (g.new_empty(1).expand(t) if isinstance(t, torch.Size) else t.to(low) for t in (x, w))
    found = torch.ops.aten.convolution_backward(
        g, x, w, None, stride, padding, dilation, False, (0, 0), groups, [*wanted, False]
    )
    return found[wanted.index(True)]


def _low(dtype: torch.dtype) -> torch.dtype:
    """What to multiply numbers of this type in."""
    return torch.bfloat16 if _reduced and dtype == torch.float32 else dtype


class Hardsigmoid(nn.Hardsigmoid):
    """min(max(x + 3, 0), 6) / 6, of operations that have second derivatives; torch's own has none."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x + 3) / 6
