"""The paper's I-BAU does what its equations say; it and I-BAU+ keep the promises they share."""

import copy
import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from tiny import IMAGES, LABELS, ONES, Sure, network, same
from torch import nn
from torch.func import functional_call

import ibau
from ibau.attacks import badnets, poison
from ibau.data.images import ImageSet
from ibau.data.splits import load
from ibau.hypergradient.implicit import Hypergradient
from ibau.hypergradient.solvers import Solution
from ibau.measure.rates import accuracy, attack_rates
from ibau.networks import models
from ibau.networks.training import TrainSettings, train
from ibau.unlearning.common import Guard, UnlearningError, UnlearningWarning
from ibau.unlearning.ibau import SOLVERS, InnerProblem, maximise

SMALL = ibau.IBAUSettings(rounds=2, outer_steps=3, batch_size=8, inner_steps=5, inner_images=6, K=2)
SMALL_CLEAN = ibau.CleanSettings(
    rounds=2, outer_steps=3, recovery_steps=2, batch_size=8, inner_steps=5, inner_images=6, K=2
)
BOTH = pytest.mark.parametrize(
    ("algorithm", "small"), [(ibau.unlearn, SMALL), (ibau.clean, SMALL_CLEAN)], ids=["unlearn", "clean"]
)
HISTORY = {
    "round",
    "inner_loss",
    "delta_norm",
    "stationarity",
    "outer_loss",
    "implicit_over_direct",
    "residual",
    "contraction",
    "kept",
    "inner_seconds",
    "seconds",
    "held_out_acc",
    "rate",
}


# ---- the two algorithms have two names


def test_the_package_offers_both_at_the_top():
    assert ibau.unlearn.__module__ == ibau.IBAUSettings.__module__ == "ibau.unlearning.ibau"
    assert ibau.clean.__module__ == ibau.CleanSettings.__module__ == "ibau.cleaning.recipe"
    with pytest.raises(AttributeError, match="no attribute 'cleanse'"):
        _ = ibau.cleanse


def test_the_default_is_the_papers_with_its_implicit_term():
    settings = ibau.IBAUSettings()
    assert (settings.K, settings.batch_size, settings.radius, settings.solver) == (
        5,
        100,
        10.0,
        "fixed_point",
    )
    # the network is untrained: no accuracy to watch
    history = ibau.unlearn(network(), IMAGES, LABELS, replace(settings, held_out=0.0)).history
    assert len(history) == settings.rounds == 20
    assert all(line["implicit_over_direct"] > 0 for line in history)


def test_nothing_of_ours_is_among_the_papers_settings():
    ours = {"recovery_steps", "patch_share", "search", "least_area", "most_area", "few", "lost", "earlier"}
    assert ours <= set(asdict(ibau.CleanSettings())) and not ours & set(asdict(ibau.IBAUSettings()))


# ---- the algorithm, against the same written out plainly


def _phi(model, theta, delta, x, y, s):
    """Eq. (2), with the graph kept; the step is taken from the largest curvature, found by eight products."""
    (gradient,) = torch.autograd.grad(_loss(model, theta, x + delta, y), delta, create_graph=True)
    v = gradient.detach()
    for _ in range(8):
        (v,) = torch.autograd.grad(gradient, delta, v / v.norm(), retain_graph=True)
    moved = delta + s.phi_step / v.norm() * gradient
    return moved * (s.radius / moved.norm()).clamp_max(1)


def _loss(model, theta, x, y):
    return F.cross_entropy(functional_call(model, theta, (x,)), y)


