"""I-BAU+: its patches and their projection, the search for them, recovery, and the teacher."""

import math
from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from tiny import IMAGES, LABELS, ONES, Sure, network, same
from torch import nn

from ibau.cleaning import recipe
from ibau.cleaning.perturbations import InnerProblem, maximise_patch, perturbed, project_patch
from ibau.cleaning.recipe import CleanSettings, clean
from ibau.hypergradient.implicit import unrolled_hypergradient
from ibau.measure.rates import accuracy
from ibau.unlearning.common import UnlearningWarning

SMALL = CleanSettings(
    rounds=2, outer_steps=3, recovery_steps=0, batch_size=8, inner_steps=5, inner_images=6, few=0
)
PATCH = replace(SMALL, search="patch")
TARGETED = replace(SMALL, search="class-targeted", rounds=8)


# ---- the patch


def some_delta(seed, size=4, channels=3, spread=1.5):
    """A mask and a picture well outside of [0, 1]."""
    random = torch.Generator().manual_seed(seed)
    return spread * torch.randn(1, 1 + channels, size, size, dtype=torch.float64, generator=random)


def allowed(delta, area):
    return delta.min() >= 0 and delta.max() <= 1 and delta[:, :1].sum() <= area * (1 + 1e-6)


def bisected(delta, area):
    """The projection by bisection of the number that the mask loses, and no closed form."""
    mask, low, high = delta[:, :1], 0.0, delta[:, :1].max().clamp_min(0).item()
    if mask.clamp(0, 1).sum() > area:
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if (mask - middle).clamp(0, 1).sum() > area else (low, middle)
        mask = mask - high
    return torch.cat([mask, delta[:, 1:]], 1).clamp(0, 1)


@given(seed=st.integers(0, 10**6), area=st.floats(0.5, 20))
@hypothesis.settings(max_examples=60, deadline=None)
def test_a_projected_delta_is_allowed_and_no_allowed_one_is_closer(seed, area):
    delta = some_delta(seed)
    projected = project_patch(delta, area)
    assert allowed(projected, area)
    torch.testing.assert_close(project_patch(projected, area), projected, atol=1e-9, rtol=0)
    torch.testing.assert_close(projected, bisected(delta, area), atol=1e-9, rtol=0)
    # the set is convex, so a closest point p obeys <delta - p, q - p> <= 0 for every q in the set
    random = torch.Generator().manual_seed(seed)
    for _ in range(20):
        q = torch.rand(delta.shape, dtype=torch.float64, generator=random)
        q[:, :1] *= min(1.0, area / q[:, :1].sum().item())
        assert ((delta - projected) * (q - projected)).sum() <= 1e-9
    vertex = (delta - projected)[:, :1]
    best = torch.zeros_like(delta)
    best.view(-1)[vertex.flatten().topk(min(16, int(area))).indices] = 1
    best[:, 1:] = projected[:, 1:]
    assert ((delta - projected) * (best - projected)).sum() <= 1e-9


@given(
    values=st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0, 1.25, 2.0]), min_size=16, max_size=16),
    area=st.sampled_from([0.5, 1.0, 2.0, 3.5, 16.0]),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_equal_pixels_and_whole_areas_are_projected_too(values, area):
    """Ties, and areas at which the sum has a kink."""
    delta = some_delta(0)
    delta[0, 0] = torch.tensor(values, dtype=torch.float64).view(4, 4)
    projected = project_patch(delta, area)
    assert allowed(projected, area)
    torch.testing.assert_close(projected, bisected(delta, area), atol=1e-9, rtol=0)


