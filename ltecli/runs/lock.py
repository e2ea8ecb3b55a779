"""The lock of a run folder, which a process holds while it trains there; free of torch, for `lte watch`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from simulate.common.errors import InputError
from simulate.common.run_files import LOCK_FILE


@contextmanager
def lock_folder(path: Path) -> Iterator[None]:
    """Lock a run folder for this process; raises InputError where another process has locked it."""
    from filelock import FileLock, Timeout

    lock = FileLock(path / LOCK_FILE)  # the system releases it when this process dies
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{path} is being trained by another process; wait for it, or choose another --out") from None
    try:
        yield
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    """Whether a process trains in a run folder."""
    if not (path / LOCK_FILE).exists():  # a lock would make the file
        return False
    try:
        with lock_folder(path):
            return False
    except (InputError, OSError):  # read-only: who trains here may be another user
        return True
