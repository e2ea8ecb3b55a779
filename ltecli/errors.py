"""Exceptions become one line and an exit code, here and nowhere else."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

from simulate.common.errors import InputError, NothingFeasibleError, RunFailedError
from simulate.launch.keys import AGENT_THREAD, LISTENER_THREAD

DONE, FAILED, BAD_INPUT, NOTHING_FEASIBLE, INTERRUPTED = 0, 1, 2, 3, 130


EXIT_CODES: dict[type[BaseException], int] = {
    InputError: BAD_INPUT,
    NothingFeasibleError: NOTHING_FEASIBLE,
    RunFailedError: FAILED,
    KeyboardInterrupt: INTERRUPTED,
}


def leave_at_once_if_stuck(code: int) -> None:
    """End this process where such a thread is left: Python's own end would abort under it."""
    if any(thread.name in (AGENT_THREAD, LISTENER_THREAD) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def one_line(text: str) -> str:
    """Return text without line breaks, which a name or a value may have brought in."""
    return " ".join(text.split())


def guarded(command: Callable[[], int | None]) -> int:
    """Return a command's exit code, having printed one line for a known exception (LTE_DEBUG=1 lets it through)."""
    try:
        return command() or DONE
    except BrokenPipeError:
        # The reader (head, less) has seen enough: that is no failure, but Python must not try to flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except tuple(EXIT_CODES) as error:
        if os.environ.get("LTE_DEBUG") == "1":
            raise
        sys.stderr.write(f"lte: {one_line(str(error)) or 'interrupted'}\n")
        return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
