"""Count a text for a plan: exactly where that takes a moment, else about, from sizes of files and a sample; torch-free.

A plan needs to know whether text suffices and how often it is read, and must not read gigabytes for it. Text of fewer
than LARGE_BYTES on the disk is read and checked. Of more, plain UTF-8 has as many bytes as its files; what is
compressed or holds records is scaled up from a sample of its beginnings, and so are tokens longer than a byte. Nothing
is digested; training checks all. simulate.data.load checks a plan's text here, simulate.planning.verdict counts passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from simulate.common.errors import InputError
from simulate.common.units import bytes_text
from simulate.config.tables import BPE, BYTES, Data
from simulate.data.text import Text, files_of, is_large, read_bytes
from simulate.data.text_files import is_plain, sample_text
from simulate.data.tokenizer import tokens_per_byte

SAMPLED_FILES, SAMPLED_BYTES, TOKENIZED_BYTES = 4, 1 << 22, 1 << 20
"""Files of a large text, spread over all, that a plan looks into, the text that it reads of them, and what of that it
counts tokens in."""


@dataclass(frozen=True)
class TextSize:
    """The size of a text, before any of it is held out."""

    num_bytes: int
    """Bytes as UTF-8."""
    is_about: bool
    """Whether the bytes are scaled up from a sample."""
    sample: bytes
    """Text from its beginnings; all of a small one."""
    is_sampled: bool
    """Whether the plan read the sample alone."""

    def text(self, name: str) -> Text:
        """Return a text of this many bytes whose content is not read, and takes no memory."""
        largest = max(self.sample, default=0)
        return Text(np.broadcast_to(np.uint8(0), (self.num_bytes,)), name, largest=largest)


@dataclass(frozen=True)
class TokenCount:
    """The tokens of a text, before any of it is held out."""

    count: int
    is_about: bool


def text_size(data: Data) -> TextSize:
    """Return the size of the text at a path, or of the default text; raises InputError."""
    if data.path is None:
        return _whole(read_bytes(data))
    files, stamp = files_of(data)
    return _sampled(tuple(files), data.field, stamp) if is_large(files) else _whole(read_bytes(data))


def _whole(text: Text) -> TextSize:
    return TextSize(text.num_bytes, False, text.tokens.tobytes(), False)


@lru_cache(maxsize=4)
def _sampled(files: tuple[Path, ...], field: str | None, stamp: str) -> TextSize:
    """Return the size of a large text; `stamp` makes files that change another argument."""
    disk_bytes = sum(file.stat().st_size for file in files)
    spread = [files[len(files) * part // SAMPLED_FILES] for part in range(SAMPLED_FILES)]
    sample = sample_text(list(dict.fromkeys(spread)), field, SAMPLED_BYTES)
    if all(map(is_plain, files)):  # newlines stand between files
        return TextSize(disk_bytes + len(files) - 1, False, sample.content, True)
    return TextSize(round(disk_bytes * len(sample.content) / max(1.0, sample.file_bytes)), True, sample.content, True)


def sample_note(data: Data) -> list[str]:
    """Return a note on what a plan took from a sample; none where it read all. Raises InputError."""
    size = text_size(data)
    if not size.is_sampled:
        return []
    about = "about " if size.is_about else ""
    tokens = ""
    if data.tokenizer != BYTES and (count := count_tokens(data)) is not None:
        tokens = f", about {count.count / 1e6:.3g} million tokens"
        if data.tokenizer.startswith(BPE):
            tokens += f"; {data.tokenizer} is trained when training starts, and its vocabulary taken as named"
    return [
        f"data.path = {data.path!r} has {about}{bytes_text(size.num_bytes)} of text{tokens}; the plan read "
        f"{bytes_text(len(size.sample))} of it, and training reads and checks all of it once"
    ]


def count_tokens(data: Data) -> TokenCount | None:
    """Return a text's tokens; None where they are not known before training: of the hub, or without the library."""
    if data.name not in (None, "stdlib") or (data.path is not None and not Path(data.path).exists()):
        return None
    size = text_size(data)
    if data.tokenizer == BYTES:
        return TokenCount(size.num_bytes, size.is_about)
    try:
        return TokenCount(round(size.num_bytes * _tokens_per_byte(size.sample[:TOKENIZED_BYTES], data.tokenizer)), True)
    except InputError:  # a given tokenizer.json was refused before; without the library bpe:N is planned all the same
        return None


_tokens_per_byte = lru_cache(maxsize=4)(tokens_per_byte)


def held_bytes(data: Data) -> int:
    """Return the memory that text at a path takes; 0 where it is memory-mapped, or no file exists yet."""
    if data.path is None or data.tokenizer != BYTES or not Path(data.path).exists():
        return 0
    return 0 if is_large(files_of(data)[0]) else read_bytes(data).num_bytes
