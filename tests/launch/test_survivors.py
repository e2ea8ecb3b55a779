"""Processes of a run with a quorum are lost: the others go on within a second or so, and who comes back joins them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.launch.runs import LOSS_TOLERANCE, launched_run, simulated_loss, tiny_run


def quorum_run(folder: Path, steps: int = 400, method: dict[str, object] | None = None, **cluster: object) -> Path:
    """Write a tiny run of four devices that goes on with two."""
    options = {"merge_every": 5, **(method or {"name": "lte", "rank": 2, "reset": "b"})}
    return tiny_run(folder, steps=steps, method=options, **{"quorum": 2, "deadline_s": 5.0, **cluster})


def test_the_others_go_on_without_a_killed_process_and_take_it_back(tmp_path: Path) -> None:
    run = quorum_run(tmp_path, 2000)
    with launched_run(tmp_path / "run", run, processes=4) as launched:
        launched.wait_for_step(20)
        before = {worker.pid for worker in launched.workers()}
        lost = launched.workers()[1]
        lost.kill()
        killed_s, step = time.time(), launched.events("step")[-1]["step"]
        launched.wait_for(lambda: launched.events("step")[-1]["step"] > step + 10)
        print("seconds to the next steps", time.time() - killed_s)
        assert before - {lost.pid} <= {worker.pid for worker in launched.workers()}
        launched.wait_for(lambda: launched.events("joined"))
        assert launched.end() == [0], launched.all_said()
    (left,) = launched.events("left")
    (joined,) = launched.events("joined")
    print(left, joined, launched.said())
    assert [event["step"] for event in launched.events("step")] == list(range(1, 2001))
    assert launched.val_loss() == pytest.approx(simulated_loss(run, tmp_path / "alone"), rel=LOSS_TOLERANCE)
