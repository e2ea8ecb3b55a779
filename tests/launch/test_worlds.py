"""A run that goes from one world to the other and back, and from four processes to two, is the same run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Child
from tests.launch.runs import Launched, interrupt, launched_run, simulated_loss, start_node
from tests.ltecli.command import events_of, write_run

STEPS = 600
METHODS: dict[str, dict[str, Any]] = {
    "lte": {"name": "lte", "rank": 2, "merge_every": 5},
    "diloco": {"name": "diloco", "merge_every": 5},
    "ddp": {"name": "ddp"},
}


def simulate_until(folder: Path, step: int | None, *arguments: str) -> None:
    """Train in one process, interrupted after a step, or to the end."""
    command = [sys.executable, "-m", "ltecli", "train", *arguments, "--device", "cpu"]
    with (folder.parent / "simulated.txt").open("a") as said:
        process = Child(command, stdout=said, stderr=said)
    launched = Launched(folder.parent, [process], folders={0: folder})
    (folder.parent / "said0.txt").touch()
    if step is not None:
        launched.wait_for_step(step)
        interrupt(process)
    assert process.outcome().code == (0 if step is None else 130)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_simulated_launched_and_simulated_again(tmp_path: Path, name: str) -> None:
    train = {"steps": STEPS, "evaluate_every": STEPS, "dtype": "fp64"}
    run = write_run(tmp_path / "tiny.toml", method=METHODS[name], train=train, cluster={"devices": 4, "timeout_s": 60})
    folder = tmp_path / "run" / "node0"
    folder.parent.mkdir()
    simulate_until(folder, 20, str(run), "--out", str(folder))
    with launched_run(tmp_path / "run", run, processes=4, resume=True) as launched:
        launched.wait_for(lambda: launched.events("resume"))
        launched.wait_for_step(launched.events("resume")[-1]["step"] + 30)
        interrupt(launched.agents[0])
        assert launched.end() == [130], launched.all_said()
        start_node(launched, run, processes=2, resume=True)
        launched.wait_for(lambda: launched.events("resume")[-1].get("processes") == 2)
        launched.wait_for_step(launched.events("resume")[-1]["step"] + 30)
        interrupt(launched.agents[0])
        assert launched.end() == [130], launched.all_said()
        assert launched.events()[-1]["step"] < STEPS
    simulate_until(folder, None, str(folder), "--resume")
    assert launched.val_loss() == pytest.approx(simulated_loss(run, tmp_path / "alone"), rel=1e-9)
    assert [event["step"] for event in events_of(folder, "step")] == list(range(1, STEPS + 1))
