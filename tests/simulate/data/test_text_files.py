"""The forms of text: marks, encodings, compression, records; what is read is the text, and all else one line."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simulate.common.errors import InputError
from simulate.config.tables import Data
from simulate.data import text_files
from simulate.data.load import image_source
from simulate.data.text import load_text, read_bytes
from simulate.data.text_size import held_bytes

WORDS = "über 😀\r\nzwei\n"


def read(path: Path, **keys: Any) -> bytes:
    return bytes(load_text(Data(path=str(path), **keys)).tokens)


def refusal(path: Path, **keys: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(path, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_marks_and_compression_are_no_part_of_the_text(
    tmp_path: Path, encoding: str, pack: Callable[[bytes], bytes]
) -> None:
    # The ending says nothing: browsers drop it, and servers unpack on the way.
    assert read(written(tmp_path / "text.txt", pack(WORDS.encode(encoding)))) == WORDS.encode()


def test_big_endian_utf_16_is_read_by_its_mark(tmp_path: Path) -> None:
    assert read(written(tmp_path / "text.txt", b"\xfe\xff" + WORDS.encode("utf-16-be"))) == WORDS.encode()


def test_each_file_of_a_folder_loses_its_mark(tmp_path: Path) -> None:
    written(tmp_path / "a.txt", b"\xef\xbb\xbfA")
    written(tmp_path / "b.gz", gzip.compress(b"\xef\xbb\xbfB"))
    assert read(tmp_path) == b"A\nB"


def test_characters_at_the_edges_of_blocks_survive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 3)
    text = "x" * (text_files.SNIFFED_BYTES - 1) + "é😀" * 40
    assert read(written(tmp_path / "a", text.encode())) == text.encode()
    broken = text.encode() + b"\xe9rest"
    assert f"(byte {len(broken) - 5})" in refusal(written(tmp_path / "b", broken))
    records = "".join(json.dumps({"text": f"{k}é"}, ensure_ascii=False) + "\n" for k in range(9))
    assert read(written(tmp_path / "c.jsonl", records.encode())) == "\n".join(f"{k}é" for k in range(9)).encode()


def test_zstandard_is_read(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    packed = arrow.compress(WORDS.encode(), codec="zstd", asbytes=True)
    assert read(written(tmp_path / "a.zst", packed + packed)) == WORDS.encode() * 2
    assert "damaged or truncated" in refusal(written(tmp_path / "b.zst", packed[:-3]))


def test_without_pyarrow_its_forms_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert "pip install 'lte[text]'" in refusal(written(tmp_path / "a.txt", b"\x28\xb5\x2f\xfd"))
    assert "pip install 'lte[text]'" in refusal(written(tmp_path / "b.txt", b"PAR1"))


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("caf\xe9".encode("latin-1"), "is not UTF-8 text (byte 3); convert it, for example by iconv -f LATIN1"),
        (b"\xef\xbb\xbfab\xff", "begins as UTF-8, and is not from byte 5 on"),
        (b"\xff\xfea\0\x00\xd8b\0", "begins as UTF-16, and is not from byte"),
        ("ab".encode("utf-16-le"), "binary (it holds a NUL byte), or UTF-16 without a byte order mark"),
        (gzip.compress(b"words" * 99)[:-9], "damaged or truncated compressed file"),
        (gzip.compress(gzip.compress(b"words")), "compressed twice; unpack it once"),
        (_tar(), "is a tar archive; unpack it and name the folder"),
        (gzip.compress(_tar()), "is a tar archive; unpack it and name the folder"),
        (b"7z\xbc\xaf\x27\x1c", "is a 7z archive"),
        (gzip.compress(b""), "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # compressed bytes hold the time
)
def test_what_is_no_text_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    assert words in refusal(written(tmp_path / "text.txt", content))


@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html><p>Not found", b"version https://git-lfs.github.com/spec/v1", b""]
)
@pytest.mark.parametrize("ending", [".gz", ".jsonl.zst", ".XZ", ".bz2", ".parquet"])
def test_a_name_that_promises_more_than_the_content_is_named(tmp_path: Path, ending: str, content: bytes) -> None:
    message = refusal(written(tmp_path / f"a{ending}", content))
    assert f"ends in .{ending.lower().rpartition('.')[2]}, and is no such file (it begins with" in message
    assert str(content[:20])[:-1] in message and "\n" not in message


def test_a_packed_file_may_have_the_ending_of_another_kind(tmp_path: Path) -> None:
    assert read(written(tmp_path / "a.zst", gzip.compress(b"words"))) == b"words"
    assert "a.jsonl:1 is not JSON" in refusal(written(tmp_path / "a.jsonl", b"<!DOCTYPE html>"))


RECORDS = b'\xef\xbb\xbf{"text": "one", "n": 1}\n\n{"n": 2, "text": "two\\nlines"}\r\n{"text": null}\n{"text": ""}'


@pytest.mark.parametrize("name", ["a.jsonl", "a.NDJSON", "a.jsonl.gz"])
def test_lines_of_json_give_their_texts(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, gzip.compress(RECORDS) if name.endswith("gz") else RECORDS)
    assert read(path) == read(path, field="text") == b"one\ntwo\nlines\n"


@pytest.mark.parametrize(
    ("line", "keys", "words"),
    [
        (b'{"a": "x", "b": "y"}', {}, "has the fields a, b, of which a, b hold text; name one with --set data.field"),
        (b'{"a": 1}', {}, "of which none holds text as a string"),
        (b'{"a": "x"}', {"field": "b"}, "a.jsonl:1 has no field 'b' (but a)"),
        (b'{"a": "x"}\n{"a": 3}', {}, "a.jsonl:2 holds int in the field 'a'"),
        (b'{"a": "x"}\n{"a": ', {}, "a.jsonl:2 is not JSON"),
        (b'{"a": "x"}\n[1]', {}, "a.jsonl:2 is no JSON object"),
        (b"[" * 9999, {}, "a.jsonl:1 is not JSON"),
        (b'{"a": "\\ud800"}', {}, "(a lone surrogate); mend the record"),
        (b'{"a": ""}', {}, "is empty"),
    ],
)
def test_records_without_text_are_named(tmp_path: Path, line: bytes, keys: Any, words: str) -> None:
    assert words in refusal(written(tmp_path / "a.jsonl", line), **keys)


def test_numbers_beside_the_text_may_be_of_any_length(tmp_path: Path) -> None:
    assert read(written(tmp_path / "a.jsonl", b'{"a": "x", "n": ' + b"9" * 5000 + b"}")) == b"x"


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    written(tmp_path / "a.txt", b"prose")
    (tmp_path / "b.txt").symlink_to("not-fetched")
    assert "b.txt leads to nothing; fetch what it stands for" in refusal(tmp_path)


def test_parquet_gives_its_texts(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"n": [1, 2, 3], "text": ["one", None, "zwei 😀"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    parquet.write_table(table.slice(0, 1), tmp_path / "b")  # told by content
    assert read(tmp_path / "a.parquet") == "one\nzwei 😀".encode()
    assert read(tmp_path) == "one\nzwei 😀\none".encode()
    assert held_bytes(Data(path=str(tmp_path))) == len("one\nzwei 😀\none".encode())
    assert image_source(Data(path=str(tmp_path / "b"))) is None
    stored_once = arrow.table({"text": arrow.array(["one", "two", "one"]).dictionary_encode()})
    parquet.write_table(stored_once, tmp_path / "c.parquet")
    assert read(tmp_path / "c.parquet") == b"one\ntwo\none"
    (tmp_path / "c.parquet").unlink()
    assert "has no field 'txt' (but n, text)" in refusal(tmp_path / "b", field="txt")
    assert "holds int in the field 'n'" in refusal(tmp_path / "b", field="n")
    written(tmp_path / "b", (tmp_path / "b").read_bytes()[:-20])
    assert "damaged Parquet file" in refusal(tmp_path / "b")


def test_records_and_plain_text_are_not_mixed(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", b'{"text": "x"}')
    written(tmp_path / "README.md", b"About these records")
    message = refusal(tmp_path)
    assert "a.jsonl holds records" in message and "README.md plain text" in message
    assert "data.field = 'text' is for records" in refusal(tmp_path / "README.md", field="text")


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    inner = text_files._blocks_of
    monkeypatch.setattr(text_files, "_blocks_of", lambda *given: (reads.append(1), inner(*given))[1])
    path = written(tmp_path / "a.txt", gzip.compress(b"one"))
    data = Data(path=str(path))
    assert bytes(read_bytes(data).tokens) == bytes(load_text(data).tokens) == b"one"
    assert held_bytes(data) == 3 and len(reads) == 1
    written(path, gzip.compress(b"three"))
    assert bytes(read_bytes(data).tokens) == b"three"
