"""The present activity of a training process, and how long its rounds, evaluations and checkpoints took.

The loop enters phases. Threads of the same process read them: the heartbeat of a launched run, the writer of a run's
status file, and the answer to Ctrl-C, which says how long the rest takes.
"""

from __future__ import annotations

import time
from typing import Literal

from simulate.common.units import seconds_text

Phase = Literal[
    "starting", "loading data", "measuring", "joining", "building the network", "looking for checkpoints",
    "training", "exchanging", "diagnosing", "evaluating", "saving",
]  # fmt: skip
RECENT = 32
"""Measurements of a kind that are kept: a slow start is forgotten after so many."""
PAUSES: tuple[Phase, ...] = ("evaluating", "saving")
"""Phases between two rounds."""


class Activity:
    """The phase of this process, and recent seconds of its rounds and pauses. Other threads may read at any time."""

    def __init__(self) -> None:
        self.phase: Phase = "starting"
        self.step = 0
        """Steps done."""
        self._since_s = time.monotonic()
        self._round: tuple[float, int] | None = None
        """Start of the round under way, and the steps done then; None between rounds."""
        # A tuple is replaced as a whole, so that a reader in another thread needs no lock.
        self._recent_s: dict[str, tuple[float, ...]] = {}

    def begin(self, phase: Phase) -> None:
        """Enter a phase, which ends the one before."""
        now_s = time.monotonic()
        if self.phase in PAUSES:
            self.keep(self.phase, now_s - self._since_s)
        if phase == "training" and self._round is None:
            self._round = now_s, self.step
        self.phase, self._since_s = phase, now_s

    def end_round(self) -> None:
        """Keep the seconds of the round, whose devices have just met."""
        if self._round is not None:
            self.keep("round", time.monotonic() - self._round[0])
            self._round = None

    def keep(self, kind: str, seconds: float) -> None:
        """Keep the seconds of one round, evaluation or checkpoint."""
        self._recent_s[kind] = (*self._recent_s.get(kind, ())[1 - RECENT :], seconds)

    def longest_s(self, kind: str) -> float | None:
        """Return the longest recent seconds of a kind, None before the first."""
        return max(self._recent_s.get(kind, ()), default=None)

    def stopping_text(self, meeting: int, is_evaluated: bool, delay_s: float, name: str) -> str:
        """Return in words what is still done after a wish to stop, and how long it takes at most.

        `meeting` is the step of the next meeting, after which the run is saved; `delay_s` are the seconds that the wish
        takes to arrive, and `name` is what leads to the meeting: "the round".
        """
        parts = {name: self._round_left_s(meeting, delay_s)}
        if is_evaluated:
            parts["an evaluation"] = self.longest_s("evaluating")
        parts["a checkpoint"] = self.longest_s("saving")
        measured = [seconds for seconds in parts.values() if seconds is not None]
        unknown = [part for part, seconds in parts.items() if seconds is None]
        *first, last = parts
        what = f"finishing {', '.join(first)} and {last}"
        if not measured:
            return f"{what}; how long this takes is not known yet"
        # Until one round is complete, the steps so far are all that is known.
        bound = "at most" if self.longest_s("round") is not None else "about"
        # Whole seconds, rounded up.
        text = f"{what}, {bound} {seconds_text(float(max(1, -int(-sum(measured) // 1))))}"
        return text + (f"; how long {' and '.join(unknown)} takes is not known yet" if unknown else "")

    def _round_left_s(self, meeting: int, delay_s: float) -> float | None:
        """Return the seconds until a wish to stop made now is obeyed; None while nothing was measured."""
        now_s, began, whole_s = time.monotonic(), self._round, self.longest_s("round")
        if began is not None and whole_s is None and self.step > began[1]:
            whole_s = (now_s - began[0]) / (self.step - began[1]) * (meeting - began[1])
        if whole_s is None:
            return None
        if began is None:  # the meeting's wish was asked before: one more round follows
            return whole_s + max(0.0, (self.longest_s(self.phase) or 0.0) - (now_s - self._since_s))
        left_s = whole_s - (now_s - began[0])
        # A wish that comes too late for this meeting is heard at the next.
        return left_s if left_s > delay_s else max(0.0, left_s) + whole_s
