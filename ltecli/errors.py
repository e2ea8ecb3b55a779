"""Exceptions of commands become one line and an exit code, here and nowhere else."""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable
from typing import ParamSpec

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
    and broken pipes itself.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return command(*args, **kwargs) or DONE
        except BrokenPipeError:
            # The reader (head, less) has left, which is no failure; but Python must not flush into the pipe at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return DONE
        except tuple(EXIT_CODES) as error:
            if os.environ.get("LTE_DEBUG") == "1":
                raise
            sys.stderr.write(f"lte: {one_line(str(error)) or 'interrupted'}\n")
            return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))

    return run
