"""Read text in the encoding that its byte order mark names, UTF-8 where it has none; the mark is no part of the text.

Editors and shells of Windows write marks: Notepad before UTF-8, PowerShell's `>` before UTF-16.
"""

from __future__ import annotations

import codecs
from pathlib import Path

MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    # Before those of 16 bits, since UTF-32's first bytes are UTF-16's mark.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks, and Python's names for the encodings, which drop the mark."""
MARK_BYTES = 4
"""Most bytes of a mark."""


def encoding_of(start: bytes) -> str:
    """Return the encoding of a text, given its first MARK_BYTES bytes."""
    return next((name for mark, name in MARKS if start.startswith(mark)), "utf-8")


def decoded(content: bytes) -> str:
    """Return a file's content as text, with line ends as they are; raises UnicodeDecodeError."""
    return content.decode(encoding_of(content[:MARK_BYTES]))


def read_text(path: Path) -> str:
    """Return the text of a file, with every line end as a newline; raises OSError and UnicodeDecodeError."""
    with path.open("rb") as file:
        encoding = encoding_of(file.read(MARK_BYTES))
    return path.read_text(encoding=encoding)
