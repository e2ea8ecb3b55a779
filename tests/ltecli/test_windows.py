"""Plan, train and report where Python lacks what Windows lacks (tests/windows.py); Windows itself was not tried."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from ltecli.runs.lock import lock_folder
from tests.harness import ROOT, Child, environment, run
from tests.ltecli.command import Lte, assert_one_line, write_run

SIZES = {"name": "gpt", "layers": 1, "width": 16, "attention_heads": 2, "context": 8, "vocab": 300}
COMMANDS = """
import json, sys
from tests.windows import become_windows
become_windows()
from ltecli.app import main
for command in json.loads(sys.argv[1]):
    print("ended", command[0], main(command), flush=True)
"""
LACKS = """
from tests.windows import become_windows
become_windows()
import os, signal
assert not hasattr(os, "fork") and not hasattr(os, "posix_fallocate") and not hasattr(signal, "SIGKILL")
for attempt in (lambda: os.open(".", os.O_RDONLY), lambda: os.fsync(os.open("file", os.O_RDONLY)),
                lambda: os.replace("file", "other")):
    try:
        attempt()
    except OSError as error:
        print(type(error).__name__)
import fcntl
"""
HOLD = """
import sys, time
from pathlib import Path
from ltecli.runs.lock import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_run_from_its_plan_to_its_report(here: Path) -> None:
    """Text is tokenized, which takes a lock of the cache; the run is resumed and exported, too."""
    run_toml = str(write_run(here / "tiny.toml", model=SIZES))
    commands = [
        ["plan", "--method", "ddp", "--data", str(here / "prose.txt"), "--tokens", "2000", "--out", "planned.toml"],
        ["train", run_toml, "--out", "runs/a", "--set", "data.tokenizer=bpe:300", "--quiet"],
        ["train", "runs/a", "--resume", "--quiet"],
        ["report", "runs/a"],
        ["export", "runs/a"],
    ]
    # Its locks are marker files: the lock files that others' flock leaves in a common cache would look held.
    path = environment(PYTHONPATH=str(ROOT), LTE_CACHE=str(here / "cache"))
    outcome = run([sys.executable, "-c", COMMANDS, json.dumps(commands)], cwd=here, env=path)
    ended = [line for line in outcome.stdout.splitlines() if line.startswith("ended ")]
    assert ended == [f"ended {command[0]} 0" for command in commands], outcome.stderr
    assert (here / "planned.toml").is_file()
    assert (here / "runs/a/export/model.safetensors").is_file()


def test_the_stand_in_refuses_what_windows_refuses(here: Path) -> None:
    """Folders opened, flushes of what is open for reading, replacing a file that is open; and fcntl."""
    (here / "file").touch()
    outcome = run([sys.executable, "-c", LACKS], cwd=here, env=environment(PYTHONPATH=str(ROOT)))
    assert outcome.stdout.split() == ["PermissionError", "OSError", "PermissionError"]
    assert "ModuleNotFoundError: import of fcntl halted" in outcome.stderr


def test_a_killed_process_leaves_no_lock(lte: Lte, trained: Path) -> None:
    holder = Child([sys.executable, "-c", HOLD, trained], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        refused = lte("train", trained, "--resume", "--quiet")
        assert_one_line(refused, 2, ("being trained by another process",))
    finally:
        holder.end_family()
        holder.communicate()
    with lock_folder(trained):
        pass
