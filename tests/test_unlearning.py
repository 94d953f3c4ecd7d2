"""I-BAU keeps to its ball, leaves the given model alone, refuses bad input, and removes a real backdoor."""

import copy
import math
from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn

import ibau
from ibau.attacks import badnets, poison
from ibau.cleaning import recipe
from ibau.cleaning.recipe import (
    HYPERGRADIENTS,
    IBAUSettings,
    InnerProblem,
    UnlearningError,
    UnlearningWarning,
    inner_objective,
    maximise,
    maximise_replacing,
    perturbed,
    project_replacing,
    unlearn,
)
from ibau.data.images import ImageSet
from ibau.data.splits import load
from ibau.hypergradient.implicit import unrolled_hypergradient
from ibau.measure import rates as rates_of
from ibau.networks import models
from ibau.networks.training import TrainSettings, train

SMALL = IBAUSettings(rounds=2, outer_steps=3, mending=0, batch_size=8, inner_steps=5, inner_images=6, K=2)
REPLACING = replace(SMALL, perturbation="replacing")
ADDITIVE = replace(SMALL, perturbation="additive")
HISTORY = {
    "round",
    "inner_loss",
    "delta_norm",
    "stationarity",
    "outer_loss",
    "implicit_over_direct",
    "residual",
    "contraction",
    "inner_seconds",
    "seconds",
    "held_out_objective",
    "held_out_acc",
    "rate",
}