def _plainly(model, images, labels, s, seed):
    """Algorithm 1 with torch.autograd alone; the series is summed term by term."""
    model, x_all, random = copy.deepcopy(model), images, torch.Generator().manual_seed(seed)
    adam, order, taken = torch.optim.Adam(model.parameters(), lr=s.lr), [], 0
    for _ in range(s.rounds):
        sample = torch.randperm(len(x_all), generator=random)[: s.inner_images]
        x_in, y_in = x_all[sample], labels[sample]
        delta = torch.randn(1, *x_all.shape[1:], generator=random)
        delta *= 0.01 * s.radius / delta.norm()
        for t in range(s.inner_steps):
            delta.requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(model(x_in + delta), y_in), delta)
            delta = (delta + s.radius / 5 * (1 - t / s.inner_steps) * g / g.norm()).detach()
            delta *= min(1.0, s.radius / delta.norm().item())
        for _ in range(s.outer_steps):
            order = order or list(torch.randperm(len(x_all), generator=random).split(s.batch_size))
            batch = order.pop(0)
            carries = torch.zeros(len(batch), 1, 1, 1)
            count = max(1, round(s.share * len(batch)))
            carries[torch.randperm(len(batch), generator=random)[:count]] = 1
            d = delta.clone().requires_grad_()
            theta = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
            outer = _loss(model, theta, x_all[batch] + carries * d, labels[batch])
            term, *direct = torch.autograd.grad(outer, [d, *theta.values()])
            phi, v = _phi(model, theta, d, x_in, y_in, s), torch.zeros_like(term)
            for _ in range(s.K):
                v = v + term
                (term,) = torch.autograd.grad(phi, d, term, retain_graph=True)
            implicit = torch.autograd.grad(phi, list(theta.values()), v)
            for p, a, b in zip(model.parameters(), direct, implicit, strict=True):
                p.grad = a + b
            adam.param_groups[0]["lr"] = (
                s.lr / 2 * (1 + math.cos(math.pi * taken / (s.rounds * s.outer_steps)))
            )
            adam.step()
            taken += 1
    return model


