"""Answers to a wish to stop: what is still done, and for how long, from rounds and pauses that were measured."""

from __future__ import annotations

import pytest

from simulate.training import activity as module
from simulate.training.activity import Activity, Phase


class Clock:
    """A clock that the test sets."""

    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Put the test's clock into the module."""
    turned = Clock()
    monkeypatch.setattr(module, "time", turned)
    return turned


def spend(clock: Clock, activity: Activity, phase: Phase, seconds: float) -> None:
    """Spend seconds in a phase."""
    activity.begin(phase)
    clock.now_s += seconds


def train_round(clock: Clock, activity: Activity, step_s: float, steps: int = 4) -> None:
    """Take the steps of a round and an exchange of 2 s."""
    for _ in range(steps):
        spend(clock, activity, "training", step_s)
        activity.step += 1
    spend(clock, activity, "exchanging", 2.0)
    activity.end_round()


def test_nothing_is_promised_before_anything_was_measured(clock: Clock) -> None:
    activity = Activity()
    activity.begin("training")
    text = activity.stopping_text(4, False, 0.0, "the round")
    assert text == "finishing the round and a checkpoint; how long this takes is not known yet"


def test_the_first_round_is_estimated_from_its_steps(clock: Clock) -> None:
    activity = Activity()
    spend(clock, activity, "training", 10.0)
    activity.step = 1
    # Four steps of 10 s, of which one is done.
    text = activity.stopping_text(4, False, 0.0, "the round")
    assert text == "finishing the round and a checkpoint, about 30 s; how long a checkpoint takes is not known yet"


def test_the_rest_of_a_round_is_bounded_by_the_longest_one(clock: Clock) -> None:
    activity = Activity()
    train_round(clock, activity, 10.0)  # 42 s
    spend(clock, activity, "evaluating", 5.0)
    spend(clock, activity, "saving", 3.0)
    train_round(clock, activity, 8.0)
    spend(clock, activity, "training", 7.0)
    # 42 - 7 s of the round and 3 s of the checkpoint; an evaluation takes 5 s more where one follows.
    assert activity.stopping_text(12, False, 1.0, "the round") == "finishing the round and a checkpoint, at most 38 s"
    text = activity.stopping_text(12, True, 1.0, "the round")
    assert text == "finishing the round, an evaluation and a checkpoint, at most 43 s"


def test_a_wish_that_misses_the_meeting_is_heard_at_the_next(clock: Clock) -> None:
    activity = Activity()
    train_round(clock, activity, 10.0)
    spend(clock, activity, "saving", 3.0)
    spend(clock, activity, "training", 41.5)
    # Half a second is left of this round, and the wish travels for one: 0.5 + 42 + 3 s, rounded up.
    assert activity.stopping_text(8, False, 1.0, "the round").endswith("at most 46 s")
    assert activity.stopping_text(8, False, 0.0, "the round").endswith("at most 4 s")


def test_during_a_pause_one_more_round_follows(clock: Clock) -> None:
    activity = Activity()
    train_round(clock, activity, 10.0)
    spend(clock, activity, "saving", 3.0)
    train_round(clock, activity, 10.0)
    spend(clock, activity, "saving", 1.0)
    # Two seconds of this checkpoint, 42 of the round, 3 of the next checkpoint.
    assert activity.stopping_text(12, False, 1.0, "the round").endswith("at most 47 s")


def test_a_slow_start_is_forgotten(clock: Clock) -> None:
    activity = Activity()
    train_round(clock, activity, 1000.0)
    for _ in range(module.RECENT):
        assert activity.longest_s("round") == 4002.0
        train_round(clock, activity, 1.0)
    assert activity.longest_s("round") == 6.0
