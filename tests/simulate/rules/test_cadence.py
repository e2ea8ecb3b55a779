"""When a launched run meets, evaluates and saves; counted beside a walk through all of its steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulate.rules.cadence import Cadence
from tests import tiny


@st.composite
def calendars(draw: st.DrawFn) -> Cadence:
    apart = draw(st.sampled_from([1, 2, 4, 10, 30]))
    return Cadence(
        steps=draw(st.integers(1, 300)),
        apart=apart,
        late=draw(st.integers(0, apart - 1)),
        evaluate_every=draw(st.integers(1, 120)),
        checkpoint_every=draw(st.integers(1, 200)),
        recover_steps=apart * draw(st.integers(1, 4)),
    )


def walk(calendar: Cadence) -> tuple[list[int], list[int]]:
    """Return the steps of evaluations and of checkpoints of processes that go from meeting to meeting."""
    evaluated, saved, before = [], [0], 0
    for step in range(1, calendar.steps + 1):
        last = step == calendar.steps
        if not last and (step <= calendar.late or (step - calendar.late) % calendar.apart):
            continue
        if last or step // calendar.evaluate_every > before // calendar.evaluate_every:
            evaluated.append(step)
        asked = step // calendar.checkpoint_every > before // calendar.checkpoint_every
        if last or asked or step - saved[-1] >= calendar.recover_steps:
            saved.append(step)
        before = step
    return evaluated, saved[1:]


@given(calendars())
def test_a_calendar_is_a_walk_from_meeting_to_meeting(calendar: Cadence) -> None:
    evaluated, saved = walk(calendar)
    steps = range(1, calendar.steps + 1)
    assert [step for step in steps if calendar.evaluates(step)] == evaluated
    assert [step for step in steps if calendar.saves(step)] == saved
    assert (calendar.num_evaluations, calendar.num_saves) == (len(evaluated), len(saved))


def test_merges_are_meetings() -> None:
    run = tiny.variant_run("lte, late", train={"steps": 30, "evaluate_every": 10, "checkpoint_every": 15})
    calendar = Cadence.of(run)
    assert [step for step in range(1, 31) if calendar.meets(step)] == [6, 10, 14, 18, 22, 26, 30]
    assert [step for step in range(1, 31) if calendar.evaluates(step)] == [10, 22, 30]
    assert calendar.num_saves == 7, "a recovery point at every merge"


@pytest.mark.parametrize("name", ["ddp", "powersgd"])
def test_a_method_that_exchanges_at_every_step_meets_at_every_tenth(name: str) -> None:
    calendar = Cadence.of(tiny.variant_run(name, train={"steps": 35}))
    assert [step for step in range(1, 36) if calendar.meets(step)] == [10, 20, 30, 35]