@pytest.mark.parametrize("radius", [0.5, 1.0])  # where the series converges: else the best sum counts
def test_it_is_algorithm_1(radius):
    settings = replace(SMALL, radius=radius, inner_steps=20, K=4, tol=0.0, lr=5e-3, share=0.3)
    settings = replace(settings, held_out=0.0, precision="float32")
    given, images = network().double(), IMAGES.double() / 255  # Adam enlarges what float32 rounds
    found = ibau.unlearn(given, images, LABELS, settings, seed=3)
    assert all(line["implicit_over_direct"] > 0.01 for line in found.history)  # else the test says little
    expected = _plainly(given, images, LABELS, settings, seed=3)
    for p, q in zip(found.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


def test_without_k_the_implicit_term_is_left_out():
    solved = replace(SMALL, inner_steps=50, radius=2.0)
    without = ibau.unlearn(network(), IMAGES, LABELS, replace(solved, K=0))
    assert [line["implicit_over_direct"] for line in without.history] == [0, 0]
    with_it = ibau.unlearn(network(), IMAGES, LABELS, solved)
    assert all(line["implicit_over_direct"] > 0 and line["residual"] < 1 for line in with_it.history)
    assert not same(without.model, with_it.model)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_can_be_asked_for(solver):
    settings = replace(SMALL, solver=solver, inner_steps=40, radius=1.0)
    assert ibau.unlearn(network(), IMAGES, LABELS, settings).history[0]["implicit_over_direct"] > 0


# ---- the inner problem


def test_maximise_finds_the_maximum_of_a_linear_objective_on_the_ball():
    torch.manual_seed(0)
    g, radius = torch.randn(1, 3, 6, 6), 3.0
    start = 0.01 * torch.randn_like(g)
    found = maximise(lambda delta: (g * delta).sum(), start, radius=radius, steps=50)
    assert found.norm().item() == pytest.approx(radius, rel=1e-5)
    torch.testing.assert_close(found, radius * g / g.norm(), rtol=0, atol=1e-2)
    assert not found.requires_grad
    assert not start.requires_grad


def test_maximise_comes_to_rest_at_a_maximum_inside_the_ball():
    torch.manual_seed(0)
    peak = torch.randn(1, 3, 4, 4)
    peak *= 2 / peak.norm()
    found = maximise(lambda d: -((d - peak) ** 2).sum() / 2, 0.01 * peak.flip(3), radius=10.0, steps=200)
    assert (found - peak).norm() < 0.05


def test_a_flat_objective_moves_nothing():
    start = torch.ones(1, 1, 2, 2)
    assert torch.equal(maximise(lambda d: (0 * d).sum(), start, radius=5.0, steps=5), start)


@pytest.mark.parametrize(("steps", "on_sphere"), [(15, True), (2, False)])
def test_a_solution_says_how_near_to_stationary_it_is(steps, on_sphere):
    settings = replace(SMALL, radius=0.5, inner_steps=steps)
    inner = InnerProblem(network(), IMAGES, LABELS, settings)
    found = inner.solve(torch.Generator().manual_seed(0))
    loss = inner.objective(found.delta.requires_grad_(), inner.weights())
    (g,) = torch.autograd.grad(loss, found.delta)
    assert (found.delta.norm().item() > 0.5 - 1e-4) == on_sphere
    cosine = F.cosine_similarity(g.flatten(), found.delta.flatten(), dim=0).item()
    expected = math.sqrt(1 - cosine**2) if on_sphere else 1.0  # inside, nothing holds delta back
    assert found.stationarity == pytest.approx(expected, rel=0.02)
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("steps", [1, 20])
def test_phi_takes_its_step_from_the_curvature(steps):
    """Its Jacobian shrinks every direction that curves downwards, at any maximiser of any network."""
    settings = replace(SMALL, radius=1.0, inner_steps=steps)
    inner = InnerProblem(network().double(), IMAGES.double() / 255, LABELS, settings)
    delta = inner.solve(torch.Generator().manual_seed(0)).delta.double()

    def gradient(d):
        d = d if d.requires_grad else d.requires_grad_()
        return torch.autograd.grad(inner.objective(d, inner.weights()), d, create_graph=True)[0]

    hessian = torch.autograd.functional.jacobian(gradient, delta).reshape(delta.numel(), -1)
    largest = torch.linalg.eigvalsh(hessian).abs().max().item()
    assert settings.phi_step / inner.eta.item() == pytest.approx(largest, rel=0.1)
    assert settings.phi_step / inner.eta.item() <= largest * (1 + 1e-6)


def test_the_inner_objective_is_the_cross_entropy_of_the_perturbed_images_uncut():
    inner, delta = InnerProblem(network(), IMAGES, LABELS, SMALL), torch.full((1, 3, 8, 8), 0.7)
    moved = network()
    for p in moved.parameters():
        p.data += 0.1
    expected = F.cross_entropy(moved(IMAGES / 255 + delta), LABELS)
    torch.testing.assert_close(inner.objective(delta, list(moved.parameters())), expected)


@pytest.mark.parametrize("radius", [0.01, 1.0, 10.0])
def test_delta_stays_in_its_ball(radius):
    result = ibau.unlearn(network(), IMAGES, LABELS, replace(SMALL, radius=radius, inner_steps=30))
    for delta, line in zip(result.deltas, result.history, strict=True):
        assert delta.norm() <= radius * (1 + 1e-5)
        assert line["delta_norm"] == pytest.approx(delta.norm().item(), rel=1e-5)
        assert 0 <= line["stationarity"] <= 1 + 1e-3


def test_more_inner_steps_come_closer_to_a_stationary_point():
    few, many = (
        ibau.unlearn(network(), IMAGES, LABELS, replace(SMALL, rounds=1, inner_steps=n, radius=2.0)).history[
            0
        ]
        for n in (2, 100)
    )
    assert many["stationarity"] < few["stationarity"] / 10
    assert many["inner_loss"] >= few["inner_loss"]


# ---- what both leave alone and what they give back


@BOTH
@pytest.mark.parametrize("training", [True, False])
def test_the_given_model_is_left_as_it_was(algorithm, small, training):
    model = network().train(training)
    model[3].eval()  # a part in another mode than the whole
    model[0].weight.requires_grad_(False)
    model[6].weight.grad = torch.ones_like(model[6].weight)
    before = copy.deepcopy(model)
    kept = [copy.deepcopy((p.requires_grad, p.grad)) for p in model.parameters()]
    inputs = IMAGES.clone(), LABELS.clone()
    result = algorithm(model, *inputs, small)
    assert same(model, before)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    for parameter, (requires_grad, grad) in zip(model.parameters(), kept, strict=True):
        assert parameter.requires_grad == requires_grad
        assert parameter.grad is None if grad is None else torch.equal(parameter.grad, grad)
    assert torch.equal(IMAGES, inputs[0]) and torch.equal(LABELS, inputs[1])
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in result.model.parameters()}