def test_the_projection_is_differentiated_exactly():
    for seed, area in ((0, 3.0), (1, 0.7), (2, 100.0)):
        assert torch.autograd.gradcheck(
            lambda d, area=area: project_patch(d, area), some_delta(seed).requires_grad_()
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
    torch.testing.assert_close(perturbed(x, picture, carries), x + carries * picture)


def test_the_ascent_finds_the_pixels_that_matter():
    """Linear in the image: a mask of three pixels belongs on the three largest gains."""
    weights = torch.zeros(1, 1, 4, 4)
    weights[0, 0, 1, 1], weights[0, 0, 2, 3], weights[0, 0, 0, 2] = 3.0, -2.0, 2.5
    weights[0, 0, 3, 3] = 0.1
    x = torch.full((6, 1, 4, 4), 0.5)

    def objective(delta):
        return (perturbed(x, delta) * weights).sum((1, 2, 3)).mean()

    start = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    found = maximise_patch(objective, start, area=3.0, steps=40)
    best = torch.zeros(4, 4)
    best[1, 1] = best[2, 3] = best[0, 2] = 1
    torch.testing.assert_close(found[0, 0], best, atol=0.02, rtol=0)
    assert found[0, 1, 1, 1] == 1 and found[0, 1, 2, 3] == 0 and found[0, 1, 0, 2] == 1


def test_the_implicit_term_of_a_patch_follows_the_inner_solution():
    """Unrolled differentiation of Phi's own steps against finite differences in the weights."""
    model, images = network().double(), IMAGES.double() / 255
    inner = InnerProblem(model, images, LABELS, PATCH, area=9.0)
    inner.eta = torch.tensor(
        5.0, dtype=torch.float64
    )  # a fixed one: that it follows delta is not differentiated
    start = project_patch(some_delta(3, size=8, spread=0.4), 9.0)

    def outer(delta, params):
        named = dict(zip(inner.names, params, strict=True))
        logits = torch.func.functional_call(model, named, (perturbed(images[:5], delta),))
        return F.cross_entropy(logits, LABELS[:5])

    theta = inner.weights()
    found = unrolled_hypergradient(outer, inner.phi, start, theta, steps=2)
    random = torch.Generator().manual_seed(0)
    direction = [torch.randn(t.shape, dtype=t.dtype, generator=random) for t in theta]

    def value(step):
        moved, delta = [t + step * d for t, d in zip(theta, direction, strict=True)], start
        for _ in range(2):
            delta = inner.phi(delta.detach().requires_grad_(), moved).detach()
        return outer(delta, moved).item()

    slope = (value(1e-6) - value(-1e-6)) / 2e-6
    along = sum((g * d).sum().item() for g, d in zip(found.total, direction, strict=True))
    assert found.ratio > 1e-3
    assert along == pytest.approx(slope, rel=1e-5)


# ---- the search


@pytest.mark.parametrize(
    ("search", "channels"),
    [
        ("alternating", [3, 4, 3, 4]),
        ("class-targeted", [3, 4, 3, 4]),
        ("patch", [4] * 4),
        ("additive", [3] * 4),
    ],
)
def test_each_search_has_its_kinds(search, channels):
    result = clean(network(), IMAGES, LABELS, replace(SMALL, search=search, rounds=4))
    assert [len(delta) for delta in result.deltas] == channels
    assert ["area" in line for line in result.history] == [n == 4 for n in channels]
    assert ["aim" in line for line in result.history] == [search == "class-targeted"] * 4


def test_each_round_has_its_area_and_keeps_to_it():
    result = clean(network(), IMAGES, LABELS, replace(PATCH, rounds=6, least_area=0.05, most_area=0.5))
    areas = [line["area"] for line in result.history]
    assert len(set(areas)) == 6
    assert all(0.05 * 64 <= area <= 0.5 * 64 for area in areas)
    assert all(allowed(d[None], area) for d, area in zip(result.deltas, areas, strict=True))


def test_every_class_is_aimed_at_for_two_rounds():
    result = clean(network(), IMAGES, LABELS, TARGETED)
    aims = [line["aim"] for line in result.history]
    assert aims[::2] == aims[1::2] and sorted(aims[::2]) == [0, 1, 2, 3]
    assert aims != sorted(aims) or aims != [
        line["aim"] for line in clean(network(), IMAGES, LABELS, TARGETED, seed=1).history
    ]


def test_an_aimed_objective_is_minus_the_cross_entropy_of_the_other_classes_images():
    model, delta = network(), torch.full((1, 3, 8, 8), 0.1)
    inner = InnerProblem(model, IMAGES, LABELS, SMALL, aim=2)
    others = IMAGES[LABELS != 2] / 255
    expected = -F.cross_entropy(model(others + delta), torch.full((15,), 2))
    torch.testing.assert_close(inner.objective(delta, inner.weights()), expected)
    only = InnerProblem(model, IMAGES[LABELS == 2], LABELS[LABELS == 2], SMALL, aim=2)
    assert len(only.images) == 5  # there are no others: all of them count


def watch_shown(monkeypatch):
    """The images that every outer step sees, before its own perturbation."""
    shown, real = [], recipe._outer_step

    def noted(inner, delta, images, *rest):
        shown.append(images.clone())
        return real(inner, delta, images, *rest)

    monkeypatch.setattr(recipe, "_outer_step", noted)
    return shown


def test_the_class_targeted_search_shows_earlier_perturbations_again(monkeypatch):
    shown, clean_images = watch_shown(monkeypatch), {bytes(x.numpy()) for x in IMAGES / 255}
    settings = replace(TARGETED, rounds=3, outer_steps=2, share=0.1, patch_share=0.15, earlier=2.0)
    result = clean(network(), IMAGES, LABELS, replace(settings, held_out=0.0, batch_size=20))
    known = [IMAGES / 255]
    for number in range(3):
        for images in shown[2 * number : 2 * number + 2]:
            changed = [x for x in images if bytes(x.contiguous().numpy()) not in clean_images]
            assert len(changed) == (10 if number else 0)  # 2 (0.1 + 0.15) of 20
            for x in changed:
                assert min((x - k).abs().amax((1, 2, 3)).min() for k in known[1:]) < 1e-5
        known.append(perturbed(IMAGES / 255, result.deltas[number][None]))


def test_an_undone_round_is_not_shown_again(monkeypatch):
    runs, rounds, real = [], [], recipe._Run.round

    def spoilt(run, number):
        found = real(run, number)
        runs.append(run)
        rounds.append(number)
        if len(rounds) == 2:  # the second round the first time
            run.model.scale.data.fill_(-1.0)
        return found

    monkeypatch.setattr(recipe._Run, "round", spoilt)
    result = clean(Sure(), IMAGES, ONES, replace(TARGETED, rounds=3))
    assert rounds == [0, 1, 1, 2]
    assert [line["rate"] for line in result.history] == [5e-4, 2.5e-4, 2.5e-4]
    assert all(torch.equal(a[0], b) for a, b in zip(runs[0].earlier, result.deltas, strict=True))


# ---- recovery and the teacher


def test_recovery_learns_clean_images_at_the_end_of_the_cosine():
    rounds = []
    settings = replace(SMALL, recovery_steps=5)
    result = clean(network(), IMAGES, LABELS, settings, on_round=lambda m, h: rounds.append(len(h)))
    assert rounds == [1, 2, 3]
    assert result.history[-1]["recovery"] == 5 and "delta_norm" not in result.history[-1]
    assert len(result.deltas) == 2
    # with hardly a round before it, it is plain fine-tuning: the loss on the images it learns from falls
    long = replace(settings, rounds=1, outer_steps=1, recovery_steps=60, lr=0.01, held_out=0.0)
    history = clean(network(), IMAGES, LABELS, long).history
    assert len(history) == 2 and history[-1]["outer_loss"] < history[0]["outer_loss"]


def test_with_few_images_the_given_model_is_the_teacher():
    model = network()
    said = model(IMAGES / 255).argmax(1).detach()
    other = (said + 1) % 4
    settings = replace(SMALL, rounds=1, outer_steps=1, recovery_steps=100, lr=0.01, held_out=0.0, few=21)
    taught = clean(model, IMAGES, other, settings)
    assert (taught.model(IMAGES / 255).argmax(1) == said).float().mean() >= 0.9
    assert taught.history[0]["rate"] == 0.005
    told = clean(model, IMAGES, other, replace(settings, few=20))  # 20 are not fewer than 20
    assert (told.model(IMAGES / 255).argmax(1) == other).float().mean() >= 0.9
    assert told.history[0]["rate"] == 0.01


def test_without_recovery_labels_are_the_aim_however_few():
    few = clean(network(), IMAGES, LABELS, replace(SMALL, few=300)).model
    assert same(few, clean(network(), IMAGES, LABELS, SMALL).model)


@pytest.fixture
def told_wrong(monkeypatch):
    """Labels are false, as if learnt by heart; what a teacher says is not. Nothing counts as a collapse."""
    monkeypatch.setattr(recipe, "COLLAPSE", 0.0)
    monkeypatch.setattr("ibau.unlearning.common.COLLAPSE", 0.0)
    real = recipe._Run._batch

    def batch(run):
        x, y = real(run)
        return (x, y) if run.teacher else (x, 1 - y)

    monkeypatch.setattr(recipe._Run, "_batch", batch)
    return replace(SMALL, rounds=2, recovery_steps=20, lr=0.4, held_out=0.5)


def test_accuracy_lost_to_labels_is_recovered_from_the_given_model(told_wrong):
    result = clean(Sure(), IMAGES, ONES, told_wrong)
    assert [line["round"] for line in result.history] == [1, 2, 3, 4]
    assert [line.get("recovery") for line in result.history] == [None, None, 20, 40]
    assert [line["rate"] for line in result.history] == [0.4] * 3 + [0.2]
    assert [line["held_out_acc"] for line in result.history[2:]] == [0, 1]
    assert accuracy(result.model, IMAGES, ONES).value == 1


def test_accuracy_that_was_not_lost_needs_no_second_recovery():
    settings = replace(SMALL, recovery_steps=20, held_out=0.5)
    assert len(clean(Sure(), IMAGES, ONES, settings).history) == 3


def test_a_second_recovery_that_helps_nothing_is_undone(told_wrong, monkeypatch):
    monkeypatch.setattr(recipe._Run, "learn_from", lambda run, weights: None)  # no teacher comes
    with pytest.warns(UnlearningWarning, match="fell from 100.0% to 0.0%"):
        result = clean(Sure(), IMAGES, ONES, told_wrong)
    first, second = result.history[2:]
    assert first["held_out_acc"] == second["held_out_acc"] == 0  # no worse than before it: it may stay
    values = iter([0.4, 0.3])
    monkeypatch.setattr(recipe, "accuracy", lambda *_: next(values))
    with pytest.warns(UnlearningWarning, match="fell from 100.0% to 40.0%"):
        result = clean(Sure(), IMAGES, ONES, told_wrong)
    assert [line["held_out_acc"] for line in result.history[2:]] == [0.4]


def test_recovery_that_ruins_the_model_is_undone(monkeypatch):
    plain = clean(Sure(), IMAGES, ONES, replace(SMALL, recovery_steps=3))
    assert "recovery" in plain.history[-1]
    before, real = [], recipe._Run._recovery

    def ruin(run, teacher):
        before.append(run.model.scale.item())
        line = real(run, teacher)
        run.model.scale.data.fill_(-1.0)
        return line

    monkeypatch.setattr(recipe._Run, "_recovery", ruin)
    result = clean(Sure(), IMAGES, ONES, replace(SMALL, recovery_steps=3))
    assert [line["round"] for line in result.history] == [1, 2]
    assert result.model.scale.item() == before[0]


@pytest.mark.parametrize(
    ("before", "after", "n", "much"),
    [
        (0.78, 0.62, 100, True),
        (0.72, 0.66, 500, True),
        (0.72, 0.68, 500, False),  # 4 points
        (65 / 70, 61 / 70, 70, False),  # the interval begins at 84.3%
        (65 / 70, 58 / 70, 70, True),
        (math.nan, math.nan, 0, False),
    ],
)
def test_a_loss_is_much_where_it_is_over_five_points_and_over_chance(before, after, n, much):
    class Guarded:
        settings = CleanSettings()

    run = Guarded()
    run.guard, run.start = Guarded(), Guarded()
    run.guard.before, run.guard.accuracy = before, after
    run.start.watched = (torch.zeros(n), torch.zeros(n))
    assert recipe._Run.lost_much(run) == much


# ---- what is refused


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"search": "magic"}, "search is 'magic'; valid: alternating, class-targeted, patch, additive"),
        ({"recovery_steps": -1}, "recovery_steps is -1; it must not be negative"),
        ({"few": -1}, "few is -1; it must not be negative"),
        ({"lost": -0.1}, "lost is -0.1; it must not be negative"),
        ({"earlier": -1.0}, "earlier is -1.0; it must not be negative"),
        ({"patch_share": 1.5}, r"patch_share is 1.5; it must lie in \(0, 1\]"),
        ({"least_area": 0.5}, r"least_area is 0.5; it must lie in \(0, 0.31\]"),
        ({"least_area": 0.0}, "least_area is 0.0; it must lie in"),
        ({"most_area": 1.5}, r"most_area is 1.5; it must lie in \(0, 1\]"),
    ],
)
def test_bad_settings_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        CleanSettings(**bad)


def test_a_network_without_convolutions_is_cleaned_too():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    assert clean(model, IMAGES, LABELS, replace(SMALL, recovery_steps=2)).model(IMAGES / 255).shape == (20, 4)
