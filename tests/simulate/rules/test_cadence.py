"""When a launched run meets, evaluates and saves; counted beside a walk through all of its steps."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulate.rules.cadence import Cadence, evaluation_batch
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


def walk(cadence: Cadence) -> tuple[list[int], list[int]]:
    """Return the steps of evaluations and of checkpoints of processes that go from meeting to meeting."""
    evaluated, saved, before = [], [0], 0
    for step in range(1, cadence.steps + 1):
        last = step == cadence.steps
        if not last and (step <= cadence.late or (step - cadence.late) % cadence.apart):
            continue
        if last or step // cadence.evaluate_every > before // cadence.evaluate_every:
            evaluated.append(step)
        asked = step // cadence.checkpoint_every > before // cadence.checkpoint_every
        if last or asked or step - saved[-1] >= cadence.recover_steps:
            saved.append(step)
        before = step
    return evaluated, saved[1:]


@given(calendars())
def test_a_cadence_is_a_walk_from_meeting_to_meeting(cadence: Cadence) -> None:
    evaluated, saved = walk(cadence)
    steps = range(1, cadence.steps + 1)
    assert [step for step in steps if cadence.evaluates(step)] == evaluated
    assert [step for step in steps if cadence.saves(step)] == saved
    assert (cadence.num_evaluations, cadence.num_saves) == (len(evaluated), len(saved))
    assert [cadence.save_before(step) for step in saved] == [0, *saved[:-1]]
    gaps = {steps: times for steps, times in cadence.save_gaps.items() if times}
    assert gaps == Counter(after - before for before, after in pairwise(saved))


def test_merges_are_meetings() -> None:
    run = tiny.variant_run("lte, late", train={"steps": 30, "evaluate_every": 10, "checkpoint_every": 15})
    cadence = Cadence.of(run)
    assert [step for step in range(1, 31) if cadence.meets(step)] == [6, 10, 14, 18, 22, 26, 30]
    assert [step for step in range(1, 31) if cadence.evaluates(step)] == [10, 22, 30]
    assert cadence.num_saves == 7, "a recovery point at every merge"


@pytest.mark.parametrize("name", ["ddp", "powersgd"])
def test_a_method_that_exchanges_at_every_step_meets_at_every_tenth(name: str) -> None:
    cadence = Cadence.of(tiny.variant_run(name, train={"steps": 35}))
    assert [step for step in range(1, 36) if cadence.meets(step)] == [10, 20, 30, 35]


@pytest.mark.parametrize(
    ("micro_batch", "is_cast", "samples"), [(8, False, 8), (64, False, 16), (8, True, 4), (64, True, 8), (1, True, 1)]
)
def test_an_evaluation_has_the_room_of_a_step(micro_batch: int, is_cast: bool, samples: int) -> None:
    """Logits of half a batch in fp32 are as large as those of a whole one in half precision."""
    assert evaluation_batch(micro_batch, is_cast) == samples
