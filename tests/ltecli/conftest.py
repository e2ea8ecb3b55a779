"""The command as a fixture: called in this process, in an empty folder, with a check that refusals write nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ltecli.app import main
from simulate.config.run import Run
from simulate.measure import one_device
from simulate.planning import search_space
from tests.harness import Outcome
from tests.ltecli.command import PROFILE, Lte, Refused, assert_one_line, copy_run, printed, tree, write_run


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


@pytest.fixture(scope="session", autouse=True)
def measured_once() -> Iterator[None]:
    """Measure the memory of equal programs once: it takes as long as most of the runs here, and is always the same."""
    measure, known = one_device.measure_memory_bytes, dict[str, int]()

    def measure_or_remember(run: Run, device: torch.device) -> int:
        if ":" in run.model.name + run.method.name:  # files of the user's, which tests change
            return measure(run, device)
        program = run.model_dump_json(exclude={"data"})  # measured on made-up batches
        if program not in known:
            known[program] = measure(run, device)
        return known[program]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_device, "measure_memory_bytes", measure_or_remember)
        yield


@pytest.fixture
def two_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plans try two batches in place of six: for tests to which the others are the same again."""
    monkeypatch.setattr(search_space, "MICRO_BATCHES", (1, 4))


@pytest.fixture(scope="session")
def gpt2() -> Any:
    """The document of `lte plan --json` for GPT-2 on four home GPUs; planned once, so that nobody may change it."""
    return printed("plan", "--profile", PROFILE, "--model", "gpt2", "--json").json()


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
