"""A defence's schedule is fitted into a time by two short runs, and every defence can be scaled."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibau.defences import DEFENCES
from ibau.study.effort import fitted

SCALED = [name for name, chosen in DEFENCES.items() if hasattr(chosen.settings, "scaled")]


@dataclass(frozen=True)
class Steps:
    """Settings of a defence whose published schedule has a thousand steps."""

    steps: int = 1000

    @property
    def work(self) -> int:
        return self.steps

    def scaled(self, share: float) -> "Steps":
        return replace(self, steps=max(1, round(share * 1000)))


@given(
    start=st.floats(0, 5),
    a_step=st.floats(0.001, 1),
    seconds=st.floats(1, 1000),
)
def test_a_run_takes_the_seconds_it_is_given(start, a_step, seconds):
    runs = []

    def run(settings):
        runs.append(settings.steps)
        return start + a_step * settings.steps

    found = fitted(Steps(), seconds, run)
    taken = start + a_step * found.settings.steps
    least = start + a_step
    assert taken <= seconds + a_step or found.settings.steps == 1
    if least <= seconds / 4:  # else one short run has to do
        assert taken == pytest.approx(seconds, abs=a_step)
    assert found.share == found.settings.steps / 1000
    assert len(runs) <= 2 and sum(start + a_step * steps for steps in runs) <= least + 0.5 * seconds + a_step


def test_what_cannot_be_done_in_the_time_is_done_at_the_least():
    found = fitted(Steps(), 1.0, lambda settings: 30.0)
    assert found.settings == Steps(1)
    pilot = [{"work": 1, "seconds": 30.0}]
    assert found.as_dict() == {"settings": {"steps": 1}, "share": 0.001, "seconds": 1.0, "pilot": pilot}


def test_what_cannot_be_scaled_says_so():
    with pytest.raises(ValueError, match="DPSGDSettings cannot be scaled"):
        fitted(DEFENCES["dp_sgd"].settings(), 1.0, lambda settings: 1.0)


def test_where_there_is_time_for_more_than_the_published_schedule_it_is_used():
    assert fitted(Steps(), 20.0, lambda settings: settings.steps / 100).share == pytest.approx(2.0)


@pytest.mark.parametrize("name", SCALED)
def test_a_share_of_the_schedule_is_that_share_of_the_work(name):
    published = DEFENCES[name].settings()
    assert published.scaled(1.0) == published
    shares = [published.scaled(share).work / published.work for share in (0.0, 0.1, 0.3, 0.5, 1.0, 4.0)]
    assert shares == sorted(shares) and 0 < shares[0] < shares[-1]
    for share in (2.0, 4.0) if name == "ibau_authors" else (0.3, 0.5, 2.0, 4.0):  # it is one round long
        assert published.scaled(share).work / published.work == pytest.approx(share, rel=0.35)


@pytest.mark.parametrize("name", SCALED)
def test_scaling_changes_the_schedule_and_no_rate_or_weight(name):
    published = DEFENCES[name].settings()
    for field in ("lr", "weight", "betas", "radius", "K", "share", "noise", "tolerance"):
        if hasattr(published, field):
            assert getattr(published.scaled(0.2), field) == getattr(published, field)


def test_all_but_dp_sgd_can_be_scaled():
    assert set(DEFENCES) - set(SCALED) == {"dp_sgd"}
