"""The one exception for mistakes a user can mend, so that a caller can tell them from faults of ours."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class InputError(Exception):
    """A mistake in what the user gave: one line naming the field, the value, the rule and the next move."""


class RunFailedError(Exception):
    """A run that could not go on (a full disk, a loss that is not finite); says what is saved."""


FIRST_LINE_CHARACTERS = 300


def first_line(error: BaseException) -> str:
    """Return an error's message on one line, cut to FIRST_LINE_CHARACTERS, without torch's source places and advice."""
    text = " ".join(str(error).split()).partition(" Exception raised from ")[0].partition(" This is typically")[0]
    return re.sub(r"\[[^\]]*/gloo/[^\]]*\] ", "", text)[:FIRST_LINE_CHARACTERS]


def near_match(given: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x'? " when a known name is close to the given one, and the known names."""
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    # Of names so short that half of the letters are close, those that begin alike.
    close = close or difflib.get_close_matches(given, [x for x in names if x[:1] == given[:1]], n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names)}"


class NothingFeasibleError(Exception):
    """No candidate fits the hardware; names the nearest miss and what would make it fit."""