@BOTH
def test_every_weight_moves_and_no_statistic_does(algorithm, small):
    model = network()
    cleaned = algorithm(model, IMAGES, LABELS, small).model
    assert not any(m.training for m in cleaned.modules())
    for (name, before), after in zip(model.named_parameters(), cleaned.parameters(), strict=True):
        assert not torch.equal(before, after), name
    for (name, before), after in zip(model.named_buffers(), cleaned.buffers(), strict=True):
        assert torch.equal(before, after), name


@BOTH
def test_neither_the_models_mode_nor_the_images_type_matters(algorithm, small):
    first = algorithm(network(), IMAGES, LABELS, small).model
    assert same(algorithm(network().train(), IMAGES, LABELS, small).model, first)
    assert same(algorithm(network(), IMAGES.float() / 255, LABELS, small).model, first)


@BOTH
def test_the_same_seed_gives_the_same_result_whatever_the_global_generator(algorithm, small):
    torch.manual_seed(1)
    first = algorithm(network(), IMAGES, LABELS, small, seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = algorithm(network(), IMAGES, LABELS, small, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(first.model, again.model)
    assert all(map(torch.equal, first.deltas, again.deltas))
    assert not same(first.model, algorithm(network(), IMAGES, LABELS, small, seed=4).model)


def test_the_history_has_a_line_a_round():
    rounds = []
    settings = replace(SMALL, held_out=0.2)
    result = ibau.unlearn(
        network(), IMAGES, LABELS, settings, on_round=lambda m, h: rounds.append((m, len(h)))
    )
    assert [line["round"] for line in result.history] == [1, 2]
    assert all(set(line) == HISTORY for line in result.history)
    assert all(math.isfinite(value) for line in result.history for value in line.values())
    assert rounds == [(result.model, 1), (result.model, 2)]
    assert [d.shape for d in result.deltas] == [(3, 8, 8)] * 2


def test_nothing_held_out_learns_from_every_image(monkeypatch):
    seen, real = set(), InnerProblem.__init__

    def noted(inner, model, images, *rest):
        seen.update(map(bytes, images.flatten(1).numpy()))
        real(inner, model, images, *rest)

    monkeypatch.setattr(InnerProblem, "__init__", noted)
    every = replace(SMALL, held_out=0.0, inner_images=20)
    assert "held_out_acc" not in ibau.unlearn(network(), IMAGES, LABELS, every).history[0]
    assert len(seen) == 20
    seen.clear()
    assert "held_out_acc" in ibau.unlearn(network(), IMAGES, LABELS, replace(every, held_out=0.25)).history[0]
    assert len(seen) == 15


# ---- any classifier of images will do


@BOTH
@pytest.mark.parametrize(
    ("channels", "size", "classes", "n"), [(1, (8, 8), 4, 20), (3, (5, 9), 2, 7), (4, (6, 6), 4, 2)]
)
def test_images_of_any_size_and_number_will_do(algorithm, small, channels, size, classes, n):
    images = torch.rand(n, channels, *size)
    result = algorithm(network(channels, classes), images, torch.arange(n) % classes, small)
    assert {d.shape[1:] for d in result.deltas} == {size}
    assert result.model(images).shape == (n, classes)


class Views(nn.Module):
    """Flattens by `view`, which refuses channels-last tensors."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 3)

    def forward(self, images):
        return self.head(torch.relu(self.norm(self.conv(images))).view(len(images), -1))


class Own(nn.Module):
    """Normalises first, shares a weight between two uses, and changes its input in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5))
        self.layer = nn.Linear(192, 192)
        self.head = nn.Linear(192, 3)

    def forward(self, images):
        x = images.sub_(self.mean).flatten(1)
        return self.head(self.layer(torch.tanh(self.layer(x))))


