"""Exceptions that end the program with one line instead of a traceback; ltecli.errors maps each to an exit code."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class InputError(Exception):
    """User's mistake, reported in one line that names the field, the value, the rule and the next move."""


class RunFailedError(Exception):
    """Failure of a run that had begun (a full disk, a loss that is not finite); its text says what is saved."""


FIRST_LINE_CHARACTERS = 300


def first_line(error: BaseException) -> str:
    """Return an error's message on one line, cut to FIRST_LINE_CHARACTERS, without torch's source places and advice."""
    text = " ".join(str(error).split()).partition(" Exception raised from ")[0].partition(" This is typically")[0]
    return re.sub(r"\[[^\]]*/gloo/[^\]]*\] ", "", text)[:FIRST_LINE_CHARACTERS]


def near_match(given: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: the closest known one, if any is close, and the list of known ones."""
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    # A typo in a short name changes half of its letters: accept that if the first letter is right.
    close = close or difflib.get_close_matches(given, [x for x in names if x[:1] == given[:1]], n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names)}"


class NothingFeasibleError(Exception):
    """Failure of a plan: no candidate fits the hardware. Its text names the nearest miss and how to make it fit."""
