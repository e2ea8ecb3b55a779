"""The secret that all nodes of a run share: read once, never printed, used only as a key of HMAC-SHA256."""

from __future__ import annotations

import codecs
import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from simulate.common.errors import InputError

VARIABLE = "LTE_SECRET"
MIN_BYTES = 16
MAX_BYTES = 4096
_HOW = f"lte reads it from --secret-file PATH or from the environment variable {VARIABLE}"


class Secret:
    """A shared secret that authenticates messages; str, repr and pickle do not reveal it."""

    __slots__ = ("_key",)

    def __init__(self, secret: bytes) -> None:
        if not MIN_BYTES <= len(secret) <= MAX_BYTES:
            raise InputError(
                f"the secret has {len(secret)} bytes; {MIN_BYTES} to {MAX_BYTES} are needed, and random ones: {_HOW}"
            )
        # Keep a digest: printing this object's parts must not show what the user typed.
        self._key = hmac.digest(b"lte preflight secret", secret, "sha256")

    @classmethod
    def for_loopback(cls) -> Secret:
        """Return the publicly known key of runs without a secret; loopback only."""
        return cls(hashlib.sha256(b"lte preflight without a secret").digest())

    def mac(self, label: str, data: bytes) -> bytes:
        """Return HMAC-SHA256 of data, 32 bytes; a MAC with one label does not verify with another."""
        return hmac.digest(self._key, label.encode() + b"\0" + data, "sha256")

    def derived(self, label: str, data: bytes) -> Secret:
        """Return a secret for one purpose or one preflight only."""
        return Secret(self.mac(f"derived {label}", data))

    def __repr__(self) -> str:
        return "Secret(hidden)"

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: object) -> Secret:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not written anywhere")


def make_secret() -> str:
    """Return a new random secret of 256 bits, as text that survives a shell, a file and an environment variable."""
    return secrets.token_urlsafe(32)


def read_secret(path: Path | None, environ: Mapping[str, str] | None = None) -> Secret | None:
    """Return the secret in a file, else in LTE_SECRET, else None; white space around it is removed.

    Raises InputError for a file that is missing, not plain, readable by others or too short; never quotes its content.
    """
    if path is not None:
        # Editors of Windows put a mark before text, which is no part of the secret.
        return Secret(_read_private(path).removeprefix(codecs.BOM_UTF8).strip())
    # Never an option of the command line, since arguments show in the list of processes.
    given = (os.environ if environ is None else environ).get(VARIABLE)
    return None if given is None else Secret(given.strip().encode())


def _read_private(path: Path) -> bytes:
    try:
        # Non-blocking: opening a named pipe would wait for its writer.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise InputError(f"--secret-file {path}: no such file; copy node 0's there (chmod 600)") from None
    except OSError as error:
        raise InputError(f"--secret-file {path} cannot be read ({error.strerror}); check its permissions") from None
    try:
        # Check the opened file, not its name, which may stand for another file by now.
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise InputError(f"--secret-file {path} is no plain file; save the secret in one, or use {VARIABLE}")
        if os.name == "posix" and mode & 0o077:
            permissions = stat.S_IMODE(mode)
            raise InputError(f"--secret-file {path} is open to other users (mode {permissions:o}); chmod 600 {path}")
        return os.read(handle, MAX_BYTES + 1024)
    finally:
        os.close(handle)