@BOTH
@pytest.mark.parametrize("make", [Views, Own])
def test_unusual_modules_will_do(algorithm, small, make):
    images, labels = torch.rand(9, 3, 8, 8), torch.arange(9) % 3
    before = images.clone()
    result = algorithm(make(), images, labels, small)
    assert torch.equal(images, before)
    assert result.model(images).shape == (9, 3)


def test_a_model_that_cannot_take_channels_last_is_trained_too():
    images, labels = torch.rand(9, 3, 8, 8), torch.arange(9) % 3
    assert not models.takes_channels_last(Views(), images)
    assert models.takes_channels_last(network(), images)
    train(Views(), ImageSet(images, labels), TrainSettings(epochs=1, batch_size=4))


# ---- harm is undone


def guarded(lr=2.0):
    """A model that is right about ONES, its optimiser, and a guard that watches them."""
    model = Sure()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    return model, optimizer, Guard(model, optimizer, (IMAGES, ONES), lr)


def step_to(model, optimizer, weight):
    model.scale.grad = torch.ones(1)
    optimizer.step()
    model.scale.data.fill_(weight)


def test_the_guard_keeps_a_round_that_does_no_harm():
    model, optimizer, guard = guarded()
    with guard:
        step_to(model, optimizer, 0.5)
    assert not guard.undone and guard.rate == 2.0 and model.scale.item() == 0.5
    assert guard.line() == {"held_out_acc": 1.0, "rate": 2.0}


def test_the_guard_undoes_a_collapse_and_halves_the_rate():
    model, optimizer, guard = guarded()
    with guard:
        step_to(model, optimizer, 0.5)
    kept = copy.deepcopy(optimizer.state_dict()["state"])
    with guard:
        step_to(model, optimizer, -1.0)
    assert guard.undone and guard.rate == 1.0 and model.scale.item() == 0.5
    now = optimizer.state_dict()["state"]
    assert all(torch.equal(now[0][name], kept[0][name]) for name in kept[0])
    with guard:
        step_to(model, optimizer, 0.4)
    assert not guard.undone and guard.rate == 1.0  # a rate once halved stays so


def test_the_guard_undoes_what_is_not_finite():
    model, _, guard = guarded()
    with guard:
        model.scale.data.fill_(math.nan)
        raise UnlearningError("the outer loss became nan")
    assert guard.undone and guard.rate == 1.0 and model.scale.item() == 1.0


def test_the_guard_gives_up_after_three_halvings_in_a_row_and_lets_other_errors_through():
    model, _, guard = guarded()
    for _ in range(3):
        with guard:
            model.scale.data.fill_(-1.0)
    with guard:
        pass  # a round that does no harm: the count begins anew
    for _ in range(3):
        with guard:
            model.scale.data.fill_(-1.0)
    message = r"round 2: held-out accuracy fell from 100.0% to 0.0%; .* in vain; try a lower rate than lr=2"
    with pytest.raises(UnlearningError, match=message), guard:
        model.scale.data.fill_(-1.0)
    with pytest.raises(KeyError), guarded()[2]:
        raise KeyError


