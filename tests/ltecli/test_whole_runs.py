"""Plans of whole runs: how often they save, and how long evaluations and checkpoints take."""

from __future__ import annotations

from pathlib import Path

import pytest

from ltecli.plan_request import PlanArgs, plan_request
from simulate.common import toml_io
from simulate.config.profiles import load_profile
from simulate.planning.plan_json import candidate_json
from simulate.rules.cadence import Cadence


def slow_disk(here: Path, **figures: object) -> str:
    """Write a profile whose disks are slow, or unknown."""
    profile = load_profile("gtx1080ti_x8").model_dump(exclude_none=True)
    profile["device"][0] |= {"disk_write_bytes_per_s": 1e8, **figures}
    profile["device"][0] = {key: value for key, value in profile["device"][0].items() if value is not None}
    (here / "slow.toml").write_text(toml_io.dump(profile))
    return str(here / "slow.toml")


def test_recovery_points_are_spaced_to_a_share_of_the_time(tmp_path: Path) -> None:
    plan = plan_request(PlanArgs(profile=slow_disk(tmp_path), model="gpt2", pins={"name": "lte", "merge_every": 10}))
    assert plan.chosen is not None
    run, eval_and_save = plan.chosen.run, plan.chosen.eval_and_save
    assert run.cluster.recover_every > 1
    assert run.train.checkpoint_every % (10 * run.cluster.recover_every) == 0
    assert eval_and_save.cadence == Cadence.of(run)
    assert eval_and_save.save_s is not None
    assert 0.02 < eval_and_save.saves * eval_and_save.save_s / plan.chosen.wall_s <= 0.05
    (note,) = [note for note in plan.notes if "cluster.recover_every" in note]
    assert f"with cluster.recover_every = {run.cluster.recover_every} checkpoints of" in note
    assert f"up to {10 * run.cluster.recover_every:,} steps" in note


def test_recovery_points_that_are_asked_for_stay(tmp_path: Path) -> None:
    request = PlanArgs(
        profile=slow_disk(tmp_path), model="gpt2", pins={"name": "lte", "merge_every": 10},
        assignments=("cluster.recover_every=1", "train.checkpoint_every=700"),
    )  # fmt: skip
    plan = plan_request(request)
    assert plan.chosen is not None
    run, eval_and_save = plan.chosen.run, plan.chosen.eval_and_save
    assert (run.cluster.recover_every, run.train.checkpoint_every) == (1, 700)
    assert eval_and_save.saves == -(-run.train.steps // 10)
    (note,) = [note for note in plan.notes if "recovery point after every 10 steps takes" in note]
    assert f"--set cluster.recover_every={eval_and_save.affordable_recovery(plan.chosen.step_s)}" in note


def test_a_disk_that_is_not_known_is_said(tmp_path: Path) -> None:
    plan = plan_request(PlanArgs(profile=slow_disk(tmp_path, disk_write_bytes_per_s=None), model="gpt2"))
    assert plan.chosen is not None
    assert plan.chosen.run.cluster.recover_every == 1
    assert candidate_json(plan.chosen)["checkpoint_s"] is None
    assert any("no device.disk_write_bytes_per_s: checkpoints are planned to take no time" in n for n in plan.notes)


def test_a_whole_run_is_its_rounds_evaluations_and_checkpoints() -> None:
    plan = plan_request(PlanArgs(profile="gtx1080ti_x8", model="gpt2", pins={"name": "lte"}))
    assert plan.chosen is not None
    figures = candidate_json(plan.chosen)
    pauses_s = figures["evaluations"] * figures["evaluation_s"] + figures["checkpoint_waits_s"]
    assert figures["wall_s"] == pytest.approx(figures["training_s"] + pauses_s)
    rounds_s = figures["round_s"] * figures["steps"] / figures["merge_every"]
    assert figures["training_s"] == pytest.approx(rounds_s, rel=1e-3)
