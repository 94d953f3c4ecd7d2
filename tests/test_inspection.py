"""The smallest perturbations: on models whose answer is known, and what is said about them."""

import math

import pytest
import torch
from torch import nn

from ibau.measure.intervals import Rate
from ibau.own_model.inspect import (
    SUSPICIOUS,
    Findings,
    SearchSettings,
    easiness,
    in_words,
    likely_target,
    moved_share,
    radius_for,
    radius_from,
    smallest_perturbations,
)

CLASSES = ("ant", "bee", "cat", "dog")


class Planes(nn.Module):
    """Class t scores <w_t, x>: one direction of the pixels a class, all at right angles."""

    def __init__(self, gains):
        super().__init__()
        self.gains = nn.Parameter(torch.tensor(gains))

    def forward(self, x):
        centred = x - 0.5
        rows = torch.stack([centred[:, :, i, :].mean((1, 2)) for i in range(len(self.gains))], 1)
        return 20 * rows * self.gains


def grey(count=40, noise=0.05, seed=0):
    """Mid-grey images whose brightest row names the class; the fifth row means nothing."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    images = 0.4 + noise * torch.rand(count, 3, 5, 8, generator=random)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, label] += 0.2
    return images, labels


def test_the_smallest_perturbation_of_a_linear_model_is_nearly_the_closed_form():
    """Moving x from class s to t by delta along w_t - w_s; here the best for all s lies mostly along w_t."""
    images, labels = grey(noise=0.0)
    found = smallest_perturbations(Planes([1.0, 1.0, 1.0, 1.0]), images, labels, 4, SearchSettings(steps=80))
    assert found.reached.all()
    # row t must rise from 0.4, and the other rows fall from at most 0.6, by 0.2 together: minimise
    # |delta|^2 = n (a^2 + 3 b^2) with a + b = 0.2, so b = a / 3, a = 0.15
    closed = math.sqrt(3 * 8 * (0.15**2 + 3 * 0.05**2))
    assert torch.all(found.norms >= 0.99 * closed)
    assert torch.all(found.norms <= 1.15 * closed)


def test_the_class_with_a_short_cut_is_found_and_only_it():
    images, labels = grey()
    model = Planes([1.0, 1.0, 1.0, 1.0])

    class Backdoored(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            corner = torch.sigmoid(20 * (x[:, :, 4, 7].mean(1) - 0.6))  # darker in all clean images
            return self.inner(x) + 20 * corner[:, None] * torch.tensor([0.0, 0.0, 1.0, 0.0])

    found = smallest_perturbations(model, images, labels, 4)
    assert (easiness(found.norms) < SUSPICIOUS).all(), "cries wolf"
    poisoned = smallest_perturbations(Backdoored(), images, labels, 4)
    assert (easiness(poisoned.norms) > SUSPICIOUS).tolist() == [False, False, True, False]
    hit = poisoned.deltas[2].abs().amax(0)
    assert hit.argmax() == 4 * 8 + 7, "the perturbation is not where the trigger is"


def test_it_is_reproducible_and_leaves_the_model_alone():
    images, labels = grey()
    model = Planes([1.0, 2.0, 1.0, 1.0])
    weights = model.gains.detach().clone()
    settings = SearchSettings(steps=5, images=8)
    first, second = (smallest_perturbations(model, images, labels, 4, settings, seed=1) for _ in range(2))
    assert torch.equal(first.deltas, second.deltas) and torch.equal(first.norms, second.norms)
    assert torch.equal(model.gains, weights) and model.gains.grad is None
    assert torch.allclose(first.deltas.flatten(1).norm(dim=1)[first.reached], first.norms[first.reached])


def test_classes_are_searched_alike_whether_together_or_in_parts():
    images, labels = grey()
    model = Planes([1.0, 1.0, 1.0, 1.0])
    together, parts = (
        smallest_perturbations(model, images, labels, 4, SearchSettings(images=16, batch=batch)).norms
        for batch in (512, 16)
    )
    assert torch.allclose(together, parts, rtol=0.1)


def test_a_class_that_cannot_be_reached_is_said_to_be_so():
    images, labels = grey()

    class Never(Planes):
        def forward(self, x):
            return super().forward(x) - torch.tensor([0.0, 0.0, 0.0, 1e6])

    found = smallest_perturbations(Never([1.0, 1.0, 1.0, 1.0]), images, labels, 4, SearchSettings(steps=10))
    assert not found.reached[3]
    assert found.norms.isfinite().all() and found.norms[3] >= found.norms[:3].max() * 0.5
    assert found.deltas.isfinite().all()


def test_moved_share_counts_only_images_of_other_classes():
    images, labels = grey()
    found = smallest_perturbations(Planes([1.0] * 4), images, labels, 4)
    share = moved_share(Planes([1.0] * 4), images, labels, found.deltas[1], 1)
    assert share.n == 30 and share.value >= 0.8
    assert moved_share(Planes([1.0] * 4), images, labels, torch.zeros(3, 5, 8), 1).value == 0


def test_a_radius_scales_with_the_side_of_the_image():
    assert radius_for(torch.zeros(1, 3, 32, 32), 10) == 10
    assert radius_for(torch.zeros(1, 3, 224, 224), 10) == pytest.approx(70)


def test_the_radius_follows_the_median_class_up_to_a_limit():
    norms = torch.tensor([0.1, 2.0, 1.0, 3.0, 90.0])
    assert radius_from(norms, most=10) == pytest.approx(2.8), "a backdoor's norm does not move it"
    assert radius_from(norms / 2, most=10) == pytest.approx(1.4)
    assert radius_from(10 * norms, most=10) == 10


def test_easiness_is_high_for_a_low_outlier_alone():
    norms = torch.tensor([5.0, 5.5, 4.8, 5.2, 1.5, 5.1])
    assert (easiness(norms) > SUSPICIOUS).tolist() == [False] * 4 + [True, False]
    assert (easiness(torch.tensor([5.0, 5.5, 4.8, 5.2, 25.0])) < SUSPICIOUS).all(), "hard is not easy"
    assert (easiness(torch.tensor([5.0, 5.01, 5.0, 4.6, 5.0])) < SUSPICIOUS).all(), "a small difference"
    assert easiness(torch.tensor([1.0, 9.0])).tolist() == [0, 0], "of two, none is the outlier"
    assert torch.allclose(easiness(norms), easiness(7 * norms), atol=1e-5), "a matter of the pixels' unit"


def test_the_likely_target_is_the_most_common_wrong_answer():
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    assert likely_target(torch.tensor([0, 0, 1, 0, 1, 1, 2]), labels) == 1
    with pytest.raises(ValueError, match="no target to infer"):
        likely_target(labels, labels)


def rate(value, n=100):
    return Rate.of(torch.arange(n) < round(value * n))


def test_the_words_say_what_was_found_and_what_was_not():
    even, easy = torch.tensor([4.0, 4.2, 3.9, 4.1]), torch.tensor([4.0, 4.2, 0.9, 4.1])
    quiet = " ".join(in_words(Findings(rate(0.9), even), Findings(rate(0.89), even), CLASSES))
    assert "No class stood out" in quiet and "does not show that the model was clean" in quiet
    assert "no attack success rate" in quiet and "-1.0 points, within" in quiet
    assert "suspiciously" not in quiet

    before, after = Findings(rate(0.9), easy, rate(1.0)), Findings(rate(0.7), even, rate(0.5))
    loud = " ".join(in_words(before, after, CLASSES))
    assert "cat was suspiciously easy" in loud and "0.90" in loud and "4.10 (median)" in loud
    assert "-20.0 points, outside" in loud and "still there" in loud
    gone = " ".join(in_words(before, Findings(rate(0.9), easy, rate(0.0)), CLASSES))
    assert "still there" not in gone and "cat is suspiciously easy to reach after cleaning" in gone
    assert all("may hold backdoors" in words for words in (quiet, loud, gone))


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"goal": 1.5}, {"shrink": 1.0}, {"grow": 0.9}, {"regrow": 1}]
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError):
        SearchSettings(**wrong)
