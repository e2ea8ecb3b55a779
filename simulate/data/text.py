"""Text as tokens, from UTF-8 files, the Hugging Face hub or, by default, Python's own source; plans check it, no torch.

A text is one array of bytes or of a tokenizer's tokens, its last tenth held out. Memory holds small ones; large ones
are read once, to check, count and digest them, and memory-mapped from then on: one plain file itself, anything else as
a copy in the cache. simulate.data.load calls `load_text` for a run; simulate.data.text_size estimates large ones for a
plan; simulate.data.batches cuts windows out of a device's part (`shard_bounds`).
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from simulate.common.errors import InputError
from simulate.config.tables import BYTE_VALUES, BYTES, Data
from simulate.data.cache import LARGE_BYTES, Draft, cached, cached_facts, stamp_of
from simulate.data.file_tree import read_folder
from simulate.data.huggingface import hub_text
from simulate.data.text_files import holds_records, is_plain, text_blocks
from simulate.data.tokenizer import Vocabulary, check_vocabulary, encode
from simulate.models.interfaces import ReadsText

STDLIB_BYTES = 2_000_000
"""Most bytes of the default text: source of the installed standard library's top-level modules, sorted by name."""
VALIDATION_SHARE = 0.1
SAMPLED_BYTES = 1 << 20
"""Bytes at the start of the hub's rows that are searched for anything but blanks."""
CONTENT = "content"
"""The array of a text in the cache."""


@dataclass(frozen=True)
class Text:
    """Tokens with a fixed split: the last tenth is for validation."""

    tokens: np.ndarray
    """Unsigned integers, (num_tokens,); bytes unless there is a vocabulary."""
    source: str
    """The path or name that it was read from, for messages."""
    vocabulary: Vocabulary | None = None
    held_out_from: int | None = None
    """Index of the first token of the validation split; None: the last tenth."""
    digest: str | None = None
    """sha256 of all tokens, in hex, where it is known; None: it is computed when it is asked for."""
    largest: int | None = None
    """The largest byte, where it is known."""

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of all tokens; a run resumes only on data with the digest in its checkpoint."""
        return self.digest or hashlib.sha256(np.ascontiguousarray(self.tokens).data).hexdigest()

    @property
    def train(self) -> np.ndarray:
        """The tokens to train on."""
        return self.tokens[: self._split]

    @property
    def validation(self) -> np.ndarray:
        """The tokens to evaluate on."""
        return self.tokens[self._split :]

    @property
    def num_bytes(self) -> int:
        """Bytes of the token array, not of the text it came from."""
        return int(self.tokens.nbytes)

    def describe(self) -> str:
        """Return source and numbers of tokens as one line of text."""
        return f"{self.source}, {len(self.train):,} training and {len(self.validation):,} validation {self._unit}"

    @property
    def _split(self) -> int:
        return _split_of(len(self.tokens)) if self.held_out_from is None else self.held_out_from

    @property
    def _unit(self) -> str:
        return "bytes" if self.vocabulary is None else f"tokens ({self.vocabulary.name})"

    def check(self, model: ReadsText, devices: int, shards: Sequence[float] | None = None) -> None:
        """Raise InputError where a device's shard or the validation split has no window, or the vocabulary is small."""
        self.check_length(model, devices, shards)
        if self.vocabulary is not None:
            check_vocabulary(self.vocabulary.size, self.vocabulary.name, model.vocab)
        else:
            self.check_bytes(model)

    def check_bytes(self, model: ReadsText) -> None:
        """Raise InputError where a byte of the text is beyond the model's tokens."""
        largest = int(self.tokens.max()) if self.largest is None else self.largest
        if largest >= model.vocab:
            raise InputError(
                f"model.vocab = {model.vocab} does not cover byte {largest} of {self.source}; "
                f"try --set model.vocab={BYTE_VALUES}"
            )

    def check_length(self, model: ReadsText, devices: int, shards: Sequence[float] | None = None) -> None:
        """Raise InputError where a device's shard or the validation split has no window."""
        window = model.context + 1
        smallest_share = 1 / devices if shards is None else min(shards) / sum(shards)
        # The smallest shard and the validation split must each hold one window.
        needed = max(int(window / VALIDATION_SHARE), int(window / smallest_share / (1 - VALIDATION_SHARE))) + 1
        bounds = shard_bounds(len(self.train), devices, shards)
        if len(self.validation) < window or min(last - first for first, last in bounds) < window:
            raise InputError(
                f"data: {self.source} has {len(self.tokens):,} {self._unit}; windows of {window} for {devices} devices "
                f"and a validation split of a tenth need {needed:,}: give more text, fewer --devices "
                "or a smaller --set model.context"
            )


def shard_bounds(tokens: int, devices: int, shards: Sequence[float] | None) -> list[tuple[int, int]]:
    """Return (first, end) of each device's part of the tokens: equal parts, or parts in proportion to `shards`."""
    if shards is None:
        size = tokens // devices
        return [(device * size, (device + 1) * size) for device in range(devices)]
    # Rounded edges, not sizes, so that the parts neither overlap nor leave tokens between them.
    edges = [0, *(int(tokens * share / sum(shards)) for share in accumulate(shards))]
    return list(pairwise(edges))


def load_text(data: Data) -> Text:
    """Return the text that run.toml names, in its tokens.

    Raises InputError for a text or tokenizer that is missing, empty, binary or unreadable.
    """
    text = read_bytes(data)
    return text if data.tokenizer == BYTES else tokenized(text, data.tokenizer)


