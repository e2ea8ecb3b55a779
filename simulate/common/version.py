"""Version of the installed package, for `lte --version` and for the files that a run writes."""

from __future__ import annotations

PACKAGE = "lte"


def version() -> str:
    """Return the version in the package's installed metadata."""
    from importlib.metadata import version as installed  # imported late: it takes a tenth of the start-up time

    return installed(PACKAGE)
