"""Calls `lte` in this process or in its own, and writes runs small enough to train in a moment."""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ltecli.app import main
from simulate.common import toml_io
from simulate.common.events import Event, read_events
from simulate.config.run import load_run, run_fingerprint
from tests.harness import Child, Outcome

Lte = Callable[..., "Outcome"]
Refused = Callable[..., str]
WORDS = ("a", "low", "rank", "wave", "over", "the", "frozen", "hills", "where", "every", "head", "learns", "its", "way")
PROFILE = "rtx3060_x4_home"
TINY: dict[str, dict[str, Any]] = {
    "model": {"layers": 1, "width": 16, "attention_heads": 2, "context": 8},
    "method": {"name": "lte", "rank": 2, "merge_every": 3},
    "train": {"steps": 8, "micro_batch": 2, "evaluate_every": 4, "evaluate_samples": 4, "checkpoint_every": 3},
    "cluster": {"profile": PROFILE, "devices": 2},
}


def write_prose(path: Path) -> Path:
    """Write a few thousand bytes of text, the same on every machine."""
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=1500)), encoding="utf-8")
    return path


def write_run(path: Path, **tables: dict[str, Any]) -> Path:
    """Write the tiny run as TOML, with keys of tables overridden; the data is prose.txt beside it."""
    data = {"path": str(write_prose(path.parent / "prose.txt"))}
    table = {"data": data, **TINY}
    for name, keys in tables.items():
        replaced = name == "data" or "name" in keys
        table[name] = keys if replaced else {**table[name], **keys}
    path.write_text(toml_io.dump(table), encoding="utf-8")
    return path


def copy_run(folder: Path, here: Path) -> Path:
    """Copy a run folder and let it say that it was trained on the data here; a run is trained once for many tests."""
    copied = shutil.copytree(folder, here / folder.name)
    was = run_fingerprint(load_run(copied / "run.toml"))
    for name in ("run.toml", "events.jsonl"):  # both have the data's path
        text = (copied / name).read_text(encoding="utf-8")
        (copied / name).write_text(text.replace(str(folder.parent), str(here)), encoding="utf-8")
    now = run_fingerprint(load_run(copied / "run.toml"))
    for meta in copied.glob("checkpoints/*/*.json"):
        text = meta.read_text(encoding="utf-8")
        assert was in text
        meta.write_text(text.replace(was, now), encoding="utf-8")
    return copied


def printed(*arguments: str) -> Outcome:
    """Call `lte` in this process; for fixtures that several tests share, which cannot have `lte`."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(arguments)
    return Outcome(code, out.getvalue(), err.getvalue())


def lte_process(*arguments: str | Path, cwd: Path, **options: Any) -> Child:
    """Start `lte` in a process of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return Child([sys.executable, "-m", "ltecli", *arguments], cwd=cwd, **pipes)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return every path below a folder with its content, so that two moments can be compared."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def events_of(folder: Path, kind: str) -> list[Event]:
    """Return a run's events of a kind."""
    return [event for event in read_events(folder / "events.jsonl") if event["kind"] == kind]


def assert_one_line(outcome: Outcome, code: int, words: Sequence[str]) -> None:
    """Hold what a refused command says: one line on stderr that names the mistake, and no result."""
    assert outcome.code == code, outcome
    assert outcome.stderr.startswith("lte: "), outcome.stderr
    assert outcome.stderr.count("\n") == 1, outcome.stderr
    for word in words:
        assert word in outcome.stderr