def network(channels=3, classes=4, seed=0):
    """A tiny classifier with BatchNorm and dropout, for images of any size."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ELU(inplace=True),
            nn.Dropout(0.2),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24, classes),
        )


@pytest.fixture
def model():
    model = network()
    torch.manual_seed(0)
    model(torch.rand(16, 3, 8, 8))  # running statistics that are not the initial ones
    return model.eval()


@pytest.fixture
def images():
    return torch.randint(0, 256, (20, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.fixture
def labels():
    return torch.arange(20) % 4


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- what it leaves alone and what it gives back


@pytest.mark.parametrize("training", [True, False])
def test_the_given_model_is_left_as_it_was(model, images, labels, training):
    model.train(training)
    model[3].eval()  # a part in another mode than the whole
    model[0].weight.requires_grad_(False)
    model[6].weight.grad = torch.ones_like(model[6].weight)
    before = copy.deepcopy(model)
    kept = [copy.deepcopy((p.requires_grad, p.grad)) for p in model.parameters()]
    inputs = images.clone(), labels.clone()
    result = unlearn(model, images, labels, SMALL)
    assert same(model, before)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    for parameter, (requires_grad, grad) in zip(model.parameters(), kept, strict=True):
        assert parameter.requires_grad == requires_grad
        assert parameter.grad is None if grad is None else torch.equal(parameter.grad, grad)
    assert torch.equal(images, inputs[0]) and torch.equal(labels, inputs[1])
    assert result.model is not model
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in result.model.parameters()}


def test_every_weight_moves_and_no_statistic_does(model, images, labels):
    cleaned = unlearn(model, images, labels, SMALL).model
    assert not any(m.training for m in cleaned.modules())
    for (name, before), after in zip(model.named_parameters(), cleaned.parameters(), strict=True):
        assert not torch.equal(before, after), name
    for (name, before), after in zip(model.named_buffers(), cleaned.buffers(), strict=True):
        assert torch.equal(before, after), name


def test_a_model_in_train_mode_gives_the_same_result(model, images, labels):
    first = unlearn(model, images, labels, SMALL).model
    assert same(unlearn(model.train(), images, labels, SMALL).model, first)


def test_the_same_seed_gives_the_same_result_whatever_the_global_generator(model, images, labels):
    torch.manual_seed(1)
    first = unlearn(model, images, labels, SMALL, seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = unlearn(model, images, labels, SMALL, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(first.model, again.model)
    assert all(map(torch.equal, first.deltas, again.deltas))
    assert not same(first.model, unlearn(model, images, labels, SMALL, seed=4).model)


def test_uint8_and_float_images_are_the_same(model, images, labels):
    first = unlearn(model, images, labels, SMALL)
    assert same(unlearn(model, images.float() / 255, labels, SMALL).model, first.model)


def test_the_history_has_a_line_a_round(model, images, labels):
    rounds = []
    result = unlearn(model, images, labels, SMALL, on_round=lambda m, h: rounds.append((m, len(h))))
    assert [line["round"] for line in result.history] == [1, 2]
    assert [set(line) - HISTORY for line in result.history] == [set(), {"area"}]
    assert all(set(line) >= HISTORY for line in result.history)
    assert all(math.isfinite(value) for line in result.history for value in line.values())
    assert rounds == [(result.model, 1), (result.model, 2)]
    assert [d.shape for d in result.deltas] == [(3, 8, 8), (4, 8, 8)]


@pytest.mark.parametrize("radius", [0.01, 1.0, 10.0])
def test_delta_stays_in_its_ball(model, images, labels, radius):
    result = unlearn(model, images, labels, replace(ADDITIVE, radius=radius, inner_steps=30))
    assert all(set(line) == HISTORY for line in result.history)
    for delta, line in zip(result.deltas, result.history, strict=True):
        assert delta.norm() <= radius * (1 + 1e-5)
        assert line["delta_norm"] == pytest.approx(delta.norm().item(), rel=1e-5)
        assert 0 <= line["stationarity"] < 1


def test_more_inner_steps_come_closer_to_a_stationary_point(model, images, labels):
    few, many = (
        unlearn(model, images, labels, replace(ADDITIVE, rounds=1, inner_steps=steps, radius=2.0)).history[0]
        for steps in (2, 100)
    )
    assert many["stationarity"] < few["stationarity"] / 10
    assert many["inner_loss"] >= few["inner_loss"]


def test_without_k_the_implicit_term_is_left_out(model, images, labels):
    solved = replace(ADDITIVE, inner_steps=50, radius=2.0)  # else the series may diverge, and is left out too
    without = unlearn(model, images, labels, replace(solved, K=0))
    assert [line["implicit_over_direct"] for line in without.history] == [0, 0]
    with_it = unlearn(model, images, labels, solved)
    assert all(line["implicit_over_direct"] > 0 for line in with_it.history)
    assert all(line["residual"] < 1 for line in with_it.history)
    assert not same(without.model, with_it.model)


@pytest.mark.parametrize(
    ("channels", "size", "classes", "n"), [(1, (8, 8), 4, 20), (3, (5, 9), 2, 7), (4, (6, 6), 4, 2)]
)
def test_any_classifier_of_images_will_do(channels, size, classes, n):
    images = torch.rand(n, channels, *size)
    for settings, maps in (
        (SMALL, (channels, 1 + channels)),
        (REPLACING, (1 + channels, 1 + channels)),
        (ADDITIVE, (channels, channels)),
    ):
        result = unlearn(network(channels, classes), images, torch.arange(n) % classes, settings)
        assert [d.shape for d in result.deltas] == [(m, *size) for m in maps]
        assert result.model(images).shape == (n, classes)


class Views(nn.Module):
    """Flattens by `view`, which refuses channels-last tensors."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 3)

    def forward(self, images):
        return self.head(torch.relu(self.norm(self.conv(images))).view(len(images), -1))


def test_a_model_that_cannot_take_channels_last_will_do():
    images, labels = torch.rand(9, 3, 8, 8), torch.arange(9) % 3
    assert not models.takes_channels_last(Views(), images)
    assert models.takes_channels_last(network(), images)
    assert unlearn(Views(), images, labels, replace(SMALL, mending=1)).model(images).shape == (9, 3)
    model = Views()
    train(model, ImageSet(images, labels), TrainSettings(epochs=1, batch_size=4))


def test_any_module_will_do():
    class Own(nn.Module):
        """Normalises first, shares a weight between two uses, and changes its input in place."""

        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.full((3, 1, 1), 0.5))
            self.layer = nn.Linear(12, 12)
            self.head = nn.Linear(12, 3)

        def forward(self, images):
            x = images.sub_(self.mean).flatten(1)
            return self.head(self.layer(torch.tanh(self.layer(x))))

    images, labels = torch.rand(9, 3, 2, 2), torch.arange(9) % 3
    before = images.clone()
    result = unlearn(Own(), images, labels, SMALL)
    assert len(result.history) == 2
    assert torch.equal(images, before)


def test_the_package_offers_it_at_the_top():
    assert ibau.unlearn is unlearn
    assert ibau.IBAUSettings is IBAUSettings


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


