"""Report the progress of work that may take long: the engine counts units, the command line shows them.

A loader deep in the engine must not know of terminals, and passing a reporter through every caller would touch a dozen
signatures. So `task` asks a context variable; without `reported_by` nothing is shown, as in launched processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

Advance = Callable[[float], object]
"""Called with the units that were done since the last call."""
Reporter = Callable[[str, int], AbstractContextManager[Advance]]
"""Called with a title and the number of all units."""

_reporter: ContextVar[Reporter] = ContextVar("reporter")


@contextmanager
def reported_by(reporter: Reporter) -> Iterator[None]:
    """Report all tasks within this context to `reporter`."""
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)


def task(title: str, total: int) -> AbstractContextManager[Advance]:
    """Return the context of a piece of work of `total` units, which yields the function to count them with."""
    reporter = _reporter.get(None)
    return nullcontext(count_nothing) if reporter is None else reporter(title, total)


def count_nothing(units: float) -> None:
    """Drop the count, where nobody shows it."""
