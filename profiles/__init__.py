"""Hardware profiles shipped as TOML, and the loader that finds them by name."""

from __future__ import annotations

from importlib import resources

SUFFIX = ".toml"


def names() -> list[str]:
    """Return the names of the shipped profiles, sorted."""
    files = resources.files(__name__).iterdir()
    return sorted(f.name.removesuffix(SUFFIX) for f in files if f.name.endswith(SUFFIX))


def read_text(name: str) -> str:
    """Return the TOML text of a shipped profile; raises FileNotFoundError for an unknown name."""
    return resources.files(__name__).joinpath(name + SUFFIX).read_text(encoding="utf-8")
