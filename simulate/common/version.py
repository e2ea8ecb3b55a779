"""The installed version."""

from __future__ import annotations

PACKAGE = "lte"


def version() -> str:
    """Return the installed version."""
    from importlib.metadata import version as installed  # a tenth of the start-up time, and seldom needed

    return installed(PACKAGE)
