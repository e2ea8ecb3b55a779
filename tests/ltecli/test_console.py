"""Numbers for people, and text printed as it is."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ltecli.console import Output, plain_table
from simulate.common.units import bytes_text, seconds_text
from tests.ltecli.command import Lte


@pytest.mark.parametrize(
    ("size", "text"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_500_000, "1.5 MB"), (12e9, "12 GB"), (5e12, "5 TB")],
)
def test_bytes_are_decimal(size: float | None, text: str) -> None:
    assert bytes_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.0, "0 us"), (2e-4, "200 us"), (0.05, "50 ms"), (90, "90 s"), (600, "10 min"), (7200, "2 h")],
)
def test_seconds_take_the_unit_that_fits(seconds: float | None, text: str) -> None:
    assert seconds_text(seconds) == text


def test_brackets_and_colons_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    text = "runs/[bold]x[/b] :100: [/]"
    output, table = Output(), plain_table("", text)
    table.add_row("name", text)
    output.text(text)
    output.heading(text)
    output.hint(text)
    output.table(table)
    captured = capsys.readouterr()
    assert captured.out.count(text) == 4
    assert captured.err == f"{text}\n"


def test_json_is_the_only_result_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(as_json=True)
    output.text("words")
    output.heading("words")
    output.table(plain_table("words"))
    output.json({"a": 1})
    assert capsys.readouterr().out == '{"a": 1}\n'


@pytest.mark.parametrize(("columns", "shown"), [("20", False), ("60", True)])
def test_a_narrow_terminal_goes_without_secondary_columns(
    columns: str, shown: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", columns)
    table = plain_table("#", "method", "uncounted", "time")
    table.add_row("1", "a method in many words", "beside", "3.25 s")
    Output().table(table, secondary=("uncounted",))
    text = capsys.readouterr().out
    assert ("uncounted" in text) == ("beside" in text) == shown
    assert "3.25 s" in text
    assert "…" not in text


@pytest.mark.parametrize("command", ["plan -p rtx3060_x4_home", "profile list"])
def test_a_terminal_of_eighty_columns_cuts_nothing(lte: Lte, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    assert "…" not in lte(*command.split()).stdout


class Clock:
    """A clock that goes on by `step_s` whenever it is read."""

    def __init__(self, step_s: float) -> None:
        self.now_s, self.step_s = 0.0, step_s

    def monotonic(self) -> float:
        self.now_s += self.step_s
        return self.now_s


@pytest.mark.parametrize(
    ("step_s", "quiet", "lines"),
    [(0.01, False, []), (3.0, False, ["reading: 10%", "reading: 50%", "reading: 90%"]), (3.0, True, [])],
    ids=["short", "long", "quiet"],
)
def test_work_of_more_than_a_second_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, step_s: float, quiet: bool, lines: list[str]
) -> None:
    monkeypatch.setattr("ltecli.console.time", Clock(step_s))
    with Output(quiet=quiet).progress("reading", 100) as advance:
        for _ in range(10):
            advance(10)
    captured = capsys.readouterr()
    assert (captured.out, captured.err.splitlines()) == ("", lines)


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    output, shown = Output(), io.StringIO()
    output.hints = Console(file=shown, force_terminal=True, width=80)
    monkeypatch.setattr("ltecli.console.time", Clock(3.0))
    with output.progress("reading", 100) as advance:
        advance(40)
    assert "reading" in shown.getvalue() and "40%" in shown.getvalue()