@pytest.mark.parametrize("radius", [0.5, 100.0])
def test_a_solution_says_how_near_to_stationary_it_is(model, images, labels, radius):
    settings = replace(ADDITIVE, radius=radius, inner_steps=40)
    inner = InnerProblem(model, images, labels, settings)
    found = inner.solve(torch.Generator().manual_seed(0))
    moved = inner.phi(found.delta.requires_grad_(), inner.weights()).detach()
    gap = ((moved - found.delta).norm() / found.delta.norm()).item()
    assert found.stationarity == pytest.approx(gap, rel=1e-4)
    assert found.loss == pytest.approx(inner.objective(found.delta, inner.weights()).item(), rel=1e-5)


def test_the_inner_objective_is_the_cross_entropy_of_the_perturbed_images_uncut(model, images, labels):
    x, delta = images / 255, torch.full((1, 3, 8, 8), 0.7)
    params = {name: p + 0.1 for name, p in model.named_parameters()}
    moved = copy.deepcopy(model)
    for p in moved.parameters():
        p.data += 0.1
    expected = nn.functional.cross_entropy(moved(x + delta), labels)
    torch.testing.assert_close(inner_objective(model, params, delta, x, labels), expected)


# ---- the replacing perturbation


def some_delta(seed, size=4, channels=3, spread=1.5):
    """A mask and a picture well outside of [0, 1]."""
    torch.manual_seed(seed)
    return spread * torch.randn(1, 1 + channels, size, size, dtype=torch.float64)


def allowed(delta, area):
    return delta.min() >= 0 and delta.max() <= 1 and delta[:, :1].sum() <= area * (1 + 1e-6)


@given(seed=st.integers(0, 10**6), area=st.floats(0.5, 16))
@hypothesis.settings(max_examples=60, deadline=None)
def test_a_projected_delta_is_allowed_and_no_allowed_one_is_closer(seed, area):
    delta = some_delta(seed)
    projected = project_replacing(delta, area)
    assert allowed(projected, area)
    torch.testing.assert_close(project_replacing(projected, area), projected, atol=1e-6, rtol=0)
    # the set is convex, so a closest point p obeys <delta - p, q - p> <= 0 for every q in the set
    for _ in range(20):
        q = torch.rand_like(delta)
        q[:, :1] *= min(1.0, area / q[:, :1].sum().item()) * torch.rand(1).item()
        assert ((delta - projected) * (q - projected)).sum() <= 1e-5
    vertex = (delta - projected)[:, :1]
    best = torch.zeros_like(delta)
    best.view(-1)[vertex.flatten().topk(int(area)).indices] = 1
    best[:, 1:] = projected[:, 1:]
    assert ((delta - projected) * (best - projected)).sum() <= 1e-5


def test_the_projection_is_differentiated_exactly():
    for seed, area in ((0, 3.0), (1, 0.7), (2, 100.0)):
        assert torch.autograd.gradcheck(
            lambda d, area=area: project_replacing(d, area), some_delta(seed).requires_grad_()
        )


def test_a_mask_of_zeros_changes_nothing_and_one_of_ones_everything():
    x, picture = torch.rand(5, 3, 4, 4), torch.rand(1, 3, 4, 4)
    none, every = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    assert torch.equal(perturbed(x, torch.cat([none, picture], 1)), x)
    torch.testing.assert_close(perturbed(x, torch.cat([every, picture], 1)), picture.expand(5, 3, 4, 4))
    carries = torch.tensor([1.0, 0, 0, 1, 0]).view(5, 1, 1, 1)
    some = perturbed(x, torch.cat([every, picture], 1), carries)
    assert torch.equal(some[1], x[1])
    torch.testing.assert_close(some[3], picture[0])


def test_the_ascent_finds_the_pixels_that_matter():
    """Linear in the image: a mask of three pixels belongs on the three largest gains."""
    weights = torch.zeros(1, 1, 4, 4)
    weights[0, 0, 1, 1], weights[0, 0, 2, 3], weights[0, 0, 0, 2] = 3.0, -2.0, 2.5
    weights[0, 0, 3, 3] = 0.1
    x = torch.full((6, 1, 4, 4), 0.5)

    def objective(delta):
        return (perturbed(x, delta) * weights).sum((1, 2, 3)).mean()

    start = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    found = maximise_replacing(objective, start, area=3.0, steps=40)
    best = torch.zeros(4, 4)
    best[1, 1] = best[2, 3] = best[0, 2] = 1
    torch.testing.assert_close(found[0, 0], best, atol=0.02, rtol=0)
    assert found[0, 1, 1, 1] == 1 and found[0, 1, 2, 3] == 0 and found[0, 1, 0, 2] == 1


