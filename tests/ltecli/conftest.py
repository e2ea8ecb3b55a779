"""The command as a fixture: called in this process, in an empty folder, with a check that refusals write nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from ltecli.app import main
from tests.ltecli.command import Lte, Outcome, Refused, assert_one_line, tree, write_run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def lte(capsys: pytest.CaptureFixture[str]) -> Lte:
    """Call `lte` with arguments; returns its exit code and output."""

    def call(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def refused(lte: Lte, here: Path) -> Refused:
    """Call `lte` with a mistake: it must exit 2 with one line that has all `words`, and write nothing."""

    def call(*arguments: str | Path, words: tuple[str, ...] = ()) -> str:
        before = tree(here)
        outcome = lte(*arguments)
        assert_one_line(outcome, 2, words)
        assert outcome.stdout == ""
        assert tree(here) == before
        return outcome.stderr

    return call


@pytest.fixture
def run_toml(here: Path) -> Path:
    """A tiny lte run, ready to train."""
    return write_run(here / "tiny.toml")


@pytest.fixture
def trained(lte: Lte, here: Path, run_toml: Path) -> Path:
    """The run folder of the tiny run, finished."""
    assert lte("train", run_toml, "--out", "done", "--quiet").code == 0
    return here / "done"
