"""Find the folder of files that are costly to make again: prepared data, and rates measured on this machine."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "LTE_CACHE"


def cache_folder() -> Path:
    """Return the folder of cache files: LTE_CACHE, or `lte` in the user's cache directory."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lte"
