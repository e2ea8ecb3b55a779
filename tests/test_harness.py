"""The harness fails a test whose processes fail, take too long or leave others behind, and then leaves none itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import harness
from tests.harness import Child, run, run_python, run_together

LEAVES_ONE = """
import subprocess, sys
quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True, **quiet)
"""


def test_output_and_exit_code_are_the_processs_own() -> None:
    outcome = run([sys.executable, "-c", "import sys; print('{}'); print('said', file=sys.stderr); sys.exit(3)"])
    assert (outcome.code, outcome.json(), outcome.stderr) == (3, {}, "said\n")


def test_a_process_that_is_left_behind_is_named_and_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "GONE_S", 0.3)
    child = Child([sys.executable, "-c", LEAVES_ONE], stdout=subprocess.PIPE)
    with pytest.raises(AssertionError, match=r"left running: .*time\.sleep\(60\)"):
        child.outcome()
    harness.wait_until(lambda: not child.family(), 5)


def test_a_process_that_takes_too_long_is_killed_and_what_it_said_is_shown() -> None:
    said = "import time; print('so far', flush=True); time.sleep(60)"
    child = Child([sys.executable, "-c", said], stdout=subprocess.PIPE)
    with pytest.raises(AssertionError, match=r"took more than 3 s:\nso far"):
        child.outcome(3)
    assert child.returncode is not None and not child.family()


def test_one_that_fails_fails_all() -> None:
    with pytest.raises(AssertionError, match="broken"):
        run_together([[sys.executable, "-c", "pass"], [sys.executable, "-c", "raise SystemExit('broken')"]])
    with pytest.raises(AssertionError, match="ValueError"):
        run_python("raise ValueError")
