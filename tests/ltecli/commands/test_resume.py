"""`lte train --resume`: bit for bit what an uninterrupted run gives, and damage that is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from simulate.common.events import Event, EventFile
from tests.harness import Child, Outcome, environment
from tests.ltecli.command import Lte, Refused, events_of, write_run
from tests.selection import others_slow

STEPS, STOP_AFTER = 40, 17
"""The step after which a run is stopped is inside a round, and after a merge, an evaluation and a checkpoint."""
METHODS: dict[str, dict[str, Any]] = {
    "lte": {"name": "lte", "rank": 2, "merge_every": 7},
    "lte-reset-b": {"name": "lte", "rank": 2, "merge_every": 7, "reset": "b", "merge_transport": "server"},
    "lte-reset-ab": {"name": "lte", "rank": 2, "merge_every": 7, "reset": "ab", "heads_per_device": 2},
    "ddp": {"name": "ddp"},
}


def long_run(folder: Path, method: str) -> Path:
    """Write a run to be stopped in the middle: inside a round, after merges, evaluations and checkpoints."""
    train = {"steps": STEPS, "warmup_steps": 20, "evaluate_every": 10, "checkpoint_every": 8}
    return write_run(folder / "long.toml", method=METHODS[method], train=train)


def signalled_after_a_step(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let a run send its own process a signal when step STOP_AFTER is in its file."""
    write = EventFile.__call__

    def write_and_signal(file: EventFile, event: Event) -> None:
        write(file, event)
        if event["kind"] == "step" and event["step"] == STOP_AFTER:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(EventFile, "__call__", write_and_signal)


def killed_after_a_step(run: Path, folder: Path) -> Outcome:
    """Train in a process of its own, which a SIGKILL ends."""
    code = (
        "import signal, sys, pytest\n"
        "from ltecli.app import main\n"
        "from tests.ltecli.commands.test_resume import signalled_after_a_step\n"
        "signalled_after_a_step(pytest.MonkeyPatch(), signal.SIGKILL)\n"
        "main(sys.argv[1:])\n"
    )
    words = [sys.executable, "-c", code, "train", str(run), "--out", str(folder)]
    root = environment(PYTHONPATH=str(Path(__file__).parents[3]))
    return Child(words, cwd=run.parent, env=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE).outcome()


