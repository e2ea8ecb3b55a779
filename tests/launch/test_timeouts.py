"""No exchange waits for ever: collectives, messages to and from a server, and what travels behind the training."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from simulate.launch.heartbeat import Beat, describe_missing
from tests.harness import run_together
from tests.launch.exchanges import AWAY_S, EXCHANGES, TIMEOUT_S

TITLES = ["process 0 on node 0 (device 0)", "process 1 on node 1 (device 1)", "process 2 on node 2 (device 2)"]


@pytest.mark.slow
def test_every_exchange_with_a_process_that_stays_away_ends_in_time(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.launch.exchanges", tmp_path]
    run_together([*command, process] for process in range(2))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == EXCHANGES.keys()
    for name, (error, seconds) in found.items():
        assert error is not None, f"{name} did not fail"
        assert "failed" in error and "at the start" in error, name
        assert TIMEOUT_S * 0.9 < seconds < AWAY_S, f"{name}: {seconds:.1f} s"


def test_a_silent_process_and_one_that_is_behind_are_told_apart() -> None:
    first = [Beat(5, 7, "step 10"), Beat(5, 7, "step 10"), Beat(5, 6, "step 5")]
    second = [Beat(7, 7, "step 10"), Beat(5, 7, "step 10"), Beat(8, 6, "step 5")]
    text = describe_missing(TITLES, 0, 7, first, second)
    assert text == f"silent: {TITLES[1]}; not there yet: {TITLES[2]} at step 5"


def test_where_all_are_there_nobody_is_named() -> None:
    first = [Beat(5, 7, "step 10")] * 3
    assert describe_missing(TITLES, 0, 7, first, [Beat(6, 7, "step 10")] * 3) == ""


def test_a_process_that_never_gave_a_sign_is_silent() -> None:
    signs = [Beat(5, 7, "step 10"), None, Beat(5, 7, "step 10")]
    later = [Beat(6, 7, "step 10"), Beat(1, 1, "the start"), Beat(6, 7, "step 10")]
    assert describe_missing(TITLES, 0, 7, signs, later) == f"silent: {TITLES[1]}"