def test_lost_accuracy_is_never_silent(recwarn):
    _, _, guard = guarded()
    guard.accuracy = 0.96
    guard.warn()
    assert not recwarn.list
    guard.accuracy = 0.94
    with pytest.warns(UnlearningWarning, match="20 held-out clean images fell from 100.0% to 94.0%"):
        guard.warn()


def false_hypergradients(monkeypatch, losses):
    """Each outer step's hypergradient is 1, at the next of these losses."""
    losses = iter(losses)

    def false(outer, phi, delta, params, **_):
        nothing = Solution(torch.zeros_like(delta), 1.0, 0, 0.0)
        ones = tuple(torch.ones_like(p) for p in params)
        return Hypergradient(ones, tuple(0 * one for one in ones), next(losses), 0.0, nothing)

    monkeypatch.setattr("ibau.unlearning.ibau.implicit_hypergradient", false)


def test_a_collapse_is_undone_and_tried_again_at_half_the_rate(monkeypatch):
    """A step of 2.4 or of 1.2 makes the weight, which is 1, worthless; one of 0.6 does not."""
    false_hypergradients(monkeypatch, [1.0] * 9)
    settings = replace(SMALL, rounds=2, outer_steps=1, lr=2.4)
    result = ibau.unlearn(Sure(), IMAGES, ONES, settings)
    assert [line["rate"] for line in result.history] == [0.6, 0.6]
    assert [line["held_out_acc"] for line in result.history] == [1, 1]
    assert result.model.scale.item() == pytest.approx(1 - 0.6 - 0.3, abs=0.01)
    assert len(result.deltas) == 2


def test_a_loss_that_is_not_finite_is_undone(monkeypatch):
    false_hypergradients(monkeypatch, [1.0, math.nan, 1.0, 1.0])
    settings = replace(SMALL, rounds=1, outer_steps=2, lr=0.1)
    result = ibau.unlearn(Sure(), IMAGES, ONES, settings)
    assert [line["rate"] for line in result.history] == [0.05]
    assert result.model.scale.item() == pytest.approx(1 - 0.05 - 0.025, abs=0.01)


def test_a_collapse_that_stays_is_an_error(monkeypatch):
    false_hypergradients(monkeypatch, [1.0] * 9)
    model = Sure()
    with pytest.raises(
        UnlearningError, match=r"round 1: held-out accuracy fell from .* in vain; try a lower"
    ):
        ibau.unlearn(model, IMAGES, ONES, replace(SMALL, outer_steps=1, lr=20.0))
    assert model.scale.item() == 1


# ---- what is refused


@BOTH
def test_a_clean_set_that_cannot_be_used_is_refused(algorithm, small):
    for bad, message in [
        ((IMAGES.float(), LABELS), r"images are torch.float32 in \[0, 255\]; expected uint8, or floats"),
        ((IMAGES / 255 - 0.1, LABELS), r"in \[-0.1, 0.9\]; expected"),
        ((IMAGES / 0, LABELS), "expected uint8, or floats"),
        ((IMAGES.long(), LABELS), "images are torch.int64"),
        ((IMAGES[:1], LABELS[:1]), "has 1 images; unlearning needs at least 2"),
        ((IMAGES[:0], LABELS[:0]), "has 0 images"),
        ((IMAGES, LABELS[:5]), r"images \(20, 3, 8, 8\) and labels \(5,\)"),
        ((IMAGES, LABELS[:, None]), r"labels \(20, 1\) must be \(N, C, H, W\) and \(N,\)"),
        ((IMAGES[0], LABELS), r"images \(3, 8, 8\)"),
        ((IMAGES, LABELS + 1), "labels go from 1 to 4; the model has 4 classes"),
        ((IMAGES, LABELS - 1), "labels go from -1 to 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            algorithm(network(), *bad, small)


class Output(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.weight, self.output = nn.Parameter(torch.zeros(1)), output

    def forward(self, images):
        return self.output(images + 0 * self.weight)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda x: x, r"is \(2, 3, 8, 8\); expected \(2, classes\)"),
        (lambda x: x.mean((1, 2, 3)), r"is \(2,\)"),
        (lambda x: x.mean((0, 2, 3))[None], r"is \(1, 3\)"),
        (lambda x: (x.mean((2, 3)), x), "is tuple"),
    ],
)
def test_a_model_that_is_no_classifier_is_refused(output, message):
    with pytest.raises(ValueError, match=message):
        ibau.unlearn(Output(output), IMAGES, LABELS, SMALL)