def figures(folder: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Return everything in a run's events that may not depend on how often it was stopped."""
    keys = ("step", "train_loss", "device_losses", "learning_rate", "sent_bytes", "simulated_s", "tokens")
    steps = [tuple(event[key] for key in keys) for event in events_of(folder, "step")]
    return {"step": steps, "evaluate": [(e["step"], e["val_loss"]) for e in events_of(folder, "evaluate")]}


def assert_equal_runs(one: Path, other: Path) -> None:
    """Hold two finished runs against each other: losses, counts and every tensor, bit for bit."""
    assert figures(one) == figures(other)
    assert [step[0] for step in figures(one)["step"]] == list(range(1, STEPS + 1))
    last = f"checkpoints/step-{STEPS:08d}"
    parts = sorted(path.name for path in (one / last).glob("*.safetensors"))
    assert len(parts) == 2
    assert parts == sorted(path.name for path in (other / last).glob("*.safetensors"))
    for part in parts:
        ours, theirs = load_file(one / last / part), load_file(other / last / part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("method", "number"),
    others_slow(
        [
            ("lte", signal.SIGINT),
            ("lte-reset-b", signal.SIGINT),
            ("ddp", signal.SIGINT),
            ("lte-reset-ab", signal.SIGTERM),
            ("lte", signal.SIGKILL),
            ("ddp", signal.SIGKILL),
        ],
        [("lte-reset-ab", signal.SIGTERM), ("lte", signal.SIGKILL)],
    ),
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(lte: Lte, here: Path, method: str, number: int) -> None:
    run = long_run(here, method)
    if number == signal.SIGKILL:
        stopped = killed_after_a_step(run, here / "stopped")
    else:
        with pytest.MonkeyPatch.context() as patch:
            signalled_after_a_step(patch, number)
            stopped = lte("train", run, "--out", "stopped")
    steps = len(events_of(here / "stopped", "step"))
    assert STOP_AFTER <= steps < STEPS
    if number == signal.SIGKILL:
        assert stopped.code == -number
    else:
        assert stopped.code == 130
        assert f"interrupted at step {steps}, saved; continue with lte train" in stopped.stderr
        assert (here / f"stopped/checkpoints/step-{steps:08d}").is_dir()
    assert "Traceback" not in stopped.stderr
    assert lte("train", here / "stopped", "--resume", "--quiet").code == 0
    assert lte("train", run, "--out", "whole", "--quiet").code == 0
    assert_equal_runs(here / "stopped", here / "whole")


@pytest.fixture
def stopped(trained: Path) -> Path:
    """The tiny run as a kill after step 7 leaves it: a newest checkpoint, one before it, and a line cut short."""
    shutil.rmtree(trained / "checkpoints" / "step-00000008")
    shutil.copytree(trained / "checkpoints" / "step-00000006", trained / "checkpoints" / "step-00000003")
    lines = (trained / "events.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 7]
    (trained / "events.jsonl").write_text("".join(kept) + lines[-1][:20])
    return trained


def test_a_line_cut_short_is_dropped_and_its_step_done_again(lte: Lte, stopped: Path) -> None:
    assert lte("train", stopped, "--resume", "--quiet").code == 0
    assert [event["step"] for event in events_of(stopped, "step")] == list(range(1, 9))
    assert [event["step"] for event in events_of(stopped, "resume")] == [6]


def test_a_run_without_checkpoint_starts_over(lte: Lte, stopped: Path) -> None:
    before = figures(stopped)["step"][:6]
    shutil.rmtree(stopped / "checkpoints")
    assert lte("train", stopped, "--resume", "--quiet").code == 0
    assert figures(stopped)["step"][:6] == before
    assert not events_of(stopped, "resume")


def test_a_half_written_checkpoint_is_not_seen(lte: Lte, stopped: Path) -> None:
    newest = stopped / "checkpoints" / "step-00000007"
    shutil.copytree(stopped / "checkpoints" / "step-00000006", newest)
    (newest / "state.json").unlink()
    assert lte("train", stopped, "--resume", "--quiet").code == 0
    assert [event["step"] for event in events_of(stopped, "resume")] == [6]


def test_the_run_file_may_be_named_again_if_it_is_the_same(
    lte: Lte, refused: Refused, stopped: Path, run_toml: Path
) -> None:
    other = ("train", run_toml, "--out", "done", "--resume", "--set", "train.seed=4")
    refused(*other, words=("differs", "train.seed (4, there 0)", "another --out"))
    refused(
        "train",
        stopped,
        "--resume",
        "--set",
        "train.seed=4",
        words=("leave --out, --data and --set away", "train.steps=N alone"),
    )
    assert lte("train", run_toml, "--out", "done", "--resume", "--quiet").code == 0


CONSTANT = {"schedule": "constant", "evaluate_every": 6, "checkpoint_every": 100}


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        ({"name": "lte", "rank": 2, "merge_every": 3}, 6),
        ({"name": "diloco", "merge_every": 3}, 6),
        ({"name": "relora", "rank": 2, "merge_every": 4, "rewarm_steps": 2}, 6),
        ({"name": "ddp"}, 5),
        ({"name": "daso", "merge_every": 3, "delay_steps": 0}, 6),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_a_finished_run_gets_more_steps_exactly(lte: Lte, here: Path, method: dict[str, Any], steps: int) -> None:
    for name, number in (("short", steps), ("whole", 2 * steps)):
        run = write_run(here / f"{name}.toml", method=method, train={**CONSTANT, "steps": number})
        assert lte("train", run, "--out", name, "--quiet").code == 0
    assert lte("train", "short", "--resume", "--set", f"train.steps={2 * steps}", "--quiet").code == 0
    keys = ("step", "train_loss", "device_losses", "learning_rate", "sent_bytes", "tokens")
    short, whole = (
        [tuple(event[key] for key in keys) for event in events_of(here / name, "step")] for name in ("short", "whole")
    )
    assert short == whole and len(short) == 2 * steps
    last = f"checkpoints/step-{2 * steps:08d}"
    for part in sorted(path.name for path in (here / "whole" / last).glob("*.safetensors")):
        ours, theirs = (load_file(here / name / last / part) for name in ("short", "whole"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    report = lte("report", "short", "--json").json()
    assert (report["steps"], report["planned_steps"]) == (2 * steps, 2 * steps)
    # The checkpoint from before the change still belongs to the run.
    shutil.rmtree(here / "short" / last)
    for path in (here / "short/checkpoints").iterdir():
        if path.name > f"step-{steps:08d}":
            shutil.rmtree(path)
    assert lte("train", "short", "--resume", "--quiet").code == 0
    assert events_of(here / "short", "resume")[-1]["step"] == steps


@pytest.mark.parametrize(
    ("train", "method", "steps", "words"),
    [
        ({"schedule": "cosine"}, {}, 12, ("train.schedule = 'cosine' spreads its rates", "--out")),
        ({**CONSTANT, "warmup_share": 0.2}, {}, 12, ("train.warmup_share", "--out")),
        (CONSTANT, {}, 8, ("has 8 steps; name more",)),
        (CONSTANT, {}, 12, ("lte treats a run's last step otherwise",)),  # 8 steps are no whole rounds of 3
        (CONSTANT, {"merge_every": 4, "merge_delay": 1}, 12, ("last step otherwise",)),
        (CONSTANT, {}, -1, ("command line: train.steps = -1",)),
    ],
)
def test_more_steps_that_make_another_run_are_refused(
    lte: Lte, refused: Refused, here: Path, train: dict[str, Any], method: dict[str, Any], steps: int,
    words: tuple[str, ...],
) -> None:  # fmt: skip
    run = write_run(here / "tiny.toml", train=train, method=method)
    assert lte("train", run, "--out", "done", "--quiet").code == 0
    refused("train", "done", "--resume", "--set", f"train.steps={steps}", words=words)


def edit_json(change: Callable[[Any], Any]) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(change(json.loads(path.read_text()))))


NEWEST = "checkpoints/step-00000006"
TENSORS, META = f"{NEWEST}/state.safetensors", f"{NEWEST}/state.json"
DAMAGE: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...]]] = {
    "tensors cut short": (TENSORS, lambda p: p.write_bytes(p.read_bytes()[:-9]), ("is truncated", f"done/{NEWEST}")),
    "tensors gone": (TENSORS, lambda p: p.unlink(), ("is truncated: it has 0 of", "the checkpoint before it")),
    "tensors altered": (TENSORS, lambda p: p.write_bytes(p.read_bytes()[:-1] + b"\x01"), ("is damaged", "digest")),
    "state cut short": (META, lambda p: p.write_text(p.read_text()[:-9]), (META, "missing or damaged", "remove")),
    "state is a list": (META, lambda p: p.write_text("[]"), (META, "missing or damaged")),
    "state of other tensors": (META, edit_json(lambda m: {**m, "tensors_bytes": 1}), ("is truncated",)),
    "state without progress": (META, edit_json(lambda m: {**m, "progress": {"step": 6}}), ("missing or damaged",)),
    "state of a later version": (META, edit_json(lambda m: {**m, "version": 3}), ("has version 3", "use the lte")),
    "state without a digest": (META, edit_json(lambda m: {**m, "tensors_sha256": None}), ("is damaged", "digest")),
    "another run's": (META, edit_json(lambda m: {**m, "run": "0" * 64}), ("checkpoint of another run",)),
    "run edited": ("run.toml", lambda p: p.write_text(p.read_text().replace("seed = 0", "seed = 1")), ("another run",)),
    "plan cut short": ("plan.json", lambda p: p.write_text(p.read_text()[:-9]), ("plan.json: not a plan", "restore")),
    "plan empty": ("plan.json", lambda p: p.write_text("{}"), ("plan.json: not a plan",)),
    "plan gone": ("plan.json", lambda p: p.unlink(), ("plan.json: no such file",)),
    "profile gone": ("profile.toml", lambda p: p.unlink(), ("profile.toml: no such file",)),
    "events altered": ("events.jsonl", lambda p: p.write_text("{\n" + p.read_text()), ("events.jsonl:1: not a JSON",)),
    "event without step": ("events.jsonl", lambda p: p.write_text('{"version": 1}\n'), ("events.jsonl:1: not an",)),
    "data changed": ("../prose.txt", lambda p: p.write_text(p.read_text() + "."), ("other data", "restore it")),
    "data gone": ("../prose.txt", lambda p: p.unlink(), ("data.path", "does not exist")),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_and_nothing_written(lte: Lte, refused: Refused, stopped: Path, damage: str) -> None:
    file, inflict, words = DAMAGE[damage]
    inflict(stopped / file)
    lines = refused("train", "done", "--resume", "--quiet", words=words)
    assert lines.count("\n") == 1


def test_the_checkpoint_before_a_damaged_one_serves_as_the_message_says(lte: Lte, here: Path, stopped: Path) -> None:
    run = here / "tiny.toml"
    assert lte("train", run, "--out", "other", "--set", "train.checkpoint_every=2", "--quiet").code == 0
    newest, before = sorted((here / "other" / "checkpoints").iterdir(), reverse=True)
    shutil.rmtree(newest)
    assert lte("train", "other", "--resume", "--quiet").code == 0
    assert [event["step"] for event in events_of(here / "other", "resume")] == [int(before.name[-8:])]


def without_last_checkpoint(lte: Lte, run: Path, saved_by_old: bool) -> Path:
    """Train, drop the last checkpoint, and take from the others what older versions did not write."""
    folder = run.parent / "a"
    assert lte("train", run, "--out", folder, "--quiet").code == 0
    shutil.rmtree(max((folder / "checkpoints").iterdir()))
    for part in (folder / "checkpoints").glob("*/*.json") if saved_by_old else ():
        meta = json.loads(part.read_text())
        assert meta.pop("numerics") > 1
        part.write_text(json.dumps(meta))
    return folder


@pytest.mark.parametrize(
    ("quantize", "width", "saved_by_old", "said"),
    [
        ("nf4", 16, True, True),
        ("nf4-double", 48, True, True),
        ("nf4", 48, False, False),
        ("nf4", 64, True, False),
        ("nf4", 18, True, False),
        ("int8", 48, True, False),
    ],
)
def test_a_run_with_wrongly_unpacked_weights_is_said_not_to_be_the_same(
    lte: Lte, here: Path, quantize: str, width: int, saved_by_old: bool, said: bool
) -> None:
    method = {"name": "lora", "rank": 2, "quantize": quantize}
    run = write_run(here / "run.toml", model={"width": width}, method=method)
    folder = without_last_checkpoint(lte, run, saved_by_old)
    resumed = lte("train", folder, "--resume", "--quiet")
    assert resumed.code == 0
    assert resumed.stderr.count("is not the same run any more") == said
    assert resumed.stderr.count("\n") == said
    again = lte("train", folder, "--resume", "--quiet")  # finished: nothing goes on
    assert (again.code, again.stderr) == (0, "")