def test_each_round_has_its_area_and_keeps_to_it(model, images, labels):
    settings = replace(REPLACING, rounds=6, K=0, least_area=0.05, most_area=0.5)
    result = unlearn(model, images, labels, settings)
    areas = [line["area"] for line in result.history]
    assert len(set(areas)) == 6
    assert all(0.05 * 64 <= area <= 0.5 * 64 for area in areas)
    assert all(allowed(d[None], area) for d, area in zip(result.deltas, areas, strict=True))


def test_the_implicit_term_of_a_replacing_perturbation_follows_the_inner_solution(model, images, labels):
    """Unrolled differentiation of Phi's own steps against finite differences in the weights."""
    model = model.double()
    images = images.double() / 255
    inner = InnerProblem(model, images, labels, replace(REPLACING, phi_step=5.0), area=9.0)
    start = project_replacing(some_delta(3, size=8, spread=0.4), 9.0)

    def outer(delta, params):
        named = dict(zip(inner.names, params, strict=True))
        return inner_objective(inner.model, named, delta, images[:5], labels[:5])

    theta = inner.weights()
    found = unrolled_hypergradient(outer, inner.phi, start, theta, steps=2)
    direction = [torch.randn_like(t) for t in theta]

    def value(step):
        moved, delta = [t + step * d for t, d in zip(theta, direction, strict=True)], start
        for _ in range(2):
            delta = inner.phi(delta.detach().requires_grad_(), moved).detach()
        return outer(delta, moved).item()

    slope = (value(1e-6) - value(-1e-6)) / 2e-6
    along = sum((g * d).sum().item() for g, d in zip(found.total, direction, strict=True))
    assert found.ratio > 1e-3
    assert along == pytest.approx(slope, rel=1e-5)


# ---- what it refuses


def test_a_clean_set_that_cannot_be_used_is_refused(model, images, labels):
    for bad, message in [
        ((images.float(), labels), r"images are torch.float32 in \[0, 255\]; expected uint8, or floats"),
        ((images / 255 - 0.1, labels), r"in \[-0.1, 0.9\]; expected"),
        ((images / 0, labels), "expected uint8, or floats"),
        ((images.long(), labels), "images are torch.int64"),
        ((images[:1], labels[:1]), "has 1 images; unlearning needs at least 2"),
        ((images[:0], labels[:0]), "has 0 images"),
        ((images, labels[:5]), r"images \(20, 3, 8, 8\) and labels \(5,\)"),
        ((images, labels[:, None]), r"labels \(20, 1\) must be \(N, C, H, W\) and \(N,\)"),
        ((images[0], labels), r"images \(3, 8, 8\)"),
        ((images, labels + 1), "labels go from 1 to 4; the model has 4 classes"),
        ((images, labels - 1), "labels go from -1 to 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            unlearn(model, *bad, SMALL)


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
def test_a_model_that_is_no_classifier_is_refused(images, labels, output, message):
    with pytest.raises(ValueError, match=message):
        unlearn(Output(output), images, labels, SMALL)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        *(
            ({name: 0}, f"{name} is 0; it must be positive")
            for name in ("rounds", "radius", "inner_images", "batch_size", "patience")
        ),
        ({"outer_steps": -1}, "outer_steps is -1; it must not be negative"),
        ({"held_out": 1.0}, r"held_out is 1.0; it must lie in \[0, 1\)"),
        ({"hypergradient": "magic"}, "hypergradient is 'magic'; valid: fixed_point, cg, unrolled, neumann"),
        ({"precision": "half"}, "precision is 'half'; valid: auto, float32, bfloat16"),
        (
            {"perturbation": "additive", "radius": math.inf},
            "radius is inf; normalised ascent needs a finite one",
        ),
        (
            {"perturbation": "additive", "hypergradient": "cg", "penalty": 0.1},
            "'cg' needs a finite radius and no penalty",
        ),
        ({"perturbation": "magic"}, "perturbation is 'magic'; valid: in turn, aimed, replacing, additive"),
        ({"hypergradient": "cg"}, "hypergradient 'cg'; 0, 0 and not 'cg' go with replacing perturbations"),
        ({"inner_lr": 1.0}, "inner_lr is 1.0, .* others need perturbation='additive'"),
        ({"least_area": 0.5}, "least_area is 0.5 and most_area 0.31"),
        ({"most_area": 1.5}, "most_area 1.5"),
        ({"least_area": 0.0}, "least_area is 0.0"),
        ({"lr": -1e-3}, "lr is -0.001"),
        ({"lr": math.nan}, "lr is nan"),
        ({"phi_step": 0.0}, "phi_step is 0.0"),
        ({"K": -1}, "K is -1; it must not be negative"),
        ({"tol": -0.1}, "tol is -0.1"),
        ({"share": 0.0}, r"share is 0.0; it must lie in \(0, 1\]"),
        ({"share": 1.1}, "share is 1.1"),
        ({"replacing_share": 1.5}, "replacing_share is 1.5"),
    ],
)
def test_bad_settings_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        IBAUSettings(**bad)


