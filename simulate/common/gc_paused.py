"""Pauses of the garbage collector: of all of it, for code whose objects all stay in use; or of what exists already."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Disable the collector: planning makes no garbage, and collection costs 12 % of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        # A caller that had disabled it keeps it disabled.
        if was_enabled:
            gc.enable()


@contextmanager
def earlier_garbage_kept() -> Iterator[None]:
    """Keep the collector from objects that exist already: their garbage is not freed inside, and costs no time.

    Measurements of memory count what a program allocates and frees, so what came before it must stay. Collecting that
    garbage first would look through all objects, which takes longer than most programs that are measured.
    """
    was_frozen = gc.get_freeze_count() > 0
    gc.freeze()
    try:
        yield
    finally:
        # A caller that had frozen objects keeps them frozen: they cannot be told from the others any more.
        if not was_frozen:
            gc.unfreeze()
