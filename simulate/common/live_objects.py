"""Objects of this process that a run names: a network, a data set or a loss that somebody holds in Python; torch-free.

A run.toml names what it needs by text. An object has no such name, so `register` gives it one, `live:KIND-DIGEST`, and
`find` leads back to it. The digest is of what the object computes from, so that another object never takes its place.
No other process has the object: `find` says so in one line. ltecli.api registers; whatever reads a run's names finds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any
from weakref import WeakValueDictionary

from simulate.common.errors import InputError

LIVE = "live:"
"""Prefix of the names."""
DIGITS = 12
"""Characters of a digest in a name."""
# Weak, so that a notebook which runs a cell fifty times does not keep fifty data sets: whoever plans holds them.
_OBJECTS: WeakValueDictionary[str, Any] = WeakValueDictionary()


def register(kind: str, digest: str, found: Any) -> str:
    """Return the name of an object; it is found by it for as long as the caller holds the object."""
    name = f"{LIVE}{kind}-{digest[:DIGITS]}"
    _OBJECTS[name] = found
    return name


def find(field: str, name: str) -> Any:
    """Return the object of a name; raises InputError in a process that does not have it."""
    found = _OBJECTS.get(name)
    if found is None:
        raise InputError(
            f"{field} = {name!r} is an object of the Python process that made the run, and this one does not have it; "
            "give it again by lte.open(FOLDER, model=..., data=..., loss=...), or name package.module:Name"
        )
    return found


def is_live(name: object) -> bool:
    """Whether a value of run.toml names an object of a process."""
    return isinstance(name, str) and name.startswith(LIVE)


def digest_of(parts: Iterable[bytes | str]) -> str:
    """Return a hex digest of parts, in order; where one part ends counts, too."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()
