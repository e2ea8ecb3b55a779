"""`lte train`: the run folder, its events, and everything that is refused before the first step."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.summary.writer import event_file_writer

from simulate.config.run import load_run
from simulate.training import checkpoints
from tests.gpus import no_gpu
from tests.ltecli.command import Lte, Refused, assert_one_line, events_of, tree, write_run

RUN_FILES = {
    "run.toml", "profile.toml", "plan.json", "events.jsonl", "status.json", "tensorboard", "checkpoints", ".lock",
}  # fmt: skip


def test_a_run_folder_keeps_its_contract(trained: Path, run_toml: Path) -> None:
    assert {path.name for path in trained.iterdir()} == RUN_FILES
    assert load_run(trained / "run.toml") == load_run(run_toml)
    assert json.loads((trained / "plan.json").read_text())["chosen"]["method"] == "lte"
    assert list((trained / "tensorboard").iterdir())
    checkpoints = sorted(path.name for path in (trained / "checkpoints").iterdir())
    assert checkpoints == ["step-00000006", "step-00000008"]
    for checkpoint in checkpoints:
        files = {path.suffix for path in (trained / "checkpoints" / checkpoint).iterdir()}
        assert files == {".safetensors", ".json"}


def test_events_tell_the_run_in_order(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "events.jsonl").read_text().splitlines()]
    assert all(event["version"] == 1 for event in lines)
    assert [event["kind"] for event in lines[:2]] == ["start", "memory"]
    assert lines[-1]["kind"] == "end"
    # A checkpoint is reported once it is on the disk, when training may be steps ahead.
    steps = [event["step"] for event in lines if event["kind"] != "checkpoint"]
    assert steps == sorted(steps)
    assert [event["step"] for event in events_of(trained, "step")] == list(range(1, 9))
    assert [event["step"] for event in events_of(trained, "evaluate")] == [6, 8]
    assert [event["step"] for event in events_of(trained, "checkpoint")] == [3, 6, 8]


def test_the_result_is_said_once_and_hints_go_to_stderr(lte: Lte, run_toml: Path) -> None:
    outcome = lte("train", run_toml, "--out", "a/")
    assert outcome.stdout.startswith("done: a, validation loss ")
    assert outcome.stdout.count("\n") == 1
    assert outcome.stderr.endswith("next: lte report a\n")
    assert "derived: 32 tokens per step, 8 steps, 256 tokens" in outcome.stderr


def test_json_is_all_that_is_printed(lte: Lte, run_toml: Path) -> None:
    outcome = lte("train", run_toml, "--out", "a", "--json")
    assert outcome.json().keys() >= {"version", "run", "steps", "val_loss", "sent_bytes_per_device"}
    assert outcome.stderr == ""


def test_a_finished_run_says_so_and_stays_as_it_is(lte: Lte, trained: Path) -> None:
    before = tree(trained)
    text, document = lte("train", trained, "--resume"), lte("train", trained, "--resume", "--json")
    assert (text.code, text.stdout) == (0, "")
    assert f"{trained} is finished" in text.stderr
    assert (document.json()["steps"], document.stderr) == (8, "")
    assert tree(trained) == before


def test_equal_runs_are_equal(lte: Lte, trained: Path, run_toml: Path) -> None:
    lte("train", run_toml, "--out", "again", "--quiet")
    losses = [[event["train_loss"] for event in events_of(Path(run), "step")] for run in (trained, "again")]
    assert losses[0] == losses[1]


def test_set_overrides_a_key_of_the_file(lte: Lte, run_toml: Path, here: Path) -> None:
    assert lte("train", run_toml, "--out", "größe", "--set", "train.steps=3", "--quiet").code == 0
    assert load_run(here / "größe" / "run.toml").train.steps == 3


@pytest.mark.parametrize("name", ["tiny.toml", "mine/run.toml"])
def test_a_run_is_named_after_its_file_or_folder(lte: Lte, here: Path, name: str) -> None:
    (here / "mine").mkdir()
    assert lte("train", write_run(here / name), "--quiet").code == 0
    assert (here / "runs" / ("mine" if "/" in name else "tiny") / "run.toml").is_file()


def test_a_run_that_does_not_fit_its_profile_is_simulated_with_a_warning(lte: Lte, here: Path) -> None:
    profile = lte("profile", "show", "h200").stdout.replace("memory_bytes = 150754820096", "memory_bytes = 1300000000")
    (here / "small.toml").write_text(profile.replace("reserved_bytes = 1200000000", "reserved_bytes = 1299999999"))
    run = write_run(here / "tiny.toml", cluster={"profile": "small.toml"})
    outcome = lte("train", run, "--out", "a")
    assert outcome.code == 0
    assert "warning: does not fit profile h200: needs" in outcome.stderr


def test_no_gpu_no_cuda_and_no_folder(refused: Refused, run_toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch)
    refused("train", run_toml, "--device", "cuda", words=("--device cuda", "--device cpu"))


@pytest.mark.parametrize(
    ("assignment", "said"),
    [("train.steps=0", "train.steps = 0"), ("train.stepz=3", "train.stepz"), ("method.wire=int9", "method.wire")],
)
def test_a_mistake_of_the_command_line_is_not_looked_for_in_the_file(
    refused: Refused, run_toml: Path, assignment: str, said: str
) -> None:
    refused("train", run_toml, "--set", assignment, words=(f"command line: {said}",))


def test_a_mistake_of_the_file_is_named_with_its_line_whatever_the_command_line_sets(
    refused: Refused, run_toml: Path
) -> None:
    text = run_toml.read_text()
    run_toml.write_text(text.replace("evaluate_every = 4", "evaluate_every = 0"))
    line = run_toml.read_text().split("\n").index("evaluate_every = 0") + 1
    refused("train", run_toml, "--set", "train.steps=3", words=(f"{run_toml.name}:{line}: train.evaluate_every = 0",))


def test_nf4_names_the_package_that_it_lacks(refused: Refused, run_toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ltecli.runs.run_folder.is_library_installed", lambda: False)
    words = ("method.quantize = 'nf4'", "pip install 'lte[quantize]'", "method.quantize=int8")
    refused("train", run_toml, "--set", "method.quantize=nf4", words=words)


def test_an_existing_run_is_never_overwritten(refused: Refused, trained: Path, run_toml: Path) -> None:
    refused("train", run_toml, "--out", "done", words=("--out done exists", "--resume", "another --out"))
    refused("train", trained, words=("is a run folder", "--resume"))


def test_what_is_no_run_folder_is_neither_taken_nor_resumed(refused: Refused, run_toml: Path, here: Path) -> None:
    (here / "folder").mkdir()
    for out in ("folder", "tiny.toml"):
        refused("train", run_toml, "--out", out, words=(f"--out {out} exists", "no run folder"))
        refused("train", run_toml, "--out", out, "--resume", words=(f"{out} is no run folder",))
    refused("train", "folder", "--resume", words=("folder is no run folder",))
    refused("train", "nowhere", "--resume", words=("nowhere", "no such file"))
    refused("train", "--resume", words=("runs/demo is no run folder",))


@pytest.mark.parametrize("out", ["/dev/null/run", "/proc/run", "/proc/self/run"])
def test_a_place_that_takes_no_files_is_refused(refused: Refused, run_toml: Path, out: str) -> None:
    refused("train", run_toml, "--out", out, words=(f"--out {out}", "another"))


def test_a_disk_without_room_is_refused(refused: Refused, run_toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    refused("train", run_toml, "--out", "a", words=("--out a", "checkpoints need about", "1 kB free", "make room"))


def test_a_folder_that_another_run_made_meanwhile_survives(
    lte: Lte, here: Path, run_toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_folder(*arguments: object) -> None:
        (here / "a").mkdir()
        (here / "a" / "theirs").touch()

    monkeypatch.setattr("ltecli.runs.run_folder._check_disk", make_folder)
    assert_one_line(lte("train", run_toml, "--out", "a"), 2, ("--out a exists",))
    assert (here / "a" / "theirs").exists()


def test_a_folder_that_cannot_be_filled_is_taken_away(
    lte: Lte, here: Path, run_toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("simulate.common.toml_io.write_atomically", full)
    assert_one_line(lte("train", run_toml, "--out", "a"), 2, ("--out a", "No space left on device"))
    assert not (here / "a").exists()


def fail_after(calls: int, real: Any) -> Any:
    """Return `real`, which finds the disk full after some calls."""
    left = iter(range(calls))

    def write(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    return write


@pytest.mark.parametrize(("write", "calls"), [("_begin_part", 3), ("_settle", 5)])
def test_a_disk_that_fills_up_names_what_is_saved_and_the_run_can_go_on(
    lte: Lte, here: Path, run_toml: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, write: str, calls: int
) -> None:
    """Also where the disk refuses what the operating system took already, while training goes on."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, write, fail_after(calls, getattr(checkpoints, write)))
        outcome = lte("train", run_toml, "--out", "a", "--quiet")
    assert_one_line(
        outcome, 1, ("No space left on device", "saved: a/checkpoints/step-00000003", "lte train a --resume")
    )
    assert [path.name for path in (here / "a" / "checkpoints").iterdir()] == ["step-00000003"]
    assert lte("train", "a", "--resume", "--quiet").code == 0
    losses = [[event["train_loss"] for event in events_of(run, "step")] for run in (here / "a", trained)]
    assert losses[0] == losses[1]


