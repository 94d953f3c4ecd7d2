"""The cheap layers compute what torch's compute, to the third derivative, and leave no trace."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from ibau import models
from ibau.layers import Conv2d, FixedBatchNorm2d, cheapen, restore


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"padding": 1},
        {"padding": "valid", "bias": False},
        {"stride": 2, "padding": (0, 1)},
        {"dilation": 2, "padding": 2, "groups": 2},
    ],
)
def test_derivatives_are_right_twice(how):
    torch.manual_seed(0)
    layer = cheapen(nn.Conv2d(2, 4, 3, **how).double())
    assert type(layer) is Conv2d
    x = torch.randn(2, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    parameters = tuple(layer.parameters())

    def run(x, *parameters):
        named = dict(zip([name for name, _ in layer.named_parameters()], parameters, strict=True))
        return torch.func.functional_call(layer, named, (x,))

    assert gradcheck(run, (x, *parameters))
    assert gradgradcheck(run, (x, *parameters))


@pytest.mark.parametrize("architecture", list(models.MODELS))
@pytest.mark.parametrize("wanted", ["delta", "weights"])
def test_a_network_has_the_same_second_derivatives(architecture, wanted):
    torch.manual_seed(0)
    model = models.build(architecture, 5, width=0.125).double()
    model(torch.rand(8, 3, 16 if architecture != "small_vgg" else 32, 32, dtype=torch.float64))
    model.eval()
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    found = []
    for network in (model, cheapen(copy.deepcopy(model))):
        delta = torch.zeros(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)
        objective = network(x + delta).logsumexp(1).sum()
        (gradient,) = torch.autograd.grad(objective, delta, create_graph=True)
        v = torch.cos(torch.arange(gradient.numel())).view_as(gradient)
        inputs = [delta] if wanted == "delta" else list(network.parameters())
        found.append(torch.autograd.grad(gradient, inputs, v, materialize_grads=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_restore_leaves_no_trace():
    model = models.build("small_vgg", 4, width=0.125).eval()
    before, state = copy.deepcopy(model), list(model.state_dict())
    cheapen(model)
    assert {type(m) for m in model.modules()} >= {Conv2d, FixedBatchNorm2d}
    assert list(model.state_dict()) == state
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model(x), before(x), rtol=1e-4, atol=1e-5)
    restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert torch.equal(model(x), before(x))


def test_what_it_cannot_do_is_left_alone():
    odd = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 3, 3, padding="same"),
        nn.BatchNorm2d(3, affine=False),
        nn.BatchNorm2d(3, track_running_stats=False),
    )
    before = [type(m) for m in odd.modules()]
    assert [type(m) for m in cheapen(odd).modules()] == before


def test_autocast_is_torchs_own():
    layer = nn.Conv2d(3, 4, 3)
    x = torch.rand(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        assert torch.equal(cheapen(layer)(x), expected)
    assert expected.dtype == torch.bfloat16
