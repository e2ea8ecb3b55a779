"""Text as tokens, from UTF-8 files, the Hugging Face hub or, by default, Python's own source; plans check it, no torch.

A text is one array of bytes or of a tokenizer's tokens, its last tenth held out. simulate.data.load calls `load_text`
for a run and `read_bytes` for a plan; simulate.data.batches cuts windows out of a device's part (`shard_bounds`).
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from simulate.common.errors import InputError
from simulate.config.tables import BYTE_VALUES, BYTES, Data
from simulate.data.cache import stamp_of
from simulate.data.file_tree import read_folder
from simulate.data.huggingface import hub_text
from simulate.data.text_files import holds_records, is_packed, read_text_files
from simulate.data.tokenizer import Vocabulary, check_vocabulary, encode
from simulate.models.interfaces import ReadsText

STDLIB_BYTES = 2_000_000
"""Most bytes of the default text: source of the installed standard library's top-level modules, sorted by name."""
VALIDATION_SHARE = 0.1
SAMPLED_BYTES = 1 << 20
"""Bytes at the start of the hub's rows that are searched for anything but blanks."""


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

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of all tokens; a run resumes only on data with the digest in its checkpoint."""
        return hashlib.sha256(np.ascontiguousarray(self.tokens).data).hexdigest()

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
        """Bytes of the token array in memory, not of the text it came from."""
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
        elif (largest := int(self.tokens.max())) >= model.vocab:
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
    content, split = text.tokens.data, _split_of(len(text.tokens))  # without a copy of the bytes
    while split < len(content) and content[split] & 0xC0 == 0x80:  # a UTF-8 character goes on here: do not cut it
        split += 1
    # Files were checked to be UTF-8; the default text is cut at STDLIB_BYTES, perhaps within a character.
    train, held_out = (str(part, "utf-8", errors="replace") for part in (content[:split], content[split:]))
    encoded = encode(train, held_out, tokenizer)
    return Text(encoded.tokens, text.source, encoded.vocabulary, encoded.held_out_from)


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
    path = Path(data.path)
    try:
        files = _files(path)
        stamp = stamp_of(files)
    except OSError as error:
        raise InputError(f"data.path = {data.path!r} cannot be read ({error.strerror}); check it") from None
    if not files:
        raise InputError(f"data.path = {data.path!r} is a folder without files; put UTF-8 text files in it")
    # Bytes are kept as long as they are trained on; those that become tokens are needed no longer.
    read = _read_once if data.tokenizer == BYTES else _read_once.__wrapped__
    return read(data.path, tuple(files), data.field, stamp)


@lru_cache(maxsize=1)
def _read_once(name: str, files: tuple[Path, ...], field: str | None, stamp: str) -> Text:
    """Read files that may be large: a plan checks them, counts them, and its run trains on them."""
    content = read_text_files(files, field)
    if not content.strip():
        raise InputError(f"data.path = {name!r} is empty; give a text file with content")
    return Text(_frozen(content), name)


def held_bytes(data: Data) -> int:
    """Return the memory that text at a path takes; 0 where it is memory-mapped, or no file exists yet."""
    if data.path is None or data.tokenizer != BYTES or not Path(data.path).exists():
        return 0
    files = _files(Path(data.path))
    # Only what is packed has to be read to know its size.
    return read_bytes(data).num_bytes if any(map(is_packed, files)) else sum(file.stat().st_size for file in files)


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
