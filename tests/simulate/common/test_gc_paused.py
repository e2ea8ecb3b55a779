"""Pauses of the garbage collector: what it leaves alone inside, and that it goes on afterwards."""

from __future__ import annotations

import gc
import weakref

from simulate.common.gc_paused import collector_paused, earlier_garbage_kept


class Node:
    """An object that only the collector frees, since it refers to itself."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_from_before_stays_and_newer_is_collected() -> None:
    before = weakref.ref(Node())
    with earlier_garbage_kept():
        during = weakref.ref(Node())
        gc.collect()
        assert before() is not None
        assert during() is None
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert before() is None


def test_what_a_caller_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        with earlier_garbage_kept():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_a_pause_ends_as_it_began() -> None:
    with collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