def test_a_disk_full_before_the_first_checkpoint_says_how_to_start_over(
    lte: Lte, run_toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_settle", fail_after(0, checkpoints._settle))
        outcome = lte("train", run_toml, "--out", "a", "--quiet")
    assert_one_line(outcome, 1, ("No space left on device", "no checkpoint was saved yet", "lte train a --resume"))
    assert lte("train", "a", "--resume", "--quiet").code == 0


def test_a_disk_that_takes_no_curves_ends_no_run(
    lte: Lte, run_toml: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_file_writer._AsyncWriterThread, "_run", fail_after(0, None))
    outcome = lte("train", run_toml, "--out", "a", "--quiet")
    assert outcome.code == 0
    (line,) = [line for line in outcome.stderr.splitlines() if "USDT" not in line]
    assert (
        line == "lte: a/tensorboard cannot be written (No space left on device); its curves end here, the events go on"
    )
    assert [event["train_loss"] for event in events_of(Path("a"), "step")] == [
        event["train_loss"] for event in events_of(trained, "step")
    ]


def test_an_interrupt_before_the_first_step_says_how_to_go_on(
    lte: Lte, run_toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("simulate.measure.one_device.measure_memory_bytes", interrupted)
        outcome = lte("train", run_toml, "--out", "a", "--quiet")
        assert_one_line(outcome, 130, ("interrupted", "nothing was started; give the same line again"))
    assert lte("train", run_toml, "--out", "a", "--quiet").code == 0


def test_a_loss_that_is_not_finite_ends_the_run(lte: Lte, run_toml: Path) -> None:
    outcome = lte("train", run_toml, "--out", "a", "--quiet", "--set", "train.learning_rate=1e30")
    assert_one_line(outcome, 1, ("the loss of device", "at step", "lower train.learning_rate"))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[model]", "[model", ("tiny.toml: not valid TOML", "line ")),
        ("layers = 1", "layers = 0", ("tiny.toml:", "model.layers = 0", "greater than 0")),
        ("layers = 1", "layers = -1", ("model.layers = -1",)),
        ("layers = 1", 'layers = "one"', ("model.layers = 'one'", "integer")),
        ("layers = 1", "layers = nan", ("model.layers = nan", "integer")),
        ("layers = 1", "lairs = 1", ("model.lairs", "did you mean 'layers'?")),
        ("layers = 1", f"layers = {'9' * 30}", ("model.layers", "64 bits")),
        ("attention_heads = 2", "attention_heads = 3", ("not divisible by attention_heads = 3",)),
        ("rank = 2", "rank = 17", ("method.rank = 17 exceeds the 16", "--set method.rank=16")),
        ("rank = 2", "rank = 2\nheads_per_device = 3", ("train.micro_batch = 2 is not divisible", "micro_batch=3")),
        ('name = "lte"', 'name = "lt"', ("method.name = 'lt'", "did you mean 'lte'?")),
        ('name = "lte"', 'name = "ddp"', ("method.rank", "not a known key")),
        ("merge_every = 3", 'reset = "c"', ("method.reset = 'c'", "known: ab, b, none")),
        ("steps = 8", "steps = 8\nwarmup_steps = 8", ("train.warmup_steps = 8", "train.steps = 8", "warmup_share")),
        ("steps = 8", "steps = 8\nwarmup_steps = 2\nwarmup_share = 0.1", ("both say how long", "--set train.warmup")),
        ("steps = 8", 'steps = 8\nschedule = "cosin"', ("train.schedule = 'cosin'", "cosine")),
        ("steps = 8", "steps = 8\naccumulate = 0", ("train.accumulate = 0", "greater than 0")),
        ("devices = 2", "devices = 0", ("cluster.devices = 0", "greater than 0")),
        ("rtx3060_x4_home", "rtx3060", ("profile = 'rtx3060'", "known:")),
        ("[data]", "[date]", ("date is not a known key", "did you mean 'data'?")),
        ("[cluster]", "[cluster]\n[cluster]", ("tiny.toml: not valid TOML",)),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_located(
    refused: Refused, run_toml: Path, old: str, new: str, words: tuple[str, ...]
) -> None:
    text = run_toml.read_text()
    assert old in text
    run_toml.write_text(text.replace(old, new, 1))
    refused("train", run_toml, words=words)


def test_the_line_of_a_mistake_is_right(refused: Refused, run_toml: Path) -> None:
    lines = run_toml.read_text().replace("micro_batch = 2", "micro_batch = 0").splitlines()
    run_toml.write_text("\n".join(lines))
    line = next(number for number, text in enumerate(lines, 1) if re.match("micro_batch", text))
    refused("train", "tiny.toml", words=(f"tiny.toml:{line}: train.micro_batch = 0",))


def test_a_table_that_is_a_number_is_refused(refused: Refused, here: Path) -> None:
    (here / "run.toml").write_text("model = 3\n")
    refused("train", "run.toml", words=("model = 3 is not a table", "[model]"))
    refused("train", "run.toml", "--set", "model.layers=2", words=("model = 3 is not a table",))


def test_a_file_that_is_no_run_is_refused(refused: Refused, here: Path) -> None:
    (here / "binary.toml").write_bytes(b"\x00\xff")
    refused("train", "binary.toml", words=("binary.toml", "not UTF-8"))
    refused("train", "nowhere.toml", words=("nowhere.toml", "no such file"))
    refused("train", ".", words=("name a run.toml",))


def test_missing_data_is_refused(refused: Refused, run_toml: Path, here: Path) -> None:
    (here / "prose.txt").unlink()
    refused("train", run_toml, words=("data.path", "does not exist"))
    refused("train", run_toml, "--data", "nowhere", words=("data.path", str(here / "nowhere"), "does not exist"))


@pytest.mark.slow
def test_train_without_arguments_plans_and_trains_the_demo(lte: Lte, here: Path) -> None:
    outcome = lte("train", "--quiet")
    assert outcome.code == 0
    (evaluations, first) = events_of(here / "runs" / "demo", "evaluate"), events_of(here / "runs" / "demo", "step")[0]
    assert evaluations[-1]["val_loss"] < 0.6 * first["train_loss"]


def test_a_step_that_nobody_takes_has_no_loss_to_show(lte: Lte, here: Path) -> None:
    method = {"name": "local-sgd", "merge_every": 3, "pace": "deadline", "steps_taken": [[2, 1]]}
    run = write_run(here / "run.toml", method=method)
    outcome = lte("train", run, "--out", "a")
    assert outcome.code == 0 and "val" in outcome.stderr
    losses = [event["train_loss"] for event in events_of(here / "a", "step")]
    assert losses[2] is None and losses[3] is not None
    assert lte("report", "a").code == 0


def test_a_run_that_ends_worse_than_guessing_says_so(lte: Lte, run_toml: Path) -> None:
    """Of 256 bytes, equal chances have a loss of ln 256 = 5.5452."""
    spoiled = lte("train", run_toml, "--out", "a", "--set", "train.learning_rate=3.0", "--set", "train.steps=30")
    assert spoiled.code == 0
    (line,) = [text for text in spoiled.stdout.splitlines() if text.startswith("done: ")]
    words = ("worse than guessing: ", "above 5.5452", "256 tokens", "lower train.learning_rate (here 3)")
    assert all(word in line for word in words), line
    assert "worse than guessing: " in lte("report", "a").stdout
    losses = [lte(*command, "--json").json() for command in (("report", "a"), ("train", "a", "--resume"))]
    assert losses[0]["worse_than_guessing"] == losses[1]["worse_than_guessing"] in line
    assert "training loss" in line or "validation loss" in losses[0]["worse_than_guessing"]
    learned = lte("train", run_toml, "--out", "b", "--set", "train.steps=30")
    assert learned.code == 0 and "guessing" not in learned.stdout + lte("report", "b").stdout


def test_a_run_that_has_not_ended_is_not_judged(lte: Lte, run_toml: Path, here: Path) -> None:
    """Every network starts near the loss of guessing, often above it."""
    lte("train", run_toml, "--out", "a", "--set", "train.learning_rate=3.0", "--set", "train.steps=30", "--quiet")
    text = (here / "a" / "run.toml").read_text()
    (here / "a" / "run.toml").write_text(text.replace("steps = 30", "steps = 60", 1))
    assert lte("report", "a", "--json").json()["worse_than_guessing"] is None


def test_accumulated_steps_are_counted_whole(lte: Lte, run_toml: Path) -> None:
    for out, keys in (("parts", ("micro_batch=1", "accumulate=4")), ("whole", ("micro_batch=4",))):
        assert (
            lte("train", run_toml, "--out", out, "--quiet", *(w for k in keys for w in ("--set", f"train.{k}"))).code
            == 0
        )
    parts, whole = (lte("report", out, "--json").json() for out in ("parts", "whole"))
    for key in ("steps", "samples", "tokens", "sent_bytes_per_device"):
        assert parts[key] == whole[key], key
    assert parts["samples"] == 8 * 2 * 4
    assert parts["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-5)
    assert parts["memory_bytes"]["planned"] == pytest.approx(parts["memory_bytes"]["measured"], rel=0.03)
    assert "batch 1 x 4" in lte("report", "parts").stdout
