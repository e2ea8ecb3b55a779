"""Find the folder of files that are costly to make again: prepared data, and rates measured on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from simulate.common.errors import InputError

CACHE_VARIABLE = "LTE_CACHE"


def cache_folder() -> Path:
    """Return the folder of cache files: LTE_CACHE, or `lte` in the user's cache directory; raises InputError."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given).absolute()
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "lte"
    try:
        return Path.home() / ".cache" / "lte"
    except RuntimeError:  # a container's --user that its list of users lacks, and no HOME
        raise InputError(
            f"{CACHE_VARIABLE}: this user has no home folder for the cache of data; export {CACHE_VARIABLE}=FOLDER"
        ) from None
