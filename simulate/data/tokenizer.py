"""Tokens longer than a byte: byte-pair encoding trained on the text, or a given tokenizer.json; torch-free.

Byte pairs are GPT-2's (Radford et al. 2019): they never cross the borders of words, and no character is unknown, since
every byte is a token. They are trained on the training split alone, so that the held-out text stays unseen. Text goes
through in pieces, which the library encodes on all cores, and its tokens into the cache: memory holds neither.
simulate.data.text calls `encode`; a plan needs `declared_size`, and `tokens_per_byte` of a sample.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simulate.common.encodings import read_text
from simulate.common.errors import InputError
from simulate.common.progress import Advance, count_nothing, task
from simulate.config.tables import BPE
from simulate.data.cache import Draft, cached

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ENCODING = 3
"""Part of every key of tokens: raise it when changed code makes other tokens of the same text."""
SHOWN_CHARACTERS = 20
"""Characters without a token that an error shows at most."""
CHUNK_CHARACTERS = 1 << 16
"""Characters of the pieces in which text is encoded, about; each ends with a line."""
BLOCK_BYTES = 1 << 20
"""Bytes that become characters at a time."""
CHUNKS_AT_ONCE = 32
"""Pieces that the library encodes at a time: enough for many cores, and a few hundred megabytes at most."""
TRAINED_QUARTERS = 3
"""Quarters of a plan's sample that byte pairs are trained on; tokens are counted in the rest."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of a text's tokens."""

    name: str
    """data.tokenizer of run.toml."""
    size: int
    """Number of different tokens."""
    json: str
    """The text of its tokenizer.json."""


@dataclass(frozen=True)
class Encoded:
    """A text in tokens."""

    tokens: np.ndarray
    """uint16 or uint32, (num_tokens,), memory-mapped."""
    held_out_from: int
    """Index of the first token of the validation split."""
    vocabulary: Vocabulary
    digest: str
    """sha256 of the tokens, in hex."""


def check_vocabulary(size: int, tokenizer: str, model_vocab: int) -> None:
    """Raise InputError where a model has fewer tokens than the tokenizer."""
    if model_vocab < size:
        raise InputError(
            f"model.vocab = {model_vocab} does not cover the {size:,} tokens of data.tokenizer = {tokenizer!r}; "
            f"try --set model.vocab={size}"
        )


def declared_size(tokenizer: str) -> int:
    """Return the vocabulary's size, at most, without training the tokenizer; raises InputError."""
    if tokenizer.startswith(BPE):
        return int(tokenizer.removeprefix(BPE))
    return _size(_load(Path(tokenizer)))


def _size(tokenizer: Tokenizer) -> int:
    """Return the number of tokens up to the largest, which exceeds their count where their numbers have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0) + 1


def encode(train: np.ndarray, held_out: np.ndarray, tokenizer: str, text_digest: str) -> Encoded:
    """Return both splits of a text, UTF-8 in uint8, in tokens, encoded once and cached; raises InputError.

    `text_digest` is of all the text, of which the length of `train` is a part.
    """
    definition = tokenizer if tokenizer.startswith(BPE) else _read(Path(tokenizer))
    # By content, not by name: an edited tokenizer.json, or other text, is encoded anew.
    parts = [text_digest, len(train), hashlib.sha256(definition.encode()).hexdigest()]
    found = cached(
        "tokens", {"text": parts, "encoding": ENCODING}, lambda draft: _fill(draft, train, held_out, tokenizer)
    )
    facts = found.facts
    vocabulary = Vocabulary(tokenizer, facts["size"], facts["json"])
    return Encoded(found.arrays["tokens"], facts["held_out_from"], vocabulary, facts["sha256"])


def tokens_per_byte(sample: bytes, tokenizer: str) -> float:
    """Return the tokens of a byte of a sample of text, about; raises InputError."""
    content = np.frombuffer(sample, np.uint8)
    if tokenizer.startswith(BPE):
        cut = len(content) * TRAINED_QUARTERS // 4
        used, content = _train(tokenizer, content[:cut]), content[cut:]
    else:
        used = _load(Path(tokenizer))
    return sum(map(len, _tokens_of(used, tokenizer, content, "u4", count_nothing))) / max(1, len(content))


def _fill(draft: Draft, train: np.ndarray, held_out: np.ndarray, tokenizer: str) -> None:
    used = _train(tokenizer, train) if tokenizer.startswith(BPE) else _load(Path(tokenizer))
    size = _size(used)
    dtype = "u2" if size <= 1 << 16 else "u4"  # the narrower one halves file and page cache
    facts: dict[str, Any] = {"size": size, "json": used.to_str(), "held_out_from": 0}

    def blocks() -> Iterator[np.ndarray]:
        with task(f"encoding text ({tokenizer})", len(train) + len(held_out)) as advance:
            for block in _tokens_of(used, tokenizer, train, dtype, advance):
                facts["held_out_from"] += len(block)
                yield block
            yield from _tokens_of(used, tokenizer, held_out, dtype, advance)

    draft.stream("tokens", dtype, blocks(), facts)


def _tokens_of(
    tokenizer: Tokenizer, name: str, content: np.ndarray, dtype: str, advance: Advance
) -> Iterator[np.ndarray]:
    checks, chunks = _drops_unknown(tokenizer), _chunks(content, advance)
    # The fast one leaves out where in the text each token was, which only the check needs.
    encode_batch: Callable[..., list[Any]] = tokenizer.encode_batch if checks else tokenizer.encode_batch_fast
    while batch := list(islice(chunks, CHUNKS_AT_ONCE)):
        try:
            encoded = encode_batch(batch, add_special_tokens=False)
        except Exception as error:  # the library raises no narrower class
            reason = str(error).splitlines()[0]
            raise InputError(
                f"data.tokenizer = {name!r} cannot encode the text ({reason}); name another, or bpe:VOCAB"
            ) from None
        for chunk, part in zip(batch, encoded, strict=True):
            if checks:
                _check_covered(chunk, part.offsets, name)
            yield np.array(part.ids, dtype)


def _drops_unknown(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer leaves out what it does not know, without a token in its place."""
    definition = json.loads(tokenizer.to_str())
    model, steps = definition["model"], json.dumps([definition.get("pre_tokenizer"), definition.get("normalizer")])
    # Where all bytes are tokens, nothing is unknown.
    whole = model.get("unk_token") or model.get("byte_fallback") or "ByteLevel" in steps
    return model["type"] == "BPE" and not whole


