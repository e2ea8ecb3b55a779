"""Room on a disk, asked for before it is used: a mapped file on a full disk kills the process that writes into it."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

TEMPORARY_VARIABLE = "TMPDIR"
_UNKNOWN = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
"""Errors of file systems that cannot reserve room, such as some of networks."""


def reserve(handle: int, size: int) -> None:
    """Make an open file so many bytes long, zeros where it had none; raises OSError where the disk has no room."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
            return
        except OSError as error:
            if error.errno not in _UNKNOWN:
                raise
    os.truncate(handle, size)


def temporary_folder() -> Path:
    """Return the folder of temporary files; where none can be written to, the one that should be."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        return Path(os.environ.get(TEMPORARY_VARIABLE, "/tmp"))
