"""Decide after which steps the devices of a launched run meet, evaluate and save.

Devices agree on one model only at a merge, so they evaluate and save there; methods without merges meet every tenth
step. The training loop asks step by step; plans and the simulated clock count with it, so that all agree to the step.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache

from simulate.config.run import Run

MEETING_STEPS = 10
"""Steps from one meeting to the next for methods that exchange at every step and have no merges."""


@dataclass(frozen=True)
class Cadence:
    """The steps after which a run's devices meet, evaluate and save, counted from 1."""

    steps: int
    """Steps of the whole run; all devices meet after the last one."""
    apart: int
    """Steps from one meeting to the next."""
    late: int
    """Steps of a meeting after its multiple of `apart`: a delayed merge arrives so much later."""
    evaluate_every: int
    checkpoint_every: int
    recover_steps: int
    """Steps from one recovery point to the next; a multiple of `apart`."""

    @classmethod
    def of(cls, run: Run) -> Cadence:
        """Return the cadence of a launched run, which saves its recovery points at meetings."""
        train, cluster, apart = run.train, run.cluster, run.method.steps_apart
        apart = MEETING_STEPS if apart == 1 else apart
        return _cadence(
            train.steps, apart, run.method.late_steps, train.evaluate_every, train.checkpoint_every,
            apart * cluster.recover_every,
        )  # fmt: skip

    def meets(self, step: int) -> bool:
        """Whether the devices meet after a step."""
        # A delayed merge arrives `late` steps after its multiple of `apart`, so none does in the first `late` steps.
        return step == self.steps or (step % self.apart == self.late % self.apart and step > self.late)

    def is_due(self, step: int, every: int) -> bool:
        """Whether a multiple of `every` has passed since the meeting before a step."""
        before = max(0, (step - 1 - self.late) // self.apart * self.apart + self.late)
        return step // every > before // every

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation follows a step."""
        return step == self.steps or (self.meets(step) and self.is_due(step, self.evaluate_every))

    def saves(self, step: int) -> bool:
        """Whether a checkpoint follows a step: as often as the run says, and at recovery points in between."""
        if step == self.steps:
            return True
        if not self.meets(step):
            return False
        # The last checkpoint that train.checkpoint_every asks for; recovery points are counted from there on.
        asked = self._meeting_of(step // self.checkpoint_every * self.checkpoint_every)
        return (step - max(asked, self.late)) % self.recover_steps == 0

    def _meeting_of(self, step: int) -> int:
        """Return the first meeting that is not before a step; 0 for the start."""
        return 0 if step <= 0 else max(1, -(-(step - self.late) // self.apart)) * self.apart + self.late

    def save_before(self, step: int) -> int:
        """Return the last step before `step` after which a checkpoint is saved; 0 where none is."""
        meeting = (step - 1 - self.late) // self.apart * self.apart + self.late
        while meeting > self.late and not self.saves(meeting):
            meeting -= self.apart
        return meeting if meeting > self.late else 0

    @cached_property
    def save_gaps(self) -> dict[int, int]:
        """The steps from each checkpoint to the next, and how often each distance occurs."""
        gaps = Counter[int]()
        if self.checkpoint_every <= self.apart:
            gaps[self.apart] = max(0, self.num_saves - 2)
            if self.num_saves > 1:
                gaps[self.steps - self.save_before(self.steps)] += 1
            return dict(gaps)
        for start, end in self._asked_spans:
            first = max(start, self.late)
            points = max(0, -(-(end - first) // self.recover_steps) - 1)
            # The start of the run saves nothing, so no distance begins there.
            gaps[self.recover_steps] += points if start else max(0, points - 1)
            if start or points:
                gaps[end - first - points * self.recover_steps] += 1
        return dict(gaps)

    @cached_property
    def _asked_spans(self) -> list[tuple[int, int]]:
        """The steps from each checkpoint that the run asks for, or its start, to the next, or its end."""
        late, apart = self.late, self.apart
        # _meeting_of of each multiple, written out: a plan asks for thousands of candidates.
        multiples = range(self.checkpoint_every, self.steps, self.checkpoint_every)
        meetings = [max(1, -(-(step - late) // apart)) * apart + late for step in multiples]
        asked = [0, *sorted({meeting for meeting in meetings if meeting < self.steps})]
        return list(zip(asked, [*asked[1:], self.steps], strict=True))

    @cached_property
    def num_evaluations(self) -> int:
        """Evaluations of the whole run."""
        # At most one evaluation a meeting, and at most one for each multiple of evaluate_every.
        last = (self.steps - 1 - self.late) // self.apart * self.apart + self.late  # before the end
        before = 0 if last <= 0 else min((last - self.late) // self.apart, last // self.evaluate_every)
        return before + 1

    @cached_property
    def num_saves(self) -> int:
        """Checkpoints of the whole run."""
        if self.checkpoint_every <= self.apart:  # every meeting has one
            return max(0, (self.steps - 1 - self.late) // self.apart) + 1
        # Between two checkpoints that were asked for, recovery points follow the first of them at equal distances. Each
        # span counts its end: the start of the run saves nothing, and its end does.
        saves = 0
        for start, end in self._asked_spans:  # thousands of candidates ask
            saves += max(1, -(-(end - max(start, self.late)) // self.recover_steps))
        return saves


@lru_cache(maxsize=256)
def _cadence(*figures: int) -> Cadence:
    """Return one object for all runs of the same figures, so that its cached counts are computed once."""
    return Cadence(*figures)


EVALUATION_BATCH = 16
"""Most samples in one forward pass of an evaluation."""


def evaluation_samples(run: Run) -> int:
    """Return the samples of one forward pass of a run's evaluations: equally many in all processes."""
    if not run.cluster.classes:  # thousands of candidates have none
        return evaluation_batch(run.train.micro_batch, run.train.autocast != "none")
    return min(evaluation_batch(one.train.micro_batch, one.train.autocast != "none") for one in run.classes)


def evaluation_batch(micro_batch: int, is_cast: bool) -> int:
    """Return the samples of one forward pass of an evaluation: what fits a step fits here.

    Evaluations run without autocast, so their logits take twice the room of those of a step that is cast to half
    precision. Half the samples fit that room; more would have an allocator take new room beside it.
    """
    samples = min(micro_batch, EVALUATION_BATCH)
    return max(1, samples // 2) if is_cast else samples
