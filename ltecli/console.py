"""Printer of all commands: results to stdout, progress and hints to stderr, JSON for scripts, no hints when quiet."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from simulate.common.progress import Advance
from simulate.common.units import bytes_text

FIGURE = 15
"""Characters up to which a column holds figures or a word, which no terminal needs to cut."""
WIDE = 400
"""Width of tables outside a terminal, in characters: no cell is cut."""

SILENT_S, LINE_EVERY_S = 1.0, 10.0
"""Seconds that work may take without a bar, and between two lines of progress outside a terminal."""


class _Console(Console):
    """A console that prints text unchanged: brackets and colons in a name are neither markup nor emoji."""

    def __init__(self, **options: Any) -> None:
        # In a notebook rich would display what it is given, whatever the stream.
        super().__init__(highlight=False, markup=False, emoji=False, force_jupyter=False, **options)


class Output:
    """Output of one command; with --json the JSON document alone is printed: text, headings and tables are skipped.

    With `into`, the result goes there instead of stdout, as it would be printed into a file. With `is_mute` the
    document is skipped, too: the command prints something else to stdout.
    """

    def __init__(
        self, as_json: bool = False, quiet: bool = False, is_mute: bool = False, into: TextIO | None = None
    ) -> None:
        self.as_json, self.quiet, self.is_mute, self.into = as_json, quiet, is_mute, into
        # In a pipe a line of text stays one line, so that grep and diff can work on it.
        is_terminal = into is None and sys.stdout.isatty()
        self.console = _Console(soft_wrap=not is_terminal, file=into, force_terminal=None if into is None else False)
        self.hints = _Console(stderr=True, quiet=quiet, soft_wrap=not sys.stderr.isatty())

    def text(self, text: str | Text) -> None:
        """Print a line of the result."""
        if not (self.as_json or self.is_mute):
            self.console.print(text)

    def heading(self, text: str) -> None:
        """Print a heading of the result."""
        if not (self.as_json or self.is_mute):
            self.console.print(text, style="bold")

    def table(self, table: Table, secondary: Sequence[str] = ()) -> None:
        """Print a table of the result; a terminal too narrow for it leaves out the `secondary` columns.

        Outside a terminal it is as wide as its cells.
        """
        if self.as_json or self.is_mute:
            return
        is_terminal = self.console.is_terminal
        console = _Console(width=None if is_terminal else WIDE, file=self.into, force_terminal=is_terminal)
        # Measured without the terminal's limit: within it cells would wrap, and any table would seem to fit.
        options = console.options.update(width=WIDE)
        if console.measure(table, options=options).maximum > console.width:
            table.columns = [column for column in table.columns if column.header not in secondary]
        if console.measure(table, options=options).maximum > console.width:
            _wrap_texts(table, console.width)
        console.print(table)

    def json(self, document: Any) -> None:
        """Print the result for scripts, if --json is given."""
        if self.as_json:
            # Past rich, which would wrap the document at the terminal's width.
            stream = self.into or sys.stdout
            stream.write(json.dumps(document, allow_nan=False) + "\n")
            stream.flush()

    def hint(self, text: str) -> None:
        """Print progress or advice, to stderr."""
        self.hints.print(text)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Advance]:
        """Show work that takes longer than a second: a bar on a terminal, elsewhere lines; nothing when quiet."""
        begin, done, bar, line_at = time.monotonic(), 0.0, None, SILENT_S

        def advance(units: float) -> None:
            nonlocal done, bar, line_at
            done += units
            passed_s = time.monotonic() - begin
            if self.quiet or passed_s < SILENT_S:
                return
            if not self.hints.is_terminal:
                if passed_s >= line_at:
                    line_at = passed_s + LINE_EVERY_S
                    self.hint(f"{title}: {min(1.0, done / max(1, total)):.0%}")
                return
            if bar is None:
                from rich.progress import Progress  # imported late: most commands are done within the second

                bar = Progress(console=self.hints, transient=True)
                bar.add_task(title, total=total)
                bar.start()
            bar.update(bar.task_ids[0], completed=min(done, total))

        try:
            yield advance
        finally:
            if bar is not None:
                bar.stop()

    def warning(self, text: str) -> None:
        """Print a problem that does not end the command, also when quiet."""
        # Past the console of hints, which is mute when quiet.
        sys.stderr.write(f"lte: {text}\n")
        sys.stderr.flush()


def text_of(show: Callable[[Output], object]) -> str:
    """Return what a function prints as its result, as it would be printed into a file, without the last newline."""
    into = io.StringIO()
    show(Output(into=into))
    return into.getvalue().rstrip("\n")


def _wrap_texts(table: Table, width: int) -> None:
    """Let a table's wide columns wrap, and keep figures whole, where the terminal has room for them."""
    widths = [max(cell_len(str(cell)) for cell in (column.header, *column.cells)) for column in table.columns]
    if sum(min(size + 2, FIGURE + 2) for size in widths) > width:
        return  # as the table was made
    for column, size in zip(table.columns, widths, strict=True):
        column.no_wrap = size <= FIGURE


def plain_table(*columns: str) -> Table:
    """Return a table with right-aligned columns after the first; on a narrow terminal all but the first wrap."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=index == 0, overflow="fold")
    return table


def memory_text(tensors: int, allocator: int, reserved: int) -> str:
    """Return a device's planned bytes by whom they are of, and their sum, the same wherever a run's memory is told."""
    allocated = f" + {bytes_text(allocator)} allocator and libraries" if allocator else ""
    total = bytes_text(tensors + allocator + reserved)
    return f"{bytes_text(tensors)} tensors{allocated} + {bytes_text(reserved)} system = {total}"


def scores_text(val_loss: float | None, val_accuracy: float | None = None) -> str:
    """Return an evaluation's loss, and its accuracy where there is one, for people."""
    loss = f"validation loss {'-' if val_loss is None else format(val_loss, '.4f')}"
    return loss if val_accuracy is None else f"{loss}, top-1 accuracy {val_accuracy:.2%}"