@pytest.mark.parametrize("settings", [ibau.IBAUSettings, ibau.CleanSettings])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        *(({name: 0}, f"{name} is 0; ") for name in ("rounds", "radius", "inner_images", "batch_size")),
        ({"outer_steps": -1}, "outer_steps is -1; it must be positive"),
        ({"inner_steps": 0}, "inner_steps is 0; it must be positive"),
        ({"lr": -1e-3}, "lr is -0.001; it must be positive"),
        ({"lr": math.nan}, "lr is nan; it must be positive"),
        ({"phi_step": 0.0}, "phi_step is 0.0; it must be positive"),
        ({"K": -1}, "K is -1; it must not be negative"),
        ({"tol": -0.1}, "tol is -0.1; it must not be negative"),
        ({"radius": math.inf}, "radius is inf; "),
        ({"share": 0.0}, r"share is 0.0; it must lie in \(0, 1\]"),
        ({"share": 1.1}, r"share is 1.1; it must lie in \(0, 1\]"),
        ({"held_out": 1.0}, r"held_out is 1.0; it must lie in \[0, 1\)"),
        ({"precision": "half"}, "precision is 'half'; valid: auto, float32, bfloat16"),
    ],
)
def test_bad_settings_of_either_are_named(settings, bad, message):
    with pytest.raises(ValueError, match=message):
        settings(**bad)


def test_an_unknown_solver_is_answered_with_the_known():
    with pytest.raises(ValueError, match="solver is 'magic'; valid: fixed_point, cg, unrolled"):
        ibau.IBAUSettings(solver="magic")


# ---- what they are for


@pytest.fixture(scope="module")
def poisoned():
    """A small network trained on real digits, a fifth of them with BadNets' square and the label 8."""
    splits, trigger, target = load("mnist5k", train_size=1500), badnets(), 8
    model = models.build("small_vgg", 10, width=0.25)
    seen = poison(splits.train, trigger, ratio=0.2, target=target, num_classes=10).data
    train(model, seen, TrainSettings(epochs=8, batch_size=64, lr=2e-3, precision="float32"))
    test = splits.test.take(range(500))

    def rates(model):
        asr, _ = attack_rates(model, test.images, test.labels, trigger, target, 10)
        return accuracy(model, test.images, test.labels).value, asr.value

    acc, asr = rates(model)
    assert acc >= 0.85 and asr >= 0.95
    return model, splits.clean, rates


@pytest.mark.filterwarnings("ignore::ibau.unlearning.common.UnlearningWarning")  # its settings are for speed
@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        (ibau.unlearn, ibau.IBAUSettings(rounds=7, K=2, lr=2e-3, inner_images=30, batch_size=50, share=0.2)),
        (
            ibau.clean,
            ibau.CleanSettings(rounds=8, lr=1e-3, inner_images=30, batch_size=50, recovery_steps=40),
        ),
    ],
    ids=["unlearn", "clean"],
)
def test_it_removes_a_real_backdoor(poisoned, algorithm, settings):
    model, clean, rates = poisoned
    result = algorithm(model, clean.images, clean.labels, settings)
    acc, asr = rates(result.model)
    assert acc >= 0.85
    assert asr <= 0.2
    additive = [line for line in result.history if "delta_norm" in line and "area" not in line]
    assert all(line["stationarity"] < 0.7 for line in additive)
    assert all(line["delta_norm"] == pytest.approx(10, rel=1e-3) for line in additive)
