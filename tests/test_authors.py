"""The authors' recipe against the same written out plainly."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tiny import IMAGES, LABELS, network, same
from torch.func import functional_call

from ibau.unlearning import authors as recipe
from ibau.unlearning.authors import AuthorsSettings, authors


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """So that a pass over 20 images is three batches, the last a smaller one."""
    monkeypatch.setattr(recipe, "BATCH", 8)


def _loss(model, theta, x, y):
    return F.cross_entropy(functional_call(model, theta, (x,)), y)


def _inner(model, theta, delta, x):
    """H against what the model itself says of the clean images, less the penalty."""
    return _loss(model, theta, x + delta, model(x).argmax(1)) - 1e-3 * delta.square().sum()


def _ascent(model, images, batches):
    """From 0, a step of 10 along the gradient of each batch."""
    delta = torch.zeros(1, *images.shape[1:])
    for batch in batches:
        delta.requires_grad_()
        theta = dict(model.named_parameters())
        (g,) = torch.autograd.grad(_inner(model, theta, delta, images[batch]), delta)
        delta = delta.detach() + 10 * g
    return delta


def _hypergradient(model, images, labels, fixed, batch, carries, delta):
    """Direct term and five terms of the series, Phi being a step of 0.1 on a fixed batch."""
    d = delta.clone().requires_grad_()
    theta = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    outer = _loss(model, theta, images[batch] + carries * d, labels[batch])
    b, *direct = torch.autograd.grad(outer, [d, *theta.values()])
    (g,) = torch.autograd.grad(_inner(model, theta, d, images[fixed]), d, create_graph=True)
    phi, v, term = d + 0.1 * g, torch.zeros_like(b), b
    for _ in range(5):
        v = v + term
        (term,) = torch.autograd.grad(phi, d, term, retain_graph=True)
    implicit = torch.autograd.grad(phi, list(theta.values()), v)
    return [a + b for a, b in zip(direct, implicit, strict=True)]


def _plainly(model, images, labels, seed, rounds):
    model, images, random = copy.deepcopy(model), images / 255, torch.Generator().manual_seed(seed)
    adam, order, deltas = torch.optim.Adam(model.parameters(), lr=1e-3), [], []
    for _ in range(rounds):
        fixed = torch.randperm(20, generator=random)[:8]
        deltas.append(_ascent(model, images, torch.randperm(20, generator=random).split(8)))
        for _ in range(3):
            order = order or list(torch.randperm(20, generator=random).split(8))
            batch = order.pop(0)
            carries = torch.zeros(len(batch), 1, 1, 1)
            carries[torch.randperm(len(batch), generator=random)[:1]] = 1  # 1% is less than one image
            found = _hypergradient(model, images, labels, fixed, batch, carries, deltas[-1])
            for p, g in zip(model.parameters(), found, strict=True):
                p.grad = g
            adam.step()
    return model, deltas


def test_it_is_the_authors_recipe():
    given = network()
    found = authors(given, IMAGES, LABELS, AuthorsSettings(rounds=2), seed=3)
    expected, deltas = _plainly(network(), IMAGES, LABELS, seed=3, rounds=2)
    for p, q in zip(found.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)
    for delta, wanted in zip(found.deltas, deltas, strict=True):
        torch.testing.assert_close(delta[None], wanted, atol=1e-4, rtol=1e-4)
    assert same(given, network())


def test_its_numbers_are_the_authors():
    assert (recipe.INNER_LR, recipe.PENALTY, recipe.PHI_STEP) == (10.0, 1e-3, 0.1)
    assert (recipe.SHARE, recipe.LR, recipe.K) == (0.01, 1e-3, 5)


def test_the_history_has_a_line_a_round_and_nothing_is_held_out():
    rounds = []
    found = authors(
        network(), IMAGES, LABELS, AuthorsSettings(rounds=2), on_round=lambda m, h: rounds.append(len(h))
    )
    assert rounds == [1, 2] and [line["round"] for line in found.history] == [1, 2]
    assert all("held_out_acc" not in line for line in found.history)
    assert all(line["implicit_over_direct"] > 0 for line in found.history)
    assert all(math.isfinite(value) for line in found.history for value in line.values())


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds is 0; it must be positive"):
        AuthorsSettings(rounds=0)
