"""A launched run is watched: it moves within its rounds, and answers a wish to stop at once."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from ltecli.runs.status import read_status
from tests.launch.runs import interrupt, launched_run
from tests.ltecli.command import lte_process, write_run


@pytest.mark.slow
def test_a_launched_run_is_watched(tmp_path: Path) -> None:
    # One round that never ends: there is no event of a step, so what moves comes from the heartbeats.
    steps = 200_000
    run = write_run(
        tmp_path / "long.toml", method={"merge_every": steps, "rank": 2, "name": "lte"},
        train={"steps": steps, "evaluate_every": steps, "checkpoint_every": steps}, cluster={"devices": 4},
    )  # fmt: skip
    with launched_run(tmp_path / "run", run) as launched:
        folder = launched.node_folder()
        watched = tmp_path / "watched.txt"
        with watched.open("w") as file:
            watch = lte_process("watch", folder, cwd=tmp_path, stdout=file)

        def status() -> dict[str, Any]:
            return read_status(folder) or {"step": 0, "workers": [], "stopping": None}

        def are_training() -> bool:
            return len(status()["workers"]) == 2 and all(worker["step"] > 0 for worker in status()["workers"])

        launched.wait_for(are_training)
        before = status()["step"]
        launched.wait_for(lambda: status()["step"] > before, 10.0)
        assert launched.events("step") == []
        asked_s = time.monotonic()
        interrupt(launched.agents[0], signal.SIGTERM)
        launched.wait_for(lambda: "Ctrl-C again: stop now" in launched.said(), 5.0)
        assert re.search(r"finishing the round, an evaluation and a checkpoint, about [\d.]+ \w+", launched.said())
        launched.wait_for(lambda: status()["stopping"] is not None, 5.0)
        interrupt(launched.agents[0])
        assert launched.end() == [130], launched.all_said()
        print(f"answered and stopped within {time.monotonic() - asked_s:.1f} s")
        assert status()["state"] == "interrupted"
        launched.wait_for(lambda: ": interrupted, " in watched.read_text(), 10.0)
        interrupt(watch)  # which waits for the run to be continued
        outcome = watch.outcome()
    assert outcome.code == 0, outcome
    heads = [line.partition(": ")[2].partition(",")[0] for line in watched.read_text().splitlines()]
    assert "round 1 of 1" in heads
    assert heads[-1] == "interrupted"
    assert len(heads) < 20, "a change is a line, a step is none"
