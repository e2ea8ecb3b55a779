"""The event with one device's measured memory: measured before a simulation begins, or while it trains.

`lte train` opens it around a run. Small programs are measured at once, in this process. A large one is measured in a
process beside the run (simulate.measure.beside), where the machine has the memory for both, and the event follows when
it is there; a run that ends earlier waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ltecli.commands.simulation_fits import fits_beside
from ltecli.runs.figures import tensor_bytes
from ltecli.runs.run_folder import RunFolder
from ltecli.runs.summary import measured_memory_bytes, of_one_device, shown_class
from simulate.common.events import read_events
from simulate.measure.beside import MemoryBeside, is_large

if TYPE_CHECKING:
    import torch


class MemoryEvent:
    """The event of a run that has none yet."""

    def __init__(self, folder: RunFolder, device: torch.device, processes: int, warn: Callable[[str], None]) -> None:
        self._folder, self._device, self._warn = folder, device, warn
        self._beside: MemoryBeside | None = None
        self._measured_bytes: int | None = None
        self._is_due = folder.resume_from is None or not _has_event(folder)
        if self._is_due and _is_measured_beside(folder, device, processes):
            self._beside = MemoryBeside(folder.path, shown_class(folder))
        elif self._is_due:
            self._measured_bytes = measured_memory_bytes(folder, device)

    def take(self, step: int, waits: bool = False) -> dict[str, Any] | None:
        """Return the event at a step, once, when it is measured or where this `waits` for it."""
        if not self._is_due or not (waits or self._beside is None or self._beside.is_done):
            return None
        self._is_due = False
        if self._beside is not None:
            try:
                self._measured_bytes = of_one_device(self._folder, self._device, self._beside.measured_bytes())
            except RuntimeError as error:  # the run itself goes on
                self._warn(f"one device's memory could not be measured beside the run: {error}")
        return {"kind": "memory", "step": step, "measured_bytes": self._measured_bytes}

    def close(self) -> None:
        """End a measurement that is still under way."""
        if self._beside is not None:
            self._beside.close()


@contextmanager
def memory_event(
    folder: RunFolder, device: torch.device, processes: int, warn: Callable[[str], None]
) -> Iterator[MemoryEvent]:
    """Measure a run's memory, before or beside it; a run that was interrupted measures when it is resumed."""
    event = MemoryEvent(folder, device, processes, warn)
    try:
        yield event
    finally:
        event.close()


def _has_event(folder: RunFolder) -> bool:
    return folder.events.exists() and any(event["kind"] == "memory" for event in read_events(folder.events))


def _is_measured_beside(folder: RunFolder, device: torch.device, processes: int) -> bool:
    """Whether a process beside the run pays and fits; networks that are objects exist in this process alone."""
    run, chosen = folder.run, folder.plan["chosen"]
    one_bytes = tensor_bytes(chosen) + sum(chosen["host_memory_by_part"].values())
    return device.type == "cpu" and not run.live_keys and is_large(run) and fits_beside(run, processes, one_bytes)
