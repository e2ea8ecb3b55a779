"""The status file of a run: what events, phases and heartbeats leave in it, and how it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ltecli.runs import status as module
from ltecli.runs.status import StatusFile, read_status
from simulate.common.errors import InputError, RunFailedError
from simulate.config.run import load_run
from simulate.launch.heartbeat import LaunchProgress, ProcessState
from simulate.training.activity import Activity
from tests.harness import wait_until
from tests.ltecli.command import write_run


class Folder:
    """A folder with a tiny run of eight steps, whose status the test writes."""

    def __init__(self, path: Path) -> None:
        self.path, self.run, self.warnings = path, load_run(write_run(path / "run.toml")), list[str]()

    def status(self, step: int = 0) -> StatusFile:
        """Return a writer for a session that begins at a step."""
        return StatusFile(self.path, self.run, step, self.warnings.append, " --launch", lambda: "go on")

    def read(self) -> dict[str, Any]:
        """Return what is in the file."""
        document = read_status(self.path)
        assert document is not None
        return document


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A folder without a status."""
    return Folder(tmp_path)


def step(number: int, loss: float = 3.0, wall_s: float = 10.0) -> dict[str, Any]:
    """Return a step's event, with 100 bytes a step and half of its seconds simulated."""
    figures = {"sent_bytes": 100 * number, "simulated_s": wall_s / 2, "wall_s": wall_s}
    return {"kind": "step", "step": number, "train_loss": loss, **figures}


def test_events_are_folded(folder: Folder) -> None:
    with folder.status() as status:
        assert folder.read()["state"] == "running"
        status({"kind": "start", "step": 0, "processes": 2, "device": "cpu"})
        status(step(4))
        status({"kind": "evaluate", "step": 4, "val_loss": 3.5})
        status(step(6, loss=2.5))
        status({"kind": "end", "step": 8})
    document = folder.read()
    assert (document["state"], document["step"], document["train_loss"]) == ("finished", 8, 2.5)
    assert (document["val_loss"], document["val_step"]) == (3.5, 4)
    # 600 bytes of two devices in 10 s of a launched run.
    assert (document["sent_bytes_per_device"], document["sent_bytes_per_s_per_device"]) == (300.0, 30.0)
    assert (document["steps_per_round"], document["resume_words"]) == (3, " --launch")


def test_simulated_devices_send_at_the_rate_of_their_hardware(folder: Folder) -> None:
    with folder.status() as status:
        status({"kind": "start", "step": 0, "simulated_on": "cpu"})
        status(step(6))
    assert folder.read()["sent_bytes_per_s_per_device"] == 60.0


def test_progress_moves_between_events_and_falls_at_a_restart(folder: Folder) -> None:
    states = (ProcessState("process 0", "training", 5, 0.0, ()), ProcessState("process 1", "exchanging", 6, 0.0, (0,)))
    with folder.status() as status:
        status({"kind": "start", "step": 0, "processes": 2})
        status.progress(LaunchProgress("training", 5, "finishing", False, states))
        assert status.document["step"] == 5
        status(step(4))  # an event that was on its way while the heartbeat came
        assert status.document["step"] == 5
        assert status.document["workers"][1]["waits_for"] == (0,)
        status({"kind": "evaluate", "step": 4, "val_loss": 3.5})
        status({"kind": "restart", "step": 3, "processes": 2, "reasons": ["process 1 was killed"]})
        assert (status.document["step"], status.document["val_loss"]) == (3, None)
        status.progress(LaunchProgress("restarting"))  # before its first heartbeat the run has no step
        assert (status.document["phase"], status.document["step"]) == ("restarting", 3)
    document = folder.read()
    assert (document["restarts"], document["restart_reasons"]) == (1, ["process 1 was killed"])


def test_a_resumed_run_keeps_the_figures_of_its_checkpoint(folder: Folder) -> None:
    with folder.status() as status:
        status(step(6))
        status({"kind": "evaluate", "step": 4, "val_loss": 3.5})
    with folder.status(step=6) as status:
        assert (folder.read()["step"], folder.read()["val_loss"], folder.read()["train_loss"]) == (6, 3.5, 3.0)
    with folder.status(step=3):  # the evaluation is of a step that is done again
        assert (folder.read()["step"], folder.read()["val_loss"]) == (3, None)
    with folder.status():
        assert folder.read()["train_loss"] is None


@pytest.mark.parametrize(
    ("error", "state", "text"),
    [
        (KeyboardInterrupt(), "interrupted", None),
        (RunFailedError("no loss"), "failed", "no loss"),
        (None, "finished", None),
    ],
)
def test_the_end_is_told(folder: Folder, error: BaseException | None, state: str, text: str | None) -> None:
    try:
        with folder.status(step=8):
            if error is not None:
                raise error
    except (KeyboardInterrupt, RunFailedError):
        pass
    assert (folder.read()["state"], folder.read()["error"]) == (state, text)


def test_a_run_that_is_refused_leaves_the_status_as_it_was(folder: Folder) -> None:
    with pytest.raises(InputError), folder.status():
        raise InputError("damaged")
    assert not (folder.path / "status.json").exists()
    with folder.status(step=8):
        pass
    before = (folder.path / "status.json").read_bytes()
    with pytest.raises(InputError), folder.status(step=8):
        raise InputError("damaged")
    assert (folder.path / "status.json").read_bytes() == before
    with pytest.raises(InputError), folder.status(step=8) as status:
        status({"kind": "resume", "step": 8})
        raise InputError("a process found other weights")
    assert folder.read()["state"] == "failed"


def test_the_phase_and_the_pace_come_from_the_training_loop(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WRITE_S", 0.02)
    activity = Activity()
    with folder.status() as status:
        status.follow(activity, lambda: "finishing this step")
        activity.begin("training")
        for activity.step in (1, 2, 3):
            wait_until(lambda: folder.read()["step"] == activity.step, 10.0)
        activity.begin("saving")
        wait_until(lambda: folder.read()["phase"] == "saving", 10.0)
        document = folder.read()
        assert document["step_s"] > 0
        assert document["remaining_s"] == pytest.approx(5 * document["step_s"])
        hints: list[str] = []
        status.answer_stop(hints.append)
        assert hints == ["finishing this step; Ctrl-C again: stop now"]
        assert "finishing this step" in status.document["stopping"]


def test_a_disk_that_takes_no_status_ends_no_run(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "WRITE_S", 0.01)
    with monkeypatch.context() as full:
        full.setattr(module.os, "replace", refuse)
        with folder.status():
            wait_until(lambda: folder.warnings, 10.0)
    (warning,) = folder.warnings
    assert "No space left on device" in warning
    assert read_status(folder.path) is None


@pytest.mark.parametrize("content", ["", '{"version": 1, "sta', "[]", '{"version": 99}'])
def test_a_status_that_cannot_be_read_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "status.json").write_text(content)
    assert read_status(tmp_path) is None
