"""The list of mutations fits the tree, and the script that tries them tells what was caught from what was not."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutants import FAILED, MUTANTS, PASSED, ROOT, BrokenMutantError, Copy, mutated

MUTANT = MUTANTS[0]
RED = "F\nFAILED tests/test_a.py::test_b[c - d] - assert 1 == 2\n1 failed\n"


def test_there_are_forty_that_apply() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == 40
    for mutant in MUTANTS:
        assert mutated(mutant) != (ROOT / mutant.file).read_text(encoding="utf-8")


def test_mutations_use_names_that_are_there(tmp_path: Path) -> None:
    """An error of the mutation itself breaks fixtures, and proves nothing about the tests."""
    for number, mutant in enumerate(MUTANTS):
        (tmp_path / f"{number}.py").write_text(mutated(mutant), encoding="utf-8")
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "F821", str(tmp_path)]
    done = subprocess.run(ruff, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_named_tests_exist() -> None:
    for file, name in (test.split("::") for mutant in MUTANTS for test in mutant.tests):
        assert f"\ndef {name.partition('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"before": "self"}, "times, not once"),
        ({"before": "is nowhere in it"}, "0 times, not once"),
        ({"file": "simulate/nothing.py"}, "there is no simulate/nothing.py"),
        ({"after": "return ("}, "is no Python any more"),
    ],
)
def test_a_mutation_that_does_not_apply_is_named(change: dict[str, str], words: str) -> None:
    with pytest.raises(BrokenMutantError, match=f"{MUTANT.name}.*{words}"):
        mutated(replace(MUTANT, **change))


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


@pytest.mark.parametrize(
    ("code", "output", "caught"), [(PASSED, "1 passed", None), (FAILED, RED, "tests/test_a.py::test_b[c - d]")]
)
def test_what_fails_with_the_mutation_catches_it(
    monkeypatch: pytest.MonkeyPatch, copy: Copy, code: int, output: str, caught: str | None
) -> None:
    seen = []

    def run(copy: Copy, tests: tuple[str, ...]) -> tuple[int, str]:
        seen.append((copy.folder / MUTANT.file).read_text(encoding="utf-8"))
        return code, output

    monkeypatch.setattr(Copy, "test", run)
    assert copy.catch(MUTANT, MUTANT.tests) == caught
    assert seen == [mutated(MUTANT)]
    assert mutated(MUTANT, copy.folder) == mutated(MUTANT)  # it is undone


@pytest.mark.parametrize(
    ("code", "output"), [(FAILED, "ERROR tests/test_a.py::test_b - no fixture"), (2, RED), (4, "not found"), (5, "")]
)
def test_tests_that_do_not_run_catch_nothing(
    monkeypatch: pytest.MonkeyPatch, copy: Copy, code: int, output: str
) -> None:
    monkeypatch.setattr(Copy, "test", lambda copy, tests: (code, output))
    with pytest.raises(BrokenMutantError, match=f"pytest ended with {code}"):
        copy.catch(MUTANT, MUTANT.tests)
