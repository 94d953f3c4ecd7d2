"""ACC, ASR, RA and DER count what they say, and their intervals are Wilson's."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import nn

from ibau.attacks import ALL_TO_ALL, Trigger
from ibau.measure.intervals import Rate
from ibau.measure.rates import accuracy, attack_rates, defence_effectiveness_rating
from ibau.networks.predict import predict

CLASSES = 4


class Table(nn.Module):
    """Reads the class that `picture` drew into the first pixel, and the trigger's mark in the last."""

    def __init__(self, clean, triggered):
        super().__init__()
        self.clean, self.triggered = torch.tensor(clean), torch.tensor(triggered)

    def forward(self, images):
        drawn = (images[:, 0, 0, 0] * 255).round().long()
        answer = torch.where(images[:, 2, -1, -1] > 0.9, self.triggered[drawn], self.clean[drawn])
        return nn.functional.one_hot(answer, CLASSES).float()


def picture(labels):
    images = torch.zeros(len(labels), 3, 4, 4, dtype=torch.uint8)
    images[:, 0, 0, 0] = labels.to(torch.uint8)
    return images


@pytest.fixture
def trigger():
    mask = torch.zeros(1, 4, 4)
    mask[:, -1, -1] = 1
    return Trigger("mark", "replace", torch.ones(3, 4, 4), mask)


def attack_success_rate(*about):
    return attack_rates(*about)[0]


def robust_accuracy(*about):
    return attack_rates(*about)[1]


LABELS = torch.tensor([0] * 10 + [1] * 20 + [2] * 30 + [3] * 40)
TRUE = [0, 1, 2, 3]


def test_a_constant_model_is_fully_attacked_outside_the_target_class(trigger):
    model = Table([2] * 4, [2] * 4)
    asr = attack_success_rate(model, picture(LABELS), LABELS, trigger, 2, CLASSES)
    assert (asr.value, asr.n) == (1.0, 70)
    assert accuracy(model, picture(LABELS), LABELS).value == pytest.approx(0.3)
    assert robust_accuracy(model, picture(LABELS), LABELS, trigger, 2, CLASSES).value == 0


@pytest.mark.parametrize("target", [0, 1, 2, 3, ALL_TO_ALL])
def test_a_perfect_model_is_not_attacked_at_all(trigger, target):
    """Counting the target class's own images would give it an ASR of their share."""
    model = Table(TRUE, TRUE)
    assert attack_success_rate(model, picture(LABELS), LABELS, trigger, target, CLASSES).value == 0
    assert robust_accuracy(model, picture(LABELS), LABELS, trigger, target, CLASSES).value == 1
    assert accuracy(model, picture(LABELS), LABELS).value == 1


def test_all_to_all_is_judged_against_the_next_class(trigger):
    asr = attack_success_rate(
        Table(TRUE, [1, 2, 3, 0]), picture(LABELS), LABELS, trigger, ALL_TO_ALL, CLASSES
    )
    assert (asr.value, asr.n) == (1.0, 100)  # the last class goes to class 0, and nobody is left out
    half = Table(TRUE, [1, 1, 2, 3])
    asr = attack_success_rate(half, picture(LABELS), LABELS, trigger, ALL_TO_ALL, CLASSES)
    ra = robust_accuracy(half, picture(LABELS), LABELS, trigger, ALL_TO_ALL, CLASSES)
    assert (asr.value, ra.value) == pytest.approx((0.1, 0.9))


def test_asr_and_ra_by_hand(trigger):
    # Triggered: class 0 -> 3 (the target), 1 -> 1 (robust), 2 -> 0 (neither); class 3 is left out.
    model = Table(TRUE, [3, 1, 0, 0])
    asr = attack_success_rate(model, picture(LABELS), LABELS, trigger, 3, CLASSES)
    ra = robust_accuracy(model, picture(LABELS), LABELS, trigger, 3, CLASSES)
    assert (asr.n, ra.n) == (60, 60)
    assert (asr.value, ra.value) == pytest.approx((10 / 60, 20 / 60))


def test_the_images_are_left_alone(trigger):
    images = picture(LABELS)
    attack_success_rate(Table(TRUE, TRUE), images, LABELS, trigger, 0, CLASSES)
    assert torch.equal(images, picture(LABELS))


def test_an_unknown_target_is_named(trigger):
    for rate in (attack_success_rate, robust_accuracy):
        with pytest.raises(ValueError, match="target is 4; valid: 0 to 3, or 'all-to-all'"):
            rate(Table(TRUE, TRUE), picture(LABELS), LABELS, trigger, 4, CLASSES)


