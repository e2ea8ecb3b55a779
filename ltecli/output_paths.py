"""Output paths: may a command write the file or folder that an option names, and the one style of refusals.

Commands check their targets before they start, so that an hour of work does not end in a refusal. lte plan, report,
probe, validate, export, train, secret, invite, join and profile measure write through here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from simulate.common import toml_io
from simulate.common.errors import InputError


def check_file(path: Path, force: bool, example: str, option: str = "--out") -> None:
    """Raise InputError where a file cannot be written; `example` is a name for it in a folder."""
    if path.is_dir():
        raise InputError(f"{option} {path} is a folder; name a file in it, for example {path / example}")
    if path.exists() and not force:
        raise InputError(f"{option} {path} exists; add --force to replace it, or choose another name")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise InputError(f"{option} {path}: {above} is no folder; choose another")
    if not os.access(above, os.W_OK):
        raise InputError(f"{option} {path}: {above} is not writable; choose another folder")


def check_absent(path: Path, option: str = "--out", instead: str = "remove it, or choose another name") -> None:
    """Raise InputError where something, a broken link included, has the name of a file or folder to make."""
    # `exists` follows links and would miss a broken one, which the name belongs to all the same.
    if os.path.lexists(path):
        raise InputError(f"{option} {path} exists; {instead}")


def write_file(path: Path, text: str, option: str = "--out") -> None:
    """Write a file whole or not at all, and the folders above it; raises InputError where the system refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        toml_io.write_atomically(path, text.encode())
    except OSError as error:
        raise unwritable(path, error, option) from None


def write_private(path: Path, text: str, option: str) -> None:
    """Write a new file that only its owner can read; raises InputError where there is one, or the system refuses."""
    check_absent(path, option)
    try:
        # Private from the first byte; O_EXCL follows no link that somebody else has put there.
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise unwritable(path, error, option) from None
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)


def unwritable(path: Path, error: OSError, option: str = "--out") -> InputError:
    """Return the error for a path that the system refuses to write."""
    return InputError(f"{option} {path} cannot be written ({error.strerror}); choose another folder")


def check_distinct(paths: Mapping[str, Path | None]) -> None:
    """Raise InputError where two options name the same file; keys are the options."""
    seen: dict[Path, str] = {}
    for option, path in paths.items():
        if path is not None and (other := seen.setdefault(path.resolve(), option)) != option:
            raise InputError(f"{option} {path} is the file of {other}, too; name another")


@dataclass(frozen=True)
class CsvTarget:
    """The place where --csv goes: nowhere, to a file, or to stdout, in the place of what a command prints."""

    path: Path | None = None
    is_stdout: bool = False

    @classmethod
    def of(cls, given: Path | None, force: bool, as_json: bool) -> CsvTarget:
        """Return the place that --csv names, "-" for stdout; raises InputError where it cannot be written."""
        if given is None:
            return cls()
        if str(given) == "-":
            if as_json:
                raise InputError("--csv - and --json both write to stdout; keep one, or name a file")
            return cls(is_stdout=True)
        check_file(given, force, "table.csv", "--csv")
        return cls(given)

    @property
    def is_wanted(self) -> bool:
        """Whether --csv was given."""
        return self.is_stdout or self.path is not None

    def write(self, text: str) -> None:
        """Write the table."""
        if self.path is not None:
            write_file(self.path, text, "--csv")
        else:
            sys.stdout.write(text)
