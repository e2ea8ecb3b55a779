"""Help pages: options under headings, lines that fit, and an example that the command takes."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main

from ltecli.app import app
from ltecli.help_pages import EXAMPLES, HEADINGS, heading_of
from tests.ltecli.command import Lte


def commands(group: Any = None, path: str = "lte") -> Iterator[tuple[str, Any]]:
    """Yield all commands by their full names."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


COMMANDS = dict(commands())


@pytest.mark.parametrize("columns", ["80", "120"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_page_fits_and_ends_with_an_example(
    lte: Lte, monkeypatch: pytest.MonkeyPatch, command: str, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    page = lte(*command.split()[1:], "--help").stdout
    lines = page.rstrip().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-2:] == ["Example:", f"  {EXAMPLES[command]}"]
    headings = [line.removesuffix(":") for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings[:-1] == [heading for heading in HEADINGS if heading in headings]
    assert "Output" in headings and "…" not in page


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_is_a_line_of_that_command(command: str) -> None:
    words = shlex.split(EXAMPLES[command])[len(command.split()) :]
    words = words[: words.index(">")] if ">" in words else words
    with COMMANDS[command].make_context(command, words) as ctx:  # raises a usage error for one it does not take
        assert any(ctx.params.values()) or not words


def test_options_stand_under_what_they_are_for() -> None:
    names = {heading_of(name) for name in ("profile", "rank", "join", "why", "out")}
    assert names == set(HEADINGS)
