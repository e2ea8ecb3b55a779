"""Run folders: how much room their checkpoints take, and how the file they come from is kept."""

from __future__ import annotations

import os
import signal
import socket
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from ltecli.runs import run_folder
from ltecli.runs.lock import lock_folder
from ltecli.runs.run_folder import plan_of, stop_on_signal
from simulate.common.errors import InputError
from simulate.config.profiles import load_profile
from simulate.config.run import load_run
from simulate.costs.memory import checkpoint_bytes
from simulate.rules.cadence import Cadence
from tests.harness import wait_until
from tests.ltecli.command import Lte, write_run


@pytest.mark.parametrize(
    "method",
    [
        {"name": "lte", "rank": 4, "heads_per_device": 2},
        {"name": "lte", "rank": 8, "reset": "b", "merge_transport": "reduce"},
        {"name": "ddp"},
    ],
)
def test_the_room_for_a_checkpoint_is_known_before(lte: Lte, here: Path, method: dict[str, Any]) -> None:
    run = write_run(here / "run.toml", method=method, model={"layers": 2, "width": 32}, train={"steps": 3})
    lte("train", run, "--out", "a", "--quiet")
    saved_bytes = sum(file.stat().st_size for file in (here / "a" / "checkpoints").rglob("*.safetensors"))
    loaded = load_run(run)
    assert saved_bytes == pytest.approx(checkpoint_bytes(loaded, loaded.model.shape(), loaded.cluster.devices), rel=0.1)


def test_the_room_within_a_round_counts_what_merges_drop(lte: Lte, here: Path) -> None:
    method = {"name": "local-sgd", "merge_every": 4, "merge_optimizer": "reset"}
    run = write_run(here / "run.toml", method=method, train={"steps": 5, "checkpoint_every": 3})
    lte("train", run, "--out", "a", "--quiet")
    saved_bytes = sum(file.stat().st_size for file in (here / "a/checkpoints/step-00000003").rglob("*.safetensors"))
    loaded = load_run(run)
    needed = checkpoint_bytes(loaded, loaded.model.shape(), loaded.cluster.devices, in_a_round=True)
    assert saved_bytes == pytest.approx(needed, rel=0.1)


def test_the_plan_of_a_run_is_of_exactly_that_run(here: Path) -> None:
    profile = load_profile("raspberry_x8")  # whose disks are slow
    run = load_run(write_run(here / "run.toml", train={"steps": 40, "checkpoint_every": 20}, method={"merge_every": 5}))
    plan = plan_of(run, profile)
    assert run.cluster.recover_every == 1
    assert plan["chosen"]["checkpoints"] == Cadence.of(run).num_saves == 8
    assert plan["dense"]["checkpoints"] <= 4


def test_written_files_follow_the_umask(lte: Lte, here: Path, run_toml: Path) -> None:
    before = os.umask(0o027)
    try:
        lte("train", run_toml, "--out", "a", "--quiet")
    finally:
        os.umask(before)
    files = [path for path in (here / "a").rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


def test_a_run_folder_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    with lock_folder(tmp_path), pytest.raises(InputError, match="another process"), lock_folder(tmp_path):
        pass
    with lock_folder(tmp_path):
        pass


def test_the_first_signal_is_answered_and_the_second_interrupts() -> None:
    answers: list[int] = []
    with (
        pytest.raises(KeyboardInterrupt),
        stop_on_signal(lambda: answers.append(1), lambda: answers.append(2), []) as stops,
    ):
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: answers == [1] and stops == [True], 10.0)
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: False, 10.0)
    assert (answers, stops) == ([1], [True, True])


def test_a_second_signal_ends_a_process_that_is_inside_a_long_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "STUCK_S", 0.01)
    said: list[str] = []
    for is_interrupted, expected in ((False, ["answer", "leave"]), (True, ["answer"])):
        heard, told = socket.socketpair()
        told.sendall(bytes([signal.SIGINT, signal.SIGINT, signal.SIGTERM]))
        told.close()
        interrupted = threading.Event()
        if is_interrupted:
            interrupted.set()
        said.clear()
        run_folder._answer_signals(heard, lambda: said.append("answer"), lambda: said.append("leave"), interrupted)
        assert said == expected
