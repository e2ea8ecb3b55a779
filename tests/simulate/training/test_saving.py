"""Checkpoints that are written while training goes on; a gate stands for a slow disk."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulate.comm.virtual import VirtualCommunicator
from simulate.common.errors import RunFailedError
from simulate.common.events import Event
from simulate.config.profiles import load_profile
from simulate.config.run import Run
from simulate.training import checkpoints, loop
from simulate.training.checkpoints import BegunCheckpoint, list_checkpoints
from simulate.training.loop import Session, train
from simulate.training.saving import Saving
from simulate.training.simulated_clock import SimulatedClock
from tests import tiny

PATIENCE_S = 60.0


class Disk:
    """A disk that completes nothing while its gate is shut."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.gate, self._settle = threading.Event(), checkpoints._settle
        self.fails_at: str | None = None
        patch.setattr(checkpoints, "_settle", self.settle)

    def settle(self, path: Path) -> None:
        assert self.gate.wait(PATIENCE_S)
        if self.fails_at == path.parent.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        self._settle(path)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(monkeypatch)
    yield disk
    disk.gate.set()  # no thread may outlive a failed test


def run_of(steps: int, every: int, name: str = "lte") -> Run:
    train = {"steps": steps, "checkpoint_every": every, "evaluate_every": 100, "log_every": 1}
    return tiny.variant_run(name, train=train)


class Watched:
    """A session whose events are kept, and answered."""

    def __init__(self, run: Run, folder: Path) -> None:
        profile, communicator = load_profile("gtx1080ti_x8"), VirtualCommunicator(run.cluster.devices)
        clock = SimulatedClock(run, profile.devices(run.cluster.devices), profile.link)
        self.events, self.folder = list[Event](), folder
        method, batches = tiny.build(run), tiny.batches(run)
        self.session = Session(run, method, batches, communicator, clock, self.emit, folder, tiny.CPU)

    def emit(self, event: Event) -> None:
        self.events.append(event)
        self.at(event)

    def at(self, event: Event) -> None:
        """Do what a test wants to happen then."""

    def order(self) -> list[tuple[str, int]]:
        return [(event["kind"], event["step"]) for event in self.events if event["kind"] in ("step", "checkpoint")]

    def whole(self) -> list[str]:
        return [path.name for path in list_checkpoints(self.folder, self.session.run.cluster.devices)]


class AtOnce(Saving):
    """A checkpoint that training waits for."""

    def __init__(self, begun: BegunCheckpoint, event: Event, began_s: float) -> None:
        super().__init__(begun, event, began_s)
        self.wait()


def tensor_files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.safetensors")}


@pytest.mark.parametrize(
    "name", ["ddp", "diloco", "lte", "lte, late", "lte, nf4", "lte, columns", "lte, streaming int8"]
)
def test_training_goes_on_beside_a_checkpoint_and_changes_no_byte_of_it(
    name: str, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(run_of(8, 4, name), tmp_path / "beside")

    def at(event: Event) -> None:
        if (event["kind"], event["step"]) == ("step", 6):  # a merge and two steps after the checkpoint began
            assert not watched.whole()
            disk.gate.set()

    watched.at = at  # type: ignore[method-assign]
    assert train(watched.session)
    kinds = watched.order()
    assert kinds.index(("checkpoint", 4)) > kinds.index(("step", 6)), "reported only once it was on the disk"
    assert kinds[-1] == ("checkpoint", 8), "the end waits for the last one"
    assert watched.whole() == ["step-00000004", "step-00000008"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Saving", AtOnce)
        alone = Watched(run_of(8, 4, name), tmp_path / "alone")
        assert train(alone.session)
    assert tensor_files(watched.folder) == tensor_files(alone.folder)


def test_the_next_checkpoint_waits_for_the_one_before(disk: Disk, tmp_path: Path) -> None:
    watched, asked = Watched(run_of(9, 3), tmp_path), list[int]()
    wait = Saving.wait

    def open_late(saving: Saving) -> float:
        asked.append(watched.session.step)
        disk.gate.set()
        return wait(saving)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saving, "wait", open_late)
        assert train(watched.session)
    assert asked[0] == 6
    assert watched.order()[:7] == [*(("step", step) for step in range(1, 7)), ("checkpoint", 3)]
    saved = [event for event in watched.events if event["kind"] == "checkpoint"]
    assert [event["step"] for event in saved] == [3, 6, 9]
    assert all(0 < event["paused_s"] < PATIENCE_S for event in saved)
    assert watched.whole() == ["step-00000006", "step-00000009"], "older ones go once a newer one is whole"


def test_a_disk_that_fails_behind_training_ends_it_at_the_next_step_and_leaves_what_was_whole(
    disk: Disk, tmp_path: Path
) -> None:
    watched, disk.fails_at = Watched(run_of(9, 3), tmp_path), "step-00000006"
    disk.gate.set()

    def at(event: Event) -> None:
        saving = watched.session.saving
        if (event["kind"], event["step"]) == ("step", 7) and saving is not None:
            with pytest.raises(OSError, match="No space left"):
                saving.wait()

    watched.at = at  # type: ignore[method-assign]
    with pytest.raises(OSError, match="No space left"):
        train(watched.session)
    assert watched.session.step in (6, 7)
    assert watched.whole() == ["step-00000003"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_fails_keeps_the_checkpoint_that_is_under_way(fails: bool, disk: Disk, tmp_path: Path) -> None:
    watched, disk.fails_at = Watched(run_of(9, 3), tmp_path), "step-00000003" if fails else None

    def at(event: Event) -> None:
        if (event["kind"], event["step"]) == ("step", 5):
            disk.gate.set()
            raise RunFailedError("the loss is not finite")

    watched.at = at  # type: ignore[method-assign]
    with pytest.raises(RunFailedError, match="not finite"):
        train(watched.session)
    assert watched.whole() == ([] if fails else ["step-00000003"])
    assert (watched.order()[-1] == ("checkpoint", 3)) is not fails


def test_a_wish_to_stop_ends_with_a_whole_checkpoint(disk: Disk, tmp_path: Path) -> None:
    watched = Watched(run_of(9, 100), tmp_path)
    watched.session.stop = lambda: watched.session.step == 4
    threading.Timer(0.3, disk.gate.set).start()
    assert not train(watched.session)
    assert watched.order()[-1] == ("checkpoint", 4)
    assert watched.whole() == ["step-00000004"]