def tokenized(text: Text, tokenizer: str) -> Text:
    """Return a text of bytes in a tokenizer's tokens; the same last tenth is held out. Raises InputError."""
    content, split = text.tokens, _split_of(len(text.tokens))
    while split < len(content) and content[split] & 0xC0 == 0x80:  # a UTF-8 character goes on here: do not cut it
        split += 1
    encoded = encode(content[:split], content[split:], tokenizer, text.fingerprint)
    return Text(encoded.tokens, text.source, encoded.vocabulary, encoded.held_out_from, encoded.digest)


def _split_of(length: int) -> int:
    return int(length * (1 - VALIDATION_SHARE))


def read_bytes(data: Data) -> Text:
    """Return the text that run.toml names as bytes, without its tokenizer; raises InputError."""
    if data.from_hub:
        texts = hub_text(data)
        if texts is None or not bytes(texts[:SAMPLED_BYTES]).strip():
            raise InputError(f"data.name = {data.name!r} holds no text; choose another, or its data.column")
        return Text(texts, str(data.name))
    if data.path is None:
        return _stdlib()
    files, stamp = files_of(data)
    if is_large(files):
        return _mapped(data.path, files, data.field, stamp)
    return _read_once(data.path, tuple(files), data.field, stamp)


def files_of(data: Data) -> tuple[list[Path], str]:
    """Return the files at data.path, and their names, sizes and times of change; raises InputError."""
    try:
        files = _files(Path(str(data.path)))
        stamp = stamp_of(files)
    except OSError as error:
        raise InputError(f"data.path = {data.path!r} cannot be read ({error.strerror}); check it") from None
    if not files:
        raise InputError(f"data.path = {data.path!r} is a folder without files; put UTF-8 text files in it")
    return files, stamp


def is_large(files: Sequence[Path]) -> bool:
    """Whether text is memory-mapped, and a plan reads a sample of it alone."""
    return sum(file.stat().st_size for file in files) >= LARGE_BYTES


@lru_cache(maxsize=1)
def _read_once(name: str, files: tuple[Path, ...], field: str | None, stamp: str) -> Text:
    """Read files of less than LARGE_BYTES: a plan checks them, counts them, and its run trains on them."""
    return Text(_frozen(b"".join(_surveyed(name, text_blocks(files, field), {}))), name)


def _mapped(name: str, files: Sequence[Path], field: str | None, stamp: str) -> Text:
    """Map large files, which are read in blocks, checked and digested once."""

    def survey() -> dict[str, Any]:
        facts: dict[str, Any] = {}
        digest, size = hashlib.sha256(), 0
        for block in _surveyed(name, text_blocks(files, field), facts):
            digest.update(block)
            size += len(block)
        return {**facts, "sha256": digest.hexdigest(), "num_bytes": size}

    def copy(draft: Draft) -> None:
        facts: dict[str, Any] = {}
        blocks = _surveyed(name, text_blocks(files, field), facts)
        draft.stream(CONTENT, "u1", (np.frombuffer(block, np.uint8) for block in blocks), facts)

    if len(files) == 1 and is_plain(files[0]):
        facts = cached_facts("text", {"files": stamp}, survey)
        # Of its length then: what was added since is not checked.
        tokens: np.ndarray = np.memmap(files[0], np.uint8, "r", shape=(facts["num_bytes"],))
    else:
        kept = cached("text", {"files": stamp, "field": field}, copy)
        facts, tokens = kept.facts, kept.arrays[CONTENT]
    # As a plain array, whose slices cost a batch nothing.
    return Text(np.asarray(tokens), name, digest=facts["sha256"], largest=facts["largest"])


def _surveyed(name: str, blocks: Iterable[bytes], facts: dict[str, Any]) -> Iterator[bytes]:
    """Yield blocks of text, and put the largest byte into `facts`; raises InputError where all is blank."""
    facts["largest"], blank = 0, True
    for block in blocks:
        if block:
            facts["largest"] = max(facts["largest"], int(np.frombuffer(block, np.uint8).max()))
            blank = blank and not block.strip()
            yield block
    if blank:
        raise InputError(f"data.path = {name!r} is empty; give a text file with content")


def _frozen(content: bytes | bytearray) -> np.ndarray:
    tokens = np.frombuffer(content, dtype=np.uint8)
    tokens.flags.writeable = False
    return tokens


def has_fields(path: str) -> bool:
    """Whether the text at a path is in records, whose `data.field` may be named; raises InputError."""
    return holds_records(_files(Path(path)))


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise InputError(f"data.path = {str(path)!r} does not exist; give a UTF-8 text file or a folder of them")
    if path.is_dir():
        return sorted(path / name for name in read_folder(path).files)
    if not path.is_file():
        raise InputError(f"data.path = {str(path)!r} is neither a file nor a folder; save its text to a file first")
    return [path]


def _stdlib() -> Text:
    folder = Path(sysconfig.get_path("stdlib"))
    content = bytearray()
    # Sorted, so that machines with the same Python train on the same text.
    for path in sorted(folder.glob("*.py")):
        content += path.read_bytes()
        if len(content) >= STDLIB_BYTES:
            break
    if not content:
        raise InputError(
            f"data.name = 'stdlib': {folder} holds no Python source (a stripped installation?); use --data PATH"
        )
    return Text(_frozen(content[:STDLIB_BYTES]), "the Python standard library's source")
