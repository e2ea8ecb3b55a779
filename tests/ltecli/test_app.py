"""Rules of every command: help, usage mistakes, streams, terminals and pipes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from simulate.common.version import version
from tests.harness import environment, run
from tests.ltecli.command import Lte, Refused, assert_one_line, lte_process
from tests.selection import others_slow


def test_version_is_the_installed_one(lte: Lte) -> None:
    outcome = lte("--version")
    assert (outcome.code, outcome.stdout) == (0, f"lte {version()}\n")


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_is_a_result(lte: Lte, arguments: tuple[str, ...]) -> None:
    outcome = lte(*arguments)
    assert outcome.code == 0
    assert "Usage: lte" in outcome.stdout
    assert outcome.stderr == ""


@pytest.mark.parametrize("command", ["plan", "train", "report", "profile", "profile list", "profile show"])
def test_every_command_explains_itself(lte: Lte, command: str) -> None:
    outcome = lte(*command.split(), "--help")
    assert outcome.code == 0
    assert f"Usage: lte {command}" in outcome.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("paln", ("No such command 'paln'", "see lte --help")),
        ("plan --bogus", ("No such option", "--bogus", "see lte plan --help")),
        ("plan --devices abc", ("--devices", "valid integer", "see lte plan --help")),
        ("plan --top 0", ("--top", "greater than or equal to 1")),
        ("plan extra", ("extra", "see lte plan --help")),
        ("report", ("Missing argument", "see lte report --help")),
        ("profile", ("Missing command", "see lte profile --help")),
        ("profile show", ("Missing argument", "see lte profile show --help")),
        ("train --device gpu", ("--device", "'gpu'", "cuda")),
        ("train --set", ("--set", "argument")),
    ],
)
def test_a_usage_mistake_gets_one_line(refused: Refused, arguments: str, words: tuple[str, ...]) -> None:
    refused(*arguments.split(), words=words)


def test_a_line_break_in_a_value_stays_on_the_line(refused: Refused) -> None:
    refused("plan", "--set", "foo\nbar", words=("foo bar",))


def test_debugging_shows_the_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ltecli", "profile", "show", "nowhere"]
    assert "Traceback" in run(command, cwd=tmp_path, env=environment(LTE_DEBUG="1")).stderr


def test_a_fault_of_ours_keeps_its_traceback(lte: Lte, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr("ltecli.commands.profile.list_command", broken)
    with pytest.raises(RuntimeError, match="ours"):
        lte("profile", "list")


@pytest.mark.parametrize("command", others_slow(["plan", "profile list", "profile show h200"], ["profile list"]))
def test_no_colour_codes_outside_a_terminal(command: str, tmp_path: Path) -> None:
    outcome = lte_process(*command.split(), cwd=tmp_path).outcome()
    assert outcome.code == 0
    assert "\x1b" not in outcome.stdout + outcome.stderr


@pytest.mark.parametrize(
    "command",
    others_slow(
        ["plan --method lte --rank 8 --json", "plan", "profile list", "profile show h200 --json"],
        ["plan --method lte --rank 8 --json"],
    ),
)
def test_a_reader_that_leaves_early_causes_no_traceback(command: str, tmp_path: Path) -> None:
    script = f"{sys.executable} -m ltecli {command} | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = run(["bash", "-c", script], cwd=tmp_path)
    assert done.code == 0
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_a_bare_locale_can_print_everything(tmp_path: Path) -> None:
    plain = environment(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    done = run([sys.executable, "-m", "ltecli", "profile", "show", "größe"], cwd=tmp_path, env=plain)
    assert done.code == 2
    assert done.stderr.startswith("lte: profile = ")


def test_an_interrupt_before_the_first_step_is_one_line(lte: Lte, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ltecli.commands.profile.list_command", interrupted)
    assert_one_line(lte("profile", "list"), 130, ["interrupted"])


@pytest.mark.skipif(os.name != "posix", reason="Windows removes no folder that a process is in")
def test_a_removed_folder_and_closed_streams_are_no_traceback(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"cd {gone} && rmdir {gone} && exec {sys.executable} -m ltecli plan"
    outcome = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment(), check=False)
    assert outcome.returncode == 2
    assert outcome.stderr == "lte: the current folder was removed; cd to one that exists\n"
    command = f"exec {sys.executable} -m ltecli profile show h200 >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], env=environment(), check=False).returncode == 0