def _check_covered(text: str, offsets: Sequence[tuple[int, int]], name: str) -> None:
    """Raise InputError for characters that no token stands for; blanks may be lost between words."""
    end = 0
    for begin, after in (*offsets, (len(text), len(text))):
        if lost := text[end:begin].strip():
            raise InputError(
                f"data.tokenizer = {name!r} has no token for {lost[:SHOWN_CHARACTERS]!r}, and none for the unknown: it "
                "would leave out a part of the text; name another, or bpe:VOCAB"
            )
        end = max(end, after)


def _chunks(content: np.ndarray, advance: Advance) -> Iterator[str]:
    """Yield the characters of UTF-8 in pieces; `advance` counts bytes."""
    # Small chunks let the library encode on all cores; cut after a line, so that no word is split.
    # The default text is cut at STDLIB_BYTES, perhaps within a character; files were checked to be UTF-8.
    decoder, rest = codecs.getincrementaldecoder("utf-8")("replace"), ""
    for begin in range(0, len(content), BLOCK_BYTES):
        block = content[begin : begin + BLOCK_BYTES].tobytes()
        rest += decoder.decode(block, final=begin + len(block) == len(content))
        first = 0
        while end := rest.find("\n", first + CHUNK_CHARACTERS) + 1:
            yield rest[first:end]
            first = end
        rest = rest[first:]
        advance(len(block))
    if rest:
        yield rest


def _train(tokenizer: str, content: np.ndarray) -> Tokenizer:
    library = _library()
    # All 256 bytes are tokens from the start, so that nothing is unknown.
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trained = library.Tokenizer(library.models.BPE())
    trained.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=declared_size(tokenizer), initial_alphabet=sorted(alphabet), show_progress=False
    )
    with task(f"training the tokenizer {tokenizer}", len(content)) as advance:
        trained.train_from_iterator(_chunks(content, advance), trainer)
    return trained


def _load(path: Path) -> Tokenizer:
    content = _read(path)
    try:
        tokenizer = _library().Tokenizer.from_str(content)
        # Both are for batches of short texts: a piece of ours would lose its end, or get padding that is no text.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    except InputError:  # the library is missing
        raise
    except Exception as error:  # the library raises no narrower class
        reason = str(error).splitlines()[0]
        raise InputError(
            f"data.tokenizer = {str(path)!r} is no tokenizer.json ({reason}); name one, or bpe:VOCAB"
        ) from None


def _read(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(
            f"data.tokenizer = {str(path)!r} cannot be read ({reason}); give bytes, bpe:VOCAB or the path to a "
            "tokenizer.json"
        ) from None


def _library() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError:
        raise InputError(
            "data.tokenizer: the tokenizers library is not installed; pip install 'lte[text]', or use bytes"
        ) from None
    return tokenizers
