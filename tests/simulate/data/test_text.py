"""The text loader: files and folders that it reads, and one line of error for those that it cannot."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulate.common.errors import InputError
from simulate.config.tables import Data
from simulate.data import text as module
from simulate.data.text import STDLIB_BYTES, Text, load_text
from simulate.models.families.gpt import GptModel


def refusal(path: Path) -> str:
    """Return the one line that refuses a path."""
    with pytest.raises(InputError) as caught:
        load_text(Data(path=str(path)))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_file_is_read_byte_by_byte(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("über\n", encoding="utf-8")
    loaded = load_text(Data(path=str(path)))
    assert loaded.tokens.tolist() == [0xC3, 0xBC, *b"ber\n"]
    assert loaded.tokens.dtype == np.uint8


def test_a_folder_is_read_in_the_order_of_names_without_hidden_files(tmp_path: Path) -> None:
    for name, content in {"b.txt": "B", "a/z.txt": "Z", ".git/config": "hidden", ".hidden": "hidden"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert bytes(load_text(Data(path=str(tmp_path))).tokens) == b"Z\nB"


def test_a_hidden_parent_does_not_hide_a_folder(tmp_path: Path) -> None:
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "text.txt").write_text("seen")
    assert bytes(load_text(Data(path=str(tmp_path / ".cache"))).tokens) == b"seen"


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    message = refusal(tmp_path / "no such.txt")
    assert "no such.txt" in message and "does not exist" in message


@pytest.mark.parametrize("content", ["", " \n\t\n"], ids=["nothing", "blanks"])
def test_an_empty_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "empty.txt").write_text(content)
    message = refusal(tmp_path / "empty.txt")
    assert "empty.txt" in message and "is empty" in message


def test_a_folder_without_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "hollow").mkdir()
    message = refusal(tmp_path / "hollow")
    assert "hollow" in message and "without files" in message


def test_a_binary_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"abc\x00def")
    message = refusal(tmp_path / "weights.bin")
    assert "weights.bin" in message and "binary" in message


def test_a_file_that_is_not_utf_8_is_named_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    message = refusal(tmp_path / "latin.txt")
    assert "latin.txt" in message and "UTF-8" in message and "byte 3" in message


def test_one_bad_file_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n")
    assert "picture.png" in refusal(tmp_path)


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Patched, since root may read everything whatever the mode says.
    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "secret.txt").write_text("secret")
    monkeypatch.setattr(Path, "open", refuse)
    for path in (tmp_path, tmp_path / "secret.txt"):
        message = refusal(path)
        assert "secret.txt" in message and "Permission denied" in message


TOO_LONG = "x" * 5000


def test_a_path_longer_than_the_system_allows_is_refused(tmp_path: Path) -> None:
    assert "xxx" in refusal(tmp_path / TOO_LONG)


@pytest.mark.parametrize("looked_up", ["exists", "stat"], ids=["closed parent", "folder that may only be listed"])
def test_a_folder_that_may_not_be_entered_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked_up: str
) -> None:
    def refuse(path: Path, **options: bool) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "text.txt").write_text("secret")
    monkeypatch.setattr(Path, looked_up, refuse)
    assert "closed" in refusal(tmp_path / "closed")


def text_of(num_bytes: int, largest: int = 120) -> Text:
    tokens = np.full(num_bytes, 97, dtype=np.uint8)
    tokens[0] = largest
    return Text(tokens, "book.txt")


def model(context: int = 8, vocab: int = 256) -> GptModel:
    return GptModel(context=context, vocab=vocab)


@given(context=st.integers(1, 64), devices=st.integers(1, 40))
def test_a_text_of_the_named_length_is_long_enough(context: int, devices: int) -> None:
    with pytest.raises(InputError, match=r"book\.txt has 1 bytes") as caught:
        text_of(1).check(model(context), devices)
    message = str(caught.value)
    assert "\n" not in message
    needed = int(message.partition(" need ")[2].partition(":")[0].replace(",", ""))
    text_of(needed).check(model(context), devices)


@pytest.mark.parametrize(
    ("num_bytes", "devices", "enough"),
    [
        pytest.param(81, 1, True, id="9 held out, one window"),
        pytest.param(80, 1, False, id="8 held out"),
        pytest.param(300, 30, True, id="9 for each of 30 devices"),
        pytest.param(299, 30, False, id="269 for 30 devices"),
    ],
)
def test_every_shard_and_the_validation_split_need_a_window_of_9(num_bytes: int, devices: int, enough: bool) -> None:
    with nullcontext() if enough else pytest.raises(InputError, match="fewer --devices"):
        text_of(num_bytes).check(model(context=8), devices)


def test_a_byte_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(InputError, match=r"model\.vocab = 128 does not cover byte 200 of book\.txt") as caught:
        text_of(1000, largest=200).check(model(vocab=128), 2)
    assert "\n" not in str(caught.value)


def test_the_vocabulary_may_end_at_the_largest_byte() -> None:
    text_of(1000, largest=200).check(model(vocab=201), 2)
    with pytest.raises(InputError):
        text_of(1000, largest=200).check(model(vocab=200), 2)


def test_the_last_tenth_is_held_out() -> None:
    text = Text(np.arange(200, dtype=np.uint8), "counted")
    assert text.train.tolist() == list(range(180))
    assert text.validation.tolist() == list(range(180, 200))


def test_the_fingerprint_tells_texts_apart() -> None:
    assert text_of(100).fingerprint == text_of(100).fingerprint
    assert text_of(100).fingerprint != text_of(101).fingerprint


def test_the_embedded_text_is_the_standard_librarys_source() -> None:
    text = load_text(Data(name="stdlib"))
    assert len(text.tokens) == STDLIB_BYTES
    assert b"import" in text.tokens.tobytes()


def test_an_installation_without_sources_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match="--data PATH"):
        load_text(Data(name="stdlib"))