def test_the_edges_of_the_settings_work(model, images, labels):
    settings = IBAUSettings(
        rounds=1, outer_steps=1, batch_size=1000, share=1.0, inner_steps=1, inner_images=1000, K=0
    )
    unlearn(model, images, labels, settings)
    unlearn(model, images, labels, replace(settings, batch_size=1, inner_images=1, share=1e-6, K=1))


@pytest.mark.parametrize("k", [0, 2])
def test_a_rate_beyond_reason_is_an_error_and_the_model_stays(model, images, labels, k):
    before = copy.deepcopy(model)
    with pytest.raises(UnlearningError, match=r"try a lower rate than lr=1e\+30"):
        unlearn(model, images, labels, replace(SMALL, lr=1e30, K=k))
    assert same(model, before)


@pytest.mark.parametrize("k", [0, 2])
def test_a_model_that_returns_nan_is_an_error(images, labels, k):
    with pytest.raises(UnlearningError, match="the inner loss became nan; undone, and the rate halved 3"):
        unlearn(Output(lambda x: x.mean((2, 3)) * math.nan), images, labels % 3, replace(SMALL, K=k))


# ---- aimed at a class


AIMED = replace(SMALL, perturbation="aimed", rounds=10, patience=10, K=0)


def test_an_aimed_objective_is_minus_the_loss_of_that_class_on_images_of_others(model, images, labels):
    problem = InnerProblem(model, images, labels, AIMED, area=None, aim=2)
    delta = torch.randn(1, *images.shape[1:], generator=torch.Generator().manual_seed(0))
    others = images[labels != 2] / 255
    assert 0 < len(others) < len(images)
    expected = nn.functional.log_softmax(model(others + delta), dim=1)[:, 2].mean().item()
    assert problem.objective(delta, problem.weights()).item() == pytest.approx(expected, rel=1e-5)
    alone = InnerProblem(model, images, torch.full_like(labels, 2), AIMED, area=None, aim=2)
    assert len(alone.images) == len(images)


def test_every_class_has_its_turn_for_two_rounds_of_either_kind(model, images, labels):
    history = unlearn(model, images, labels, AIMED).history
    aims = [line["aim"] for line in history]
    assert aims[0:8:2] == aims[1:8:2] and sorted(aims[0:8:2]) == [0, 1, 2, 3]
    assert aims[8:] == aims[:2]
    assert ["area" in line for line in history] == [False, True] * 5
    assert all(line["inner_loss"] < 0 for line in history)


def test_an_aimed_perturbation_moves_images_to_its_class(model, images, labels):
    result = unlearn(model, images, labels, replace(AIMED, rounds=1, lr=1e-9, inner_steps=40, radius=20.0))
    aim, x = result.history[0]["aim"], images / 255
    sure = [nn.functional.softmax(model(each), dim=1)[:, aim].mean() for each in (x, x + result.deltas[0])]
    assert sure[1] > sure[0] + 0.1


def test_what_earlier_rounds_found_is_shown_again(model, images, labels):
    settings = replace(AIMED, share=0.1, replacing_share=0.15, held_out=0.0)
    generator = torch.Generator().manual_seed(0)
    run = recipe._Run(model, images, labels, settings, generator)
    x = images / 255
    first, second = torch.rand(1, *x.shape[1:]), torch.rand(1, 1 + x.shape[1], *x.shape[2:])
    run.earlier, kept = [first, second], x.clone()
    seen = [0, 0, 0]
    for _ in range(20):
        for before, after in zip(x, run._with_earlier(x), strict=True):
            ways = [before, before + first[0], recipe.perturbed(before[None], second)[0]]
            seen[[torch.equal(after, way) for way in ways].index(True)] += 1
    assert torch.equal(x, kept)
    assert seen[0] == 20 * 10 and min(seen[1:]) > 50  # half of 20 images, each kind as likely


