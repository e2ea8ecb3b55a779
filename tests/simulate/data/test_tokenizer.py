"""Tokenizers: trained on the training split alone, lossless, cached, kept with the run, and refused in one line."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulate.common.errors import InputError
from simulate.config.run import build_run
from simulate.config.tables import Data
from simulate.data import tokenizer as module
from simulate.data.load import check_data, load_data
from simulate.data.text import Text, load_text, tokenized
from simulate.data.tokenizer import Encoded, declared_size
from simulate.models.families.gpt import GptModel
from tests import tiny
from tests.harness import ROOT, run_python

tokenizers = pytest.importorskip("tokenizers")


def encode(train: str, held_out: str, tokenizer: str) -> Encoded:
    parts = [np.frombuffer(part.encode(), np.uint8) for part in (train, held_out)]
    return module.encode(parts[0], parts[1], tokenizer, hashlib.sha256((train + held_out).encode()).hexdigest())


def decoded(text: Text, tokens: np.ndarray) -> str:
    assert text.vocabulary is not None
    return str(tokenizers.Tokenizer.from_str(text.vocabulary.json).decode(tokens.tolist()))


def test_pairs_are_merged_by_hand() -> None:
    # "ab" occurs most, then "abc"; two merges over the bytes make every word of the text one token.
    encoded = encode("abc abc abc ab", "abc", "bpe:258")
    library = tokenizers.Tokenizer.from_str(encoded.vocabulary.json)
    assert encoded.vocabulary.size == 258
    assert {library.id_to_token(number) for number in (256, 257)} <= {"ab", "abc", "Ġab", "Ġabc"}
    assert len(encoded.tokens[encoded.held_out_from :]) < 3


@pytest.mark.parametrize("content", ["", "ünï cödé 🎉 line\n\n  indented\r\n\ttabs\x01", "x" * 1_100 + "\n"])
def test_text_comes_back_from_its_tokens(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_CHARACTERS", 1_000)  # one of the lines is longer
    encoded = encode("some words to learn from " * 9 + content, content, "bpe:300")
    library = tokenizers.Tokenizer.from_str(encoded.vocabulary.json)
    assert library.decode(encoded.tokens[encoded.held_out_from :].tolist()) == content


def test_the_last_tenth_is_held_out_at_a_whole_character() -> None:
    content = "é" * 55  # a tenth of 110 bytes begins within the fiftieth
    text = tokenized(Text(np.frombuffer(content.encode(), np.uint8), "accents"), "bpe:256")
    assert decoded(text, text.train) == "é" * 50
    assert decoded(text, text.validation) == "é" * 5


def test_held_out_text_does_not_change_the_tokenizer() -> None:
    first, second = (encode("a b c ab ab abc " * 20, held_out, "bpe:262") for held_out in ("ab", "xyz" * 1000))
    assert first.vocabulary.json == second.vocabulary.json


def test_text_is_encoded_in_pieces_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    content = "".join(f"line {n} of some text\n" for n in range(400))
    whole = encode(content, "", "bpe:400").tokens.tolist()
    monkeypatch.setattr(module, "CHUNK_CHARACTERS", 100)
    assert encode(content + "", "\n", "bpe:400").tokens[: len(whole)].tolist() == whole


def test_tokens_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    first = encode("cached text " * 50, "text", "bpe:270")
    monkeypatch.setattr(module, "_fill", None)
    again = encode("cached text " * 50, "text", "bpe:270")
    assert np.array_equal(first.tokens, again.tokens) and first.vocabulary == again.vocabulary
    with pytest.raises(TypeError):
        encode("cached text " * 50, "text", "bpe:271")


def test_a_tokenizer_from_elsewhere_is_used_as_it_is(tmp_path: Path) -> None:
    words = {word: number for number, word in enumerate(["[UNK]", *sorted(set(tiny.PROSE.split()))])}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "words.json"))
    text = tokenized(tiny.text(), str(tmp_path / "words.json"))
    assert text.vocabulary is not None and text.vocabulary.size == len(words) == declared_size(
        str(tmp_path / "words.json")
    )
    assert [words[w] for w in bytes(tiny.text().tokens).decode().split()[:50]] == text.tokens[:50].tolist()


def test_small_vocabularies_take_two_bytes_a_token_and_large_ones_four(tmp_path: Path) -> None:
    assert encode("a b " * 99, "a", "bpe:260").tokens.dtype == np.uint16
    words = {f"w{n}": n for n in range(70_000)}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "words.json"))
    encoded = encode("w69999 w3", "w5", str(tmp_path / "words.json"))
    assert (encoded.tokens.dtype, encoded.tokens.tolist()) == (np.uint32, [69_999, 3, 5])


def run_of(tokenizer: str, **model: int) -> Any:
    sizes = {"layers": 1, "width": 16, "attention_heads": 2, "context": 8, **model}
    return build_run({"model": sizes, "data": {"name": "stdlib", "tokenizer": tokenizer}, "method": {"rank": 2}})


@pytest.mark.parametrize("load", [load_data, check_data])
def test_a_vocabulary_that_the_model_does_not_cover_is_refused(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulate.data.text.STDLIB_BYTES", 100_000)
    with pytest.raises(InputError, match=r"model\.vocab = 256 does not cover the 300 tokens") as caught:
        load(run_of("bpe:300"))
    assert "--set model.vocab=300" in str(caught.value) and "\n" not in str(caught.value)
    load(run_of("bpe:300", vocab=300))
    with pytest.raises(InputError, match="fewer --devices"):
        load(run_of("bpe:300", vocab=300, context=60_000))


def test_lengths_are_told_in_tokens() -> None:
    text = tokenized(tiny.text(), "bpe:300")
    assert text.describe().endswith("validation tokens (bpe:300)")
    with pytest.raises(InputError, match=r"tokens \(bpe:300\); windows of"):
        text.check(GptModel(context=5000, vocab=300), 2)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read (No such file"), (b"\xff", "not UTF-8"), (b"{}", "is no tokenizer.json (")],
)
def test_what_is_no_tokenizer_is_named(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_text(Data(name="stdlib", tokenizer=str(path)))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("tokenizer", ["bpe:", "bpe:many", "bpe:255", "bpe:-1"])
def test_a_size_that_is_none_is_refused(tokenizer: str) -> None:
    with pytest.raises(InputError, match=r"at least the 256 bytes; try --set data\.tokenizer=bpe:4096"):
        run_of(tokenizer)


def test_a_missing_library_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match=r"pip install 'lte\[text\]'"):
        encode("never seen before", "", "bpe:300")


def test_training_is_the_same_in_every_process() -> None:
    code = (
        "import numpy as np; from simulate.data.tokenizer import _train; "
        "print(_train('bpe:600', np.fromfile('README.md', np.uint8)).to_str())"
    )
    assert len({run_python(code, cwd=ROOT) for _ in range(2)}) == 1


def own_tokenizer(path: Path, vocabulary: dict[str, int]) -> Any:
    """Return a tokenizer of whole words."""
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(str(path))
    return library


def test_a_tokenizers_truncation_padding_and_template_leave_the_text_alone(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    library = own_tokenizer(path, {"a": 0, "b": 1, "[S]": 2})
    text = "a b b\n" * 40_000  # several pieces, of unequal lengths
    plain = encode(text, "b a", str(path)).tokens
    assert plain.tolist() == [0, 1, 1] * 40_000 + [1, 0]
    library.post_processor = tokenizers.processors.TemplateProcessing(single="[S] $A", special_tokens=[("[S]", 2)])
    for change in (lambda: library.enable_truncation(8), lambda: library.enable_padding(pad_id=2, pad_token="[S]")):
        change()
        library.save(str(path))
        assert np.array_equal(encode(text, "b a", str(path)).tokens, plain)


def test_a_vocabulary_with_gaps_reaches_to_its_largest_token(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    own_tokenizer(path, {"a": 0, "b": 70_000})
    assert declared_size(str(path)) == 70_001
    encoded = encode("a b", "b", str(path))
    assert encoded.vocabulary.size == 70_001 and encoded.tokens.tolist() == [0, 70_000, 70_000]


def test_a_tokenizer_that_notepad_saved_is_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    own_tokenizer(path, {"a": 0, "b": 1})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert declared_size(str(path)) == 2


def test_text_that_a_tokenizer_would_drop_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1, "c": 2}, merges=[]))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(str(path))
    assert encode("ab a\nb " * 20_000, "c", str(path)).tokens[:5].tolist() == [0, 1, 0, 1, 0]
    with pytest.raises(InputError, match=r"has no token for 'xé', and none for the unknown"):
        encode("ab a\nb " * 20_000 + "axé b", "c", str(path))
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="u")).save(str(path))
    with pytest.raises(InputError, match=r"cannot encode the text \(WordLevel error") as caught:
        encode("b", "a", str(path))
    assert "\n" not in str(caught.value)
