"""lte watch: a run's state from its folder alone, while it trains, after it ended or died, and before it is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ltecli.commands import watch as module
from ltecli.commands.watch import Watcher, panel_of
from ltecli.console import _Console
from ltecli.runs.lock import lock_folder
from ltecli.runs.status import STATUS_VERSION
from tests.ltecli.command import Lte, Refused

STATUS: dict[str, Any] = {
    "version": STATUS_VERSION, "state": "running", "method": "lte", "devices": 4, "device": "cpu", "processes": 2,
    "phase": "training", "phase_since_unix_s": 1.8e9, "stopping": None, "steps": 120, "steps_per_round": 10,
    "step": 25, "train_loss": 4.25, "val_loss": 4.5, "val_accuracy": None, "val_step": 20,
    "sent_bytes_per_device": 1.5e6, "sent_bytes_per_s_per_device": 2e4, "links": None, "step_s": 2.0,
    "remaining_s": 190.0, "restarts": 0, "restart_reasons": [], "workers": [], "error": None,
    "resume_words": " --launch --processes 2", "started_unix_s": 1.8e9, "updated_unix_s": 1.8e9,
}  # fmt: skip


def write(folder: Path, **changes: Any) -> Path:
    """Write a status as a run does, with some values changed."""
    folder.mkdir(exist_ok=True)
    (folder / "status.json").write_text(json.dumps({**STATUS, **changes}))
    return folder


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[Callable[[], object]]], None]:
    """Let the watch see one moment after the other: each is called where it would wait; then comes Ctrl-C."""

    def set_moments(given: Sequence[Callable[[], object]]) -> None:
        rest: Iterator[Callable[[], object]] = iter(given)

        def sleep(seconds: float) -> None:
            moment = next(rest, None)
            if moment is None:
                raise KeyboardInterrupt
            moment()

        monkeypatch.setattr(module.time, "sleep", sleep)

    return set_moments


def test_a_finished_run_is_shown_and_not_waited_for(lte: Lte, trained: Path) -> None:
    for arguments in ((), ("--once",)):
        outcome = lte("watch", trained, *arguments)
        assert (outcome.code, outcome.stderr) == (0, "")
        assert "done: finished, step 8 of 8; next: lte report done" in outcome.stdout.replace(str(trained), "done")
    document = lte("watch", trained, "--once", "--json").json()
    assert (document["state"], document["step"], document["round"], document["rounds"]) == ("finished", 8, 3, 3)


def test_a_live_run_says_what_it_does(lte: Lte, here: Path) -> None:
    workers = [
        {"title": "process 0 on node 0", "activity": "exchanging", "step": 29, "silent_s": 0.0, "waits_for": [1]},
        {"title": "process 1 on node 0", "activity": "training", "step": 25, "silent_s": 4.0, "waits_for": []},
    ]
    link = {"sender": 0, "receiver": 1, "loaded_bytes_per_s": 11e6, "latency_s": 4e-4}
    folder = write(here / "r", workers=workers, links=[link], restarts=1, restart_reasons=["process 1 was killed"])
    with lock_folder(folder):
        lines = lte("watch", "r", "--once").stdout.splitlines()
        document = lte("watch", "r", "--once", "--json").json()
    assert lines[0] == "r: round 3 of 12, step 25 of 120"
    assert lines[1] == "train loss 4.2500, validation loss 4.5000 at step 20"
    assert lines[2].startswith("3.17 min to go, done at ")
    assert lines[3] == "4 devices in 2 processes; each sent 1.5 MB, 20 kB/s"
    assert lines[4] == "restarts 1, the newest: process 1 was killed"
    assert lines[5] == "link of node 0 to node 1: 11 MB/s, 400 us (measured before the run)"
    assert lines[6] == "  process 0 on node 0: step 29, exchanging, waits for process 1"
    assert lines[7] == "  process 1 on node 0: step 25, silent for 4 s, last training"
    assert (document["state"], document["round"], document["rounds"]) == ("running", 3, 12)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": 30, "phase": "saving"}, "r: round 3 of 12, saving, step 30 of 120"),
        ({"step": 30}, "r: round 4 of 12, step 30 of 120"),
        ({"step": 120, "phase": "evaluating"}, "r: round 12 of 12, evaluating, step 120 of 120"),
        ({"steps_per_round": None}, "r: training, step 25 of 120"),
        ({"phase": "measuring", "step": 0}, "r: measuring, step 0 of 120"),
        ({"stopping": "told to stop"}, "r: round 3 of 12, step 25 of 120; told to stop"),
    ],
)
def test_phases_belong_to_their_round(lte: Lte, here: Path, changes: dict[str, Any], words: str) -> None:
    with lock_folder(write(here / "r", **changes)):
        assert lte("watch", "r", "--once").stdout.splitlines()[0] == words


def test_a_killed_run_is_told_from_a_live_one(lte: Lte, here: Path) -> None:
    folder = write(here / "r")
    first = lte("watch", "r", "--once").stdout.splitlines()[0]
    assert first.startswith("r: died without a word, step 25 of 120, last seen 20")
    assert first.endswith("; lte train r --resume --launch --processes 2 continues it")
    with lock_folder(folder):
        assert lte("watch", "r", "--once", "--json").json()["state"] == "running"


def test_the_lock_is_asked_for_where_a_run_is_quiet(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now: list[float] = []
    asked: list[float] = []

    def is_locked(path: Path) -> bool:
        asked.append(now[-1])
        return now[-1] < 110.0

    monkeypatch.setattr(module.time, "monotonic", lambda: now[-1])
    monkeypatch.setattr(module, "is_locked", is_locked)
    watcher = Watcher(write(here / "r"))
    states = []
    for now_s in (100.0, 101.0, 104.0, 106.0, 111.0, 112.0):
        now.append(now_s)
        states.append((watcher.look()["state"], watcher.look()["silent_s"]))
    assert [state for state, _ in states] == ["running"] * 4 + ["died"] * 2
    assert states[3][1] == 6.0  # quiet, and alive
    # At first, then only while the run is quiet; a dead run's lock is left to whoever resumes it.
    assert asked == [100.0, 106.0, 106.0, 111.0]
    write(here / "r", updated_unix_s=1.9e9)
    assert watcher.look()["state"] == "running"


def test_each_change_is_a_line_through_waiting_death_and_resume(
    lte: Lte, here: Path, moments: Callable[[Sequence[Callable[[], object]]], None]
) -> None:
    folder = here / "r"
    lock = ExitStack()

    def begin() -> None:
        write(folder, step=3, updated_unix_s=1.0)
        lock.enter_context(lock_folder(folder))

    def make() -> None:
        folder.mkdir()
        (folder / "profile.toml").write_text("")

    moments([
        lambda: None,
        make,
        lambda: (folder / "status.json").write_text('{"version": 1, "st'),
        begin,
        lambda: write(folder, step=5, updated_unix_s=2.0),
        lambda: write(folder, step=12, updated_unix_s=3.0),
        lambda: write(folder, step=12, state="interrupted", updated_unix_s=4.0),
        lambda: write(folder, step=10, updated_unix_s=5.0),
        lambda: write(folder, step=120, state="finished", updated_unix_s=6.0),
    ])  # fmt: skip
    with lock:
        outcome = lte("watch", "r")
    assert outcome.code == 0
    heads = [line.partition("  ")[0] for line in outcome.stdout.splitlines()]
    assert heads == [
        "r is not there yet; lte train makes it once its data is loaded; waiting",
        "r: round 1 of 12, step 3 of 120",
        "r: round 2 of 12, step 12 of 120",
        "r: interrupted, step 12 of 120; lte train r --resume --launch --processes 2 continues it",
        "r: round 2 of 12, step 10 of 120",
        "r: finished, step 120 of 120; next: lte report r",
    ]


def test_ctrl_c_leaves_the_watch_alone(
    lte: Lte, here: Path, moments: Callable[[Sequence[Callable[[], object]]], None]
) -> None:
    moments([])
    outcome = lte("watch", "later", "--json")
    assert (outcome.code, outcome.json()["state"]) == (0, "waiting")
    moments([])
    outcome = lte("watch", "later")
    assert (outcome.code, outcome.stderr) == (0, "no longer watching; later is not touched\n")


def test_a_terminal_gets_a_panel_of_its_width(here: Path) -> None:
    document = {
        "run": "r",
        **STATUS,
        "round": 3,
        "rounds": 12,
        "finish_at": "2026-12-01T08:00:00+00:00",
        "silent_s": 0.0,
    }
    console = _Console(width=80, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(panel_of(document))
    lines = capture.get().splitlines()
    assert lines[0] == "r: round 3 of 12, step 25 of 120"
    assert set(lines[1].strip()) <= set("━╸╺")
    assert lines[2].startswith("train loss")


def test_what_can_be_no_run_is_refused(refused: Refused, here: Path) -> None:
    (here / "src").mkdir()
    (here / "src" / "main.c").write_text("")
    refused("watch", "src", words=("src is no run folder", "run.toml"))
    (here / "prose.txt").write_text("")
    refused("watch", "prose.txt", words=("prose.txt is no run folder",))
    refused("watch", "later", "--once", words=("no status.json yet", "leave --once away"))


def test_a_run_of_an_earlier_version_is_waited_for(
    lte: Lte, trained: Path, moments: Callable[[Sequence[Callable[[], object]]], None]
) -> None:
    (trained / "status.json").unlink()
    moments([])
    outcome = lte("watch", trained)
    assert outcome.code == 0
    assert f"has no status.json yet; waiting for lte train {trained} --resume" in outcome.stdout