def test_nothing_to_count_is_an_error(trigger):
    model, only = Table(TRUE, TRUE), torch.full((5,), 2)
    with pytest.raises(ValueError, match="no images at all"):
        attack_success_rate(model, picture(only), only, trigger, 2, CLASSES)
    with pytest.raises(ValueError, match="no images at all"):
        robust_accuracy(model, picture(only), only, trigger, 2, CLASSES)
    with pytest.raises(ValueError, match="no images at all"):
        accuracy(model, picture(only[:0]), only[:0])


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 20_000), data=st.data())
def test_the_interval_is_wilsons(n, data):
    k = data.draw(st.integers(0, n))
    rate = Rate.of(torch.arange(n) < k)
    expected = binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert rate.n == n
    assert (rate.hits, rate.value) == (k, k / n)  # to the last bit of a float64
    assert (rate.low, rate.high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert Rate.read(json.loads(json.dumps(rate.as_dict()))) == rate
    assert 0 <= rate.low <= rate.value <= rate.high <= 1


def test_a_rate_prints_percent_interval_and_n():
    assert str(Rate.of(torch.arange(900) < 45)) == "5.0% [3.8%, 6.6%] (n = 900)"


def rate(value, n=1000):
    return Rate(round(value * n), n)


@pytest.mark.parametrize(
    ("acc_before", "acc_after", "asr_before", "asr_after", "expected"),
    [
        (0.8, 0.8, 1.0, 0.0, 1.0),  # the whole backdoor for nothing
        (0.8, 0.7, 0.9, 0.1, 0.85),  # (0.8 - 0.1 + 1) / 2
        (0.8, 0.8, 1.0, 1.0, 0.5),  # nothing won, nothing lost
        (0.8, 0.9, 0.9, 0.1, 0.9),  # a gain of ACC does not count
        (0.8, 0.3, 0.5, 0.9, 0.25),  # neither does a rise of ASR
        (1.0, 0.0, 0.0, 0.0, 0.0),
    ],
)
def test_der_by_hand(acc_before, acc_after, asr_before, asr_after, expected):
    der = defence_effectiveness_rating(*(rate(x) for x in (acc_before, acc_after, asr_before, asr_after)))
    assert der.value == pytest.approx(expected)
    assert 0 <= der.low <= der.value <= der.high <= 1


def test_the_interval_of_der_by_hand():
    der = defence_effectiveness_rating(rate(0.8), rate(0.7), rate(0.9, 500), rate(0.1, 500))
    variance = 0.8 * 0.2 / 1000 + 0.7 * 0.3 / 1000 + 2 * 0.9 * 0.1 / 500
    assert (der.high - der.low) / 2 == pytest.approx(1.959964 * variance**0.5 / 2)
    assert not isinstance(der, Rate) and not hasattr(der, "n")  # it is no share of any images


# ---- predict


@pytest.mark.parametrize("size", [0, 1, 7, 500])
def test_predict_does_not_depend_on_the_batch_size(size):
    labels = torch.arange(size) % CLASSES
    for batch_size in (1, 3, 500):
        found = predict(Table(TRUE, TRUE), picture(labels), batch_size)
        assert found.dtype == torch.int64
        assert torch.equal(found, labels)


def test_predict_reads_uint8_and_float_alike():
    images = picture(LABELS)
    model = Table(TRUE, TRUE)
    assert torch.equal(predict(model, images), predict(model, images / 255))


def test_predict_works_in_eval_mode_and_leaves_the_modes():
    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.frozen = nn.BatchNorm2d(3), nn.Dropout()
            self.seen = []

        def forward(self, images):
            self.seen.append((self.training, self.norm.training, self.frozen.training))
            return self.frozen(self.norm(images)).mean((2, 3))

    for training in (True, False):
        model = Recorder().train(training)
        model.frozen.eval()
        before = model.norm.running_mean.clone()
        predict(model, picture(LABELS))
        assert model.seen == [(False, False, False)]
        assert (model.training, model.norm.training, model.frozen.training) == (training, training, False)
        assert torch.equal(model.norm.running_mean, before)


@settings(max_examples=50, deadline=None)
@given(parts=st.lists(st.lists(st.booleans(), min_size=1, max_size=30), min_size=1, max_size=4))
def test_pooled_rates_are_the_rate_of_all(parts):
    pooled = Rate.pooled([Rate.of(torch.tensor(part)) for part in parts])
    together = Rate.of(torch.tensor([hit for part in parts for hit in part]))
    assert pooled == together
