"""Lines of README and docs that call `lte`: found in code blocks and in running text, so that tests can try each.

A block whose lines cannot be run by a test (they need three machines, an hour, a GPU) stands under a comment that says
why, which no reader of the rendered page sees:

    <!-- not run: needs three machines -->

test_lines.py beside this file runs the others in a folder that has what they name (`write_user_folder`), and holds the
options of all of them against the program's.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_MARK = re.compile(r"<!-- not run: (.+) -->")
_CALL = re.compile(r"^\s*(?:\$ )?(lte( \S.*)?)$")  # a row of a table has more spaces
_SPAN = re.compile(r"`(lte [^`]+)`")


@dataclass(frozen=True)
class Line:
    """A line that calls `lte`."""

    page: str
    number: int
    """Number of the line in its page, from 1."""
    text: str
    """The line as a shell gets it, without the prompt."""
    not_run: str | None = None
    """Why no test runs it."""

    @property
    def words(self) -> list[str]:
        """Its words, without a comment."""
        return shlex.split(self.text, comments=True)

    @property
    def calls(self) -> list[list[str]]:
        """The arguments of each call of `lte` in it, without what a shell takes for itself."""
        calls: list[list[str]] = []
        words = iter(["&&", *self.words])
        is_lte = False
        for word in words:
            if word in ("&&", "|", ";"):
                is_lte = next(words, None) == "lte"
                if is_lte:
                    calls.append([])
            elif word == ">":
                next(words, None)
            elif is_lte:
                calls[-1].append(word)
        return calls


def block_lines(page: Path) -> Iterator[Line]:
    """Yield the lines of a page's code blocks that call `lte`."""
    mark: str | None = None
    is_fenced = was_block = False
    pending: str | None = None
    for number, text in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if found := _MARK.fullmatch(text.strip()):
            pending, was_block = found[1], False
            continue
        is_fence = text.lstrip().startswith("```")
        is_fenced ^= is_fence
        is_block = is_fenced or is_fence or text.startswith("    ")
        if is_block and not was_block:  # a mark counts for the block after it alone
            mark, pending = pending, None
        elif not is_block and text.strip():
            pending = None
        was_block = is_block or (was_block and not text.strip() and not is_fenced and pending is None)
        if is_block and not is_fence and (call := _CALL.match(text)):
            yield Line(_name(page), number, call[1], mark)


def span_lines(page: Path) -> Iterator[Line]:
    """Yield the calls of `lte` in a page's running text, which leave away what does not matter there."""
    text = page.read_text(encoding="utf-8")
    for match in _SPAN.finditer(text):
        yield Line(_name(page), text.count("\n", 0, match.start()) + 1, " ".join(match[1].split()), "in running text")


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()
