"""Launched runs of users' networks: the simulated ones, and refused where processes start from other weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.launch.runs import launched_run, simulated_loss
from tests.ltecli.command import write_run
from tests.simulate.models.test_any_network import MIXED
from tests.zoo import AT_THE_ROOT

METHODS: list[dict[str, Any]] = [{"name": "ddp"}, {"name": "lte", "rank": 2, "merge_every": 5}]


def run_of(folder: Path, parts: str, method: dict[str, Any]) -> Path:
    return write_run(
        folder / "run.toml",
        model={"name": "tests.zoo:Net", "context": 6, "vocab": 256, "parts": parts},
        method=method,
        train={"steps": 10, "evaluate_every": 10, "checkpoint_every": 10, "dtype": "fp64"},
        cluster={"devices": 4, "timeout_s": 60, "join_timeout_s": 60},
    )


@pytest.mark.slow
@pytest.mark.parametrize("parts", [MIXED, f"block,{AT_THE_ROOT}"], ids=["mixed", "whole"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_a_launched_run_is_the_simulated_one(tmp_path: Path, method: dict[str, Any], parts: str) -> None:
    run = run_of(tmp_path, parts, method)
    with launched_run(tmp_path / "run", run) as launched:
        assert launched.end() == [0], launched.all_said()
    assert launched.val_loss() == pytest.approx(simulated_loss(run, tmp_path / "alone"), rel=1e-9)


@pytest.mark.slow  # simulate/launch/test_worker.py
def test_processes_that_start_from_other_weights_are_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, "drawn by rank", METHODS[0])
    with launched_run(tmp_path / "run", run) as launched:
        assert launched.end() == [2], launched.all_said()
    assert "process 1 on node 0 starts with other weights of parts.0.weight" in launched.said()
