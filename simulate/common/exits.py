"""An end of the process that Python's own teardown cannot change."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """Run what is registered for the exit, flush, and end with this exit code.

    Python's teardown aborts a process whose daemon threads are inside of C++ just then, and ends one with SIGINT, not
    with its exit code, where it runs a module (`python -m`) and an interrupt met code generated from text, though it
    was caught further out.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
