"""The one printer: results to stdout, progress and hints to stderr, JSON for scripts, nothing extra when quiet."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

WIDE = 400
"""Columns for tables that no terminal shows: nothing is cut."""


class _Console(Console):
    """Prints text as it is: brackets and colons in a name are neither markup nor emoji."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def on_broken_pipe(self) -> None:
        """Leave a reader that has seen enough to the one place that deals with it."""
        raise BrokenPipeError


class Output:
    """Where a command speaks."""

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet
        self.console = _Console(soft_wrap=not sys.stdout.isatty())
        self.hints = _Console(stderr=True, quiet=quiet, soft_wrap=not sys.stderr.isatty())

    def text(self, text: str) -> None:
        """Print a line of the result, as it is."""
        if not self.as_json:
            self.console.print(text)

    def heading(self, text: str) -> None:
        """Print a heading of the result."""
        if not self.as_json:
            self.console.print(text, style="bold")

    def table(self, table: Table, secondary: Sequence[str] = ()) -> None:
        """Print a table of the result; a terminal too narrow for it goes without the `secondary` columns.

        Outside a terminal it is as wide as it needs to be.
        """
        if self.as_json:
            return
        console = _Console(width=None if self.console.is_terminal else WIDE)
        if console.measure(table, options=console.options.update(width=WIDE)).maximum > console.width:
            table.columns = [column for column in table.columns if column.header not in secondary]
        console.print(table)

    def json(self, document: Any) -> None:
        """Print the result for scripts, where --json asks for it."""
        if self.as_json:
            sys.stdout.write(json.dumps(document, allow_nan=False) + "\n")
            sys.stdout.flush()

    def hint(self, text: str) -> None:
        """Print progress or advice, which is no result."""
        self.hints.print(text)

    def warning(self, text: str) -> None:
        """Print what went wrong without ending the command, also when quiet."""
        sys.stderr.write(f"lte: {text}\n")
        sys.stderr.flush()


def plain_table(*columns: str) -> Table:
    """Return a table with right-aligned columns after the first; what is too wide for a terminal goes on below."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=index == 0, overflow="fold")
    return table


def scores_text(val_loss: float | None, val_accuracy: float | None = None) -> str:
    """Return what an evaluation found; the accuracy where there is one."""
    loss = f"validation loss {'-' if val_loss is None else format(val_loss, '.4f')}"
    return loss if val_accuracy is None else f"{loss}, top-1 accuracy {val_accuracy:.2%}"
