"""Exceptions of commands become one line and an exit code, here and nowhere else; so does a stdout that fails."""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, ParamSpec, TextIO, cast

from simulate.common.errors import InputError, NothingFeasibleError, RunFailedError
from simulate.launch.keys import AGENT_THREAD, LISTENER_THREAD

# Scripts rely on these numbers; 130 is the shell's own for Ctrl-C.
DONE, FAILED, BAD_INPUT, NOTHING_FEASIBLE, INTERRUPTED = 0, 1, 2, 3, 130
EXIT_CODES: dict[type[BaseException], int] = {
    InputError: BAD_INPUT,
    NothingFeasibleError: NOTHING_FEASIBLE,
    RunFailedError: FAILED,
    KeyboardInterrupt: INTERRUPTED,
}
P = ParamSpec("P")


class StdoutError(Exception):
    """Failure to write to stdout. No OSError, which commands read as a failure of their own files."""


class _Stdout:
    """A stream that raises StdoutError where writing fails: the disk is full, or the reader (head, less) has left."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text."""
        try:
            return self._stream.write(text)
        except OSError as error:
            raise StdoutError from error

    def flush(self) -> None:
        """Hand what was written to the system."""
        try:
            self._stream.flush()
        except OSError as error:
            raise StdoutError from error


@contextmanager
def stdout_checked() -> Iterator[None]:
    """Let a stdout that cannot be written raise StdoutError, also for what is flushed at the end."""
    with redirect_stdout(cast(TextIO, _Stdout(sys.stdout))):
        yield
        sys.stdout.flush()


def report_stdout_error(error: StdoutError) -> int:
    """Print the line for a stdout that cannot be written; returns the exit code. A reader that left is no failure."""
    # Python must not flush what is left at exit. A stdout of tests has no descriptor.
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    cause = error.__cause__
    if isinstance(cause, BrokenPipeError):
        return DONE
    reason = cause.strerror if isinstance(cause, OSError) else cause
    sys.stderr.write(f"lte: stdout cannot be written ({reason}); send it somewhere else, as in > result.txt\n")
    return FAILED


def exit_if_stuck(code: int) -> None:
    """End the process at once where a thread hangs in a call to the store: Python's own exit would abort under it."""
    if any(thread.name in (AGENT_THREAD, LISTENER_THREAD) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def one_line(text: str) -> str:
    """Return text on one line; a name or a value in it may have line breaks."""
    return " ".join(text.split())


def guarded(command: Callable[P, int | None]) -> Callable[P, int]:
    """Decorate a command: it returns an exit code, and prints one line for a known exception.

    With LTE_DEBUG=1 exceptions pass through. The typer app cannot do this in one place, since click catches interrupts
    itself.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return command(*args, **kwargs) or DONE
        except tuple(EXIT_CODES) as error:
            if os.environ.get("LTE_DEBUG") == "1":
                raise
            for line in error.lines if isinstance(error, InputError) else (str(error),):
                sys.stderr.write(f"lte: {one_line(line) or 'interrupted'}\n")
            return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))

    return run