def test_an_undone_round_is_not_remembered(trained, images, monkeypatch):
    model, labels = trained
    runs, real = [], recipe._Run.__init__

    def noted(run, *args, **kwargs):
        real(run, *args, **kwargs)
        runs.append(run)

    monkeypatch.setattr(recipe._Run, "__init__", noted)
    collapsing_at(monkeypatch, {2, 3})
    result = unlearn(model, images, labels, replace(AIMED, rounds=4))
    assert len(runs[0].earlier) == 4
    assert all(torch.equal(a[0], b) for a, b in zip(runs[0].earlier, result.deltas, strict=True))


# ---- when it goes wrong, and when it stops


def collapsing_at(monkeypatch, rounds):
    """Make the weights worthless after these rounds (counted with repetitions); returns the rates used."""
    real, rates = recipe._Run.round, []

    def spoilt(run):
        found = real(run)
        rates.append(run.rate)
        if len(rates) in rounds:
            with torch.no_grad():
                for weight in run.model.parameters():
                    weight.zero_()
        return found

    monkeypatch.setattr(recipe._Run, "round", spoilt)
    return rates


class Sure(nn.Module):
    """Says class 1 of 2 as long as its weight is positive."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images):
        return self.scale * torch.tensor([-1.0, 1.0]) + 0 * images.mean((1, 2, 3))[:, None]


@pytest.fixture
def trained():
    """A model, and labels about which it is right."""
    model = Sure()
    return model, torch.ones(20, dtype=torch.int64)


def test_a_collapse_is_undone_and_the_rate_halved(trained, images, monkeypatch):
    model, labels = trained
    rates = collapsing_at(monkeypatch, {2, 3})
    result = unlearn(model, images, labels, replace(SMALL, rounds=3, K=0))
    assert rates == [SMALL.lr, SMALL.lr, SMALL.lr / 2, SMALL.lr / 4, SMALL.lr / 4]
    assert [line["rate"] for line in result.history] == [SMALL.lr, SMALL.lr / 4, SMALL.lr / 4]
    assert rates_of.accuracy(result.model, images, labels).value == 1


def test_a_collapse_that_stays_is_an_error(trained, images, monkeypatch):
    model, labels = trained
    collapsing_at(monkeypatch, set(range(1, 100)))
    with pytest.raises(
        UnlearningError, match=r"round 1: held-out accuracy fell from .* in vain; try a lower"
    ):
        unlearn(model, images, labels, replace(SMALL, K=0))


def test_lost_accuracy_is_never_silent(trained, images):
    model, labels = trained
    with pytest.warns(UnlearningWarning, match="held-out clean images fell from"):
        recipe._warn_if_lost(0.9, 0.84, 100)
    assert recipe._warn_if_lost(0.9, 0.86, 100) is None


def test_it_stops_when_the_held_out_objective_no_longer_falls(model, images, labels, monkeypatch):
    values = iter([3.0, 2.0, 2.5, 2.1, 1.0, 0.5])
    monkeypatch.setattr(recipe._Run, "held_out_objective", lambda *_: next(values))
    result = unlearn(model, images, labels, replace(SMALL, rounds=6, patience=2))
    assert result.stopped == "patience"
    assert [line["held_out_objective"] for line in result.history] == [3.0, 2.0, 2.5, 2.1]


def test_the_held_out_objective_is_the_outer_one_of_the_weights_before_the_round(model, images, labels):
    result = unlearn(model, images, labels, replace(ADDITIVE, rounds=1, share=0.25))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    x, y = images[order[:4]] / 255, labels[order[:4]]
    clean, hurt = (nn.functional.cross_entropy(model(x + d), y) for d in (0, result.deltas[0]))
    expected = (0.75 * clean + 0.25 * hurt).item()
    assert result.history[0]["held_out_objective"] == pytest.approx(expected, rel=1e-4)


def test_mending_learns_clean_images_at_the_end_of_the_cosine(model, images, labels, monkeypatch):
    monkeypatch.setattr(recipe, "FEW", 0)
    rounds = []
    settings = replace(SMALL, mending=5, K=0)
    result = unlearn(model, images, labels, settings, on_round=lambda m, h: rounds.append(len(h)))
    assert rounds == [1, 2, 3]
    assert result.history[-1]["mending"] == 5 and "delta_norm" not in result.history[-1]
    assert len(result.deltas) == 2
    # without rounds to speak of, it is plain fine-tuning: the loss on the images it learns from falls
    long = replace(settings, rounds=1, outer_steps=1, mending=60, lr=0.01, held_out=0.0)
    mended = unlearn(model, images, labels, long)
    assert len(mended.history) == 2
    assert mended.history[-1]["outer_loss"] < mended.history[0]["outer_loss"]


def test_with_few_images_the_model_itself_is_the_teacher(model, images, monkeypatch):
    said = model(images / 255).argmax(1).detach()
    other = (said + 1) % 4
    settings = replace(SMALL, rounds=1, outer_steps=1, mending=100, lr=0.01, held_out=0.0, K=0)
    taught = unlearn(model, images, other, settings)
    assert (taught.model(images / 255).argmax(1) == said).float().mean() >= 0.9
    assert taught.history[0]["rate"] == 0.005
    monkeypatch.setattr(recipe, "FEW", 20)  # 20 are not few then
    told = unlearn(model, images, other, settings)
    assert (told.model(images / 255).argmax(1) == other).float().mean() >= 0.9
    assert told.history[0]["rate"] == 0.01


@pytest.fixture
def told_wrong(monkeypatch):
    """Labels are false, as if learnt by heart; what a teacher says is not. Nothing collapses."""
    monkeypatch.setattr(recipe, "FEW", 0)
    monkeypatch.setattr(recipe, "COLLAPSE", 0.0)
    real = recipe._Run._batch

    def batch(run):
        x, y = real(run)
        return (x, y) if run.teacher else (x, 1 - y)

    monkeypatch.setattr(recipe._Run, "_batch", batch)
    return replace(SMALL, rounds=2, mending=20, lr=0.4, held_out=0.5, K=0)


def test_accuracy_lost_to_labels_is_mended_by_the_given_model(trained, images, told_wrong):
    model, labels = trained
    result = unlearn(model, images, labels, told_wrong)
    assert [line["round"] for line in result.history] == [1, 2, 3, 4]
    assert [line.get("mending") for line in result.history] == [None, None, 20, 40]
    assert [line["rate"] for line in result.history] == [0.4] * 3 + [0.2]
    assert [line["held_out_acc"] for line in result.history[2:]] == [0, 1]
    assert rates_of.accuracy(result.model, images, labels).value == 1


def test_accuracy_that_was_not_lost_needs_no_second_mending(trained, images, monkeypatch):
    monkeypatch.setattr(recipe, "FEW", 0)
    model, labels = trained
    settings = replace(SMALL, mending=20, held_out=0.5, K=0)
    assert len(unlearn(model, images, labels, settings).history) == 3


def test_a_second_mending_that_helps_nothing_is_undone(trained, images, told_wrong, monkeypatch):
    model, labels = trained
    monkeypatch.setattr(recipe._Run, "learn_from", lambda run, weights: None)  # no teacher comes
    values = iter([1.0, 0.5, 0.5, 0.4, 0.3])
    monkeypatch.setattr(recipe, "_accuracy", lambda *_: next(values))
    with pytest.warns(UnlearningWarning, match="fell from 100.0% to 40.0%"):
        result = unlearn(model, images, labels, told_wrong)
    assert [line["held_out_acc"] for line in result.history] == [0.5, 0.5, 0.4]


def test_what_does_not_mend_is_not_mended(trained, images, told_wrong):
    model, labels = trained
    with pytest.warns(UnlearningWarning):
        history = unlearn(model, images, labels, replace(told_wrong, rounds=9, mending=0)).history
    assert len(history) == 9


def test_a_loss_is_bad_where_it_is_more_than_five_points_and_more_than_chance():
    assert recipe._badly_lost(0.78, 0.62, 100)
    assert recipe._badly_lost(0.72, 0.66, 500)
    assert not recipe._badly_lost(0.72, 0.68, 500)  # 4 points
    assert not recipe._badly_lost(65 / 70, 61 / 70, 70)  # the interval begins at 84.3%
    assert recipe._badly_lost(65 / 70, 58 / 70, 70)
    assert not recipe._badly_lost(math.nan, math.nan, 0)


def test_what_does_not_mend_takes_labels_however_few(model, images, labels, monkeypatch):
    few = unlearn(model, images, labels, SMALL).model
    monkeypatch.setattr(recipe, "FEW", 0)
    assert same(few, unlearn(model, images, labels, SMALL).model)


def test_shifted_images_are_windows_of_the_mirrored_ones():
    images = torch.rand(40, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    shifted = recipe._shifted(images, torch.Generator().manual_seed(2))
    assert torch.equal(shifted, recipe._shifted(images, torch.Generator().manual_seed(2)))
    padded = F.pad(images, (3, 3, 2, 2), mode="reflect")
    found = set()
    for i in range(40):
        windows = {
            (y, x)
            for y in range(5)
            for x in range(7)
            if padded[i, :, y : y + 16, x : x + 24].equal(shifted[i])
        }
        assert len(windows) == 1
        found |= windows
    assert {y for y, _ in found} == set(range(5)) and {x for _, x in found} == set(range(7))


def test_mending_that_ruins_the_model_is_undone(trained, images, monkeypatch):
    monkeypatch.setattr(recipe, "FEW", 0)
    model, labels = trained
    settings = replace(SMALL, mending=3, K=0)
    unmended = unlearn(model, images, labels, replace(settings, mending=0, cosine=False)).model
    real = recipe._Run.mend

    def ruin(run, teacher):
        line = real(run, teacher)
        run.model.scale.data.fill_(-1.0)
        return line

    monkeypatch.setattr(recipe._Run, "mend", ruin)
    result = unlearn(model, images, labels, replace(settings, cosine=False))
    assert [line["round"] for line in result.history] == [1, 2]
    assert same(result.model, unmended)


def test_nothing_held_out_learns_from_every_image(model, images, labels):
    result = unlearn(model, images, labels, replace(SMALL, held_out=0.0))
    assert "held_out_acc" not in result.history[0]
    assert result.stopped == "rounds"


@pytest.mark.parametrize("how", HYPERGRADIENTS)
def test_every_hypergradient_can_be_asked_for(model, images, labels, how):
    settings = replace(ADDITIVE, hypergradient=how, inner_steps=40, radius=1.0)
    result = unlearn(model, images, labels, settings)
    assert result.history[0]["implicit_over_direct"] > 0


def test_the_authors_recipe_runs_as_it_stands(model, images, labels):
    settings = IBAUSettings.authors()
    assert (settings.K, settings.share, settings.lr, settings.inner_lr) == (5, 0.01, 1e-3, 10.0)
    result = unlearn(model, images, labels, replace(settings, batch_size=7))
    assert result.history[0]["implicit_over_direct"] > 0
    assert len(result.history) == 1
    assert "held_out_acc" not in result.history[0]


# ---- what it is for


@pytest.mark.filterwarnings("ignore::ibau.cleaning.recipe.UnlearningWarning")  # its settings are for speed
def test_it_removes_a_real_backdoor():
    """A small network on real digits: the backdoor goes, and the digits are still read."""
    splits, trigger, target = load("mnist5k", train_size=1500), badnets(), 8
    victim = models.build("small_vgg", 10, width=0.25)
    poisoned = poison(splits.train, trigger, ratio=0.2, target=target, num_classes=10).data
    train(victim, poisoned, TrainSettings(epochs=8, batch_size=64, lr=2e-3, precision="float32"))
    test = splits.test.take(range(500))
    assert rates_of.accuracy(victim, test.images, test.labels).value >= 0.85
    assert rates_of.attack_success_rate(victim, test.images, test.labels, trigger, target, 10).value >= 0.95

    settings = IBAUSettings.paper(rounds=7, K=2, lr=2e-3, inner_images=30, batch_size=50, share=0.2)
    result = unlearn(victim, splits.clean.images, splits.clean.labels, settings)
    assert rates_of.accuracy(result.model, test.images, test.labels).value >= 0.85
    asr = rates_of.attack_success_rate(result.model, test.images, test.labels, trigger, target, 10)
    assert asr.value <= 0.2
    assert all(line["stationarity"] < 0.25 for line in result.history)
    assert all(line["delta_norm"] == pytest.approx(10, rel=1e-3) for line in result.history)
