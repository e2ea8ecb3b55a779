"""Diagnostics from the command line: asked for, seen in the events, the report and TensorBoard, and without a trace."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ltecli.app import main
from simulate.config.run import load_run
from tests.ltecli.command import Lte, Refused, assert_one_line, copy_run, events_of, write_run

ROWS = (
    "cosine between heads", "Grassmann distance between heads", "effective rank of the merge",
    "share in the first directions", "drift of a device, mean", "drift of a device, largest",
)  # fmt: skip


@pytest.fixture(scope="module")
def diagnosed_once(trained_once: Path) -> Path:
    """The folder of the run below, for copies."""
    out = trained_once / "looked"
    assert main(["train", str(trained_once / "tiny.toml"), "--out", str(out), "--diagnostics", "--quiet"]) == 0
    return out


@pytest.fixture
def diagnosed(diagnosed_once: Path, run_toml: Path, here: Path) -> Path:
    """The tiny run, with diagnostics at each of its evaluations but the last, which comes early."""
    return copy_run(diagnosed_once, here)


def test_diagnostics_come_at_the_first_merge_from_there_on(diagnosed: Path) -> None:
    assert load_run(diagnosed / "run.toml").train.diagnostics_every == 4
    assert [event["step"] for event in events_of(diagnosed, "diagnostics")] == [6, 8]


def test_training_is_the_same_to_the_bit(diagnosed: Path, trained: Path) -> None:
    for kind, key in (("step", "device_losses"), ("evaluate", "val_loss")):
        ours, theirs = ([event[key] for event in events_of(run, kind)] for run in (diagnosed, trained))
        assert ours == theirs


def test_the_clock_counts_what_checkpoints_save_for_diagnostics(diagnosed: Path, trained: Path) -> None:
    ours, theirs = ([event["simulated_s"] for event in events_of(run, "step")] for run in (diagnosed, trained))
    saved = events_of(trained, "checkpoint")[0]["step"]
    assert ours[:saved] == theirs[:saved]
    assert ours[saved] > theirs[saved]


def test_nobody_diagnoses_unasked(lte: Lte, run_toml: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulate.training.loop.Diagnostics", None)
    assert lte("train", run_toml, "--out", "a", "--quiet").code == 0
    assert lte("report", "a", "--json").json()["diagnostics"] == []
    assert "diagnostics" not in lte("report", "a").stdout


def test_a_report_shows_the_first_the_last_and_the_way_between(lte: Lte, diagnosed: Path) -> None:
    text = lte("report", diagnosed).stdout
    for words in ("diagnostics, 2x", "step 6", "step 8", "least", "most", *ROWS):
        assert words in text


def test_json_has_every_event_whole(lte: Lte, diagnosed: Path) -> None:
    points = lte("report", diagnosed, "--json").json()["diagnostics"]
    assert [point["step"] for point in points] == [6, 8]
    for point, event in zip(points, events_of(diagnosed, "diagnostics"), strict=True):
        assert {"kind": "diagnostics", "version": 1, **point} == event
        assert point.keys() >= {"cosine", "grassmann_rad", "effective_rank", "stable_rank", "drift_max"}


def test_several_runs_show_their_last_figures(lte: Lte, diagnosed: Path, trained: Path) -> None:
    text = lte("report", diagnosed, trained).stdout
    row = next(line for line in text.splitlines() if line.startswith("last effective rank of the merge"))
    assert row.split()[-1] == "-" and float(row.split()[-2]) >= 1
    assert "last effective rank" not in lte("report", trained, trained).stdout


def test_tensorboard_has_the_figures(diagnosed: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(diagnosed / "tensorboard"))
    accumulator.Reload()
    points = accumulator.Scalars("diagnostics/stable_rank")
    assert [point.step for point in points] == [6, 8]


@pytest.mark.parametrize("method", [{"name": "lte", "rank": 2}, {"name": "local-sgd"}])
def test_a_resumed_run_goes_on_with_the_same_figures(lte: Lte, here: Path, method: dict[str, object]) -> None:
    train = {"diagnostics_every": 3, "checkpoint_every": 4}
    run = write_run(here / "run.toml", method={**method, "merge_every": 3}, train=train)
    assert lte("train", run, "--out", "a", "--quiet").code == 0
    whole = events_of(here / "a", "diagnostics")
    shutil.rmtree(here / "a" / "checkpoints" / "step-00000008")
    assert lte("train", "a", "--resume", "--quiet").code == 0
    assert events_of(here / "a", "diagnostics") == whole
    assert [event["step"] for event in whole] == [3, 6]


@pytest.mark.parametrize(("given", "every", "steps"), [(("train.diagnostics_every=7",), 7, [8]), ((), 4, [3])])
def test_a_given_interval_stays_and_a_short_run_is_diagnosed_at_its_end(
    lte: Lte, run_toml: Path, here: Path, given: tuple[str, ...], every: int, steps: list[int]
) -> None:
    settings = given or ("train.steps=3",)
    arguments = [text for setting in settings for text in ("--set", setting)]
    assert lte("train", run_toml, "--out", "a", "--diagnostics", "--quiet", *arguments).code == 0
    assert load_run(here / "a" / "run.toml").train.diagnostics_every == every
    assert [event["step"] for event in events_of(here / "a", "diagnostics")] == steps


@pytest.mark.parametrize("value", ["0", "-3", "often", "2.5"])
def test_an_interval_that_is_none_is_refused(refused: Refused, run_toml: Path, value: str) -> None:
    refused("train", run_toml, "--set", f"train.diagnostics_every={value}", words=("train.diagnostics_every", value))


def test_a_run_is_resumed_as_it_is(refused: Refused, trained: Path, run_toml: Path) -> None:
    refused("train", trained, "--resume", "--diagnostics", words=("as it is", "--diagnostics"))
    named = ("train", run_toml, "--out", "done", "--resume", "--diagnostics")
    refused(*named, words=("differs", "train.diagnostics_every"))


def test_a_loss_that_is_not_finite_still_ends_the_run(lte: Lte, run_toml: Path) -> None:
    outcome = lte("train", run_toml, "--out", "a", "-q", "--diagnostics", "--set", "train.learning_rate=1e30")
    assert_one_line(outcome, 1, ("the loss of device", "lower train.learning_rate"))
