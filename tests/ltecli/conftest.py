"""The command as a fixture: called in this process, in an empty folder, with a check that refusals write nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from ltecli.app import main
from tests.harness import Outcome
from tests.ltecli.command import Lte, Refused, assert_one_line, copy_run, tree, write_run


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


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the tiny run, its data and its finished run folder `done`; tests get copies of it."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["train", str(write_run(folder / "tiny.toml")), "--out", str(folder / "done"), "--quiet"]) == 0
    return folder


@pytest.fixture
def trained(trained_once: Path, here: Path, run_toml: Path) -> Path:
    """The run folder of the tiny run, finished, as if it had been trained here."""
    return copy_run(trained_once / "done", here)
