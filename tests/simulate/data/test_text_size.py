"""Large texts: a plan reads sizes and a sample, training reads each byte once and maps it; bytes and memory counted."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulate.common.errors import InputError
from simulate.common.progress import Advance, reported_by
from simulate.config.run import build_run
from simulate.config.tables import Data
from simulate.data import cache, text, text_files
from simulate.data.load import check_data
from simulate.data.text import load_text
from simulate.data.text_size import SAMPLED_BYTES, count_tokens, held_bytes, text_size

LINES = "".join(f"line {n} wïth {hashlib.sha256(bytes([n % 256, n // 256])).hexdigest()}\n" for n in range(12_000))
"""A megabyte that compresses by half, as prose does."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("LTE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of any size are treated as large ones."""
    for module in (text, cache):
        monkeypatch.setattr(module, "LARGE_BYTES", 1)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of every read of a text's files, as they are on the disk."""
    counted: list[int] = []
    inner = text_files._CountedFile.read

    def read(file: Any, size: int = -1) -> bytes:
        content = inner(file, size)
        counted.append(len(content))
        return content

    monkeypatch.setattr(text_files._CountedFile, "read", read)
    return counted


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A file of 48 MB, whose bytes are its text."""
    path = tmp_path / "big.txt"
    path.write_bytes((LINES.encode() * 60)[:48_000_000])
    return path


@contextmanager
def most_allocated(limit_bytes: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit_bytes
    finally:
        tracemalloc.stop()


def run_of(path: Path, **data: Any) -> Any:
    model = {"layers": 1, "width": 16, "attention_heads": 2, "context": 8, **data.pop("model", {})}
    return build_run({"model": model, "data": {"path": str(path), **data}, "method": {"name": "ddp"}})


def test_a_plan_reads_a_sample_of_a_large_text_and_keeps_nothing(big: Path, folder: Path, reads: list[int]) -> None:
    data = Data(path=str(big))
    with most_allocated(3 * SAMPLED_BYTES):
        (note,) = check_data(run_of(big))
        assert text_size(data).num_bytes == 48_000_000 and not text_size(data).is_about
        assert held_bytes(data) == 0
    assert 0 < sum(reads) <= SAMPLED_BYTES + text_files.SAMPLED_READ_BYTES
    assert note.startswith(f"data.path = {str(big)!r} has 48 MB of text; the plan read 4.19 MB of it")
    assert not folder.exists()


def test_training_reads_a_large_text_once_and_maps_it(big: Path, reads: list[int]) -> None:
    with most_allocated(8_000_000):
        first, again = (load_text(Data(path=str(big))) for _ in range(2))
        digests = first.fingerprint, again.fingerprint
    assert sum(reads) == 48_000_000
    assert set(digests) == {hashlib.sha256(big.read_bytes()).hexdigest()}
    assert isinstance(first.tokens.base, np.memmap) and first.largest == 0xC3


def test_a_large_text_that_changed_is_read_again(big: Path, reads: list[int]) -> None:
    before = load_text(Data(path=str(big))).fingerprint
    with big.open("r+b") as file:
        file.write(b"L")
    os.utime(big, ns=(0, 0))  # a time of its own, whatever the clock's steps are
    after = load_text(Data(path=str(big)))
    assert after.fingerprint != before and bytes(after.tokens[:4]) == b"Line"
    assert sum(reads) == 2 * 48_000_000


def records(lines: str) -> bytes:
    return "".join(json.dumps({"n": 1, "text": line}) + "\n" for line in lines.splitlines()).encode()


FORMS: dict[str, Callable[[], bytes]] = {
    "plain.txt": lambda: LINES.encode(),
    "utf-16.txt": lambda: LINES.encode("utf-16"),
    "text.gz": lambda: gzip.compress(LINES.encode()),
    "text.bz2": lambda: bz2.compress(LINES.encode(), 1),
    "records.jsonl": lambda: records(LINES),
    "records.jsonl.gz": lambda: gzip.compress(records(LINES)),
}


def written(folder: Path, name: str) -> Path:
    path = folder / name
    if name == "parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table({"n": list(range(12_000)), "text": LINES.splitlines()}), path)
    elif name == "folder":
        path.mkdir()
        for number, part in enumerate((LINES[:70_000], LINES[70_000:])):
            (path / f"{number}.txt").write_bytes(part.encode())
    else:
        path.write_bytes(FORMS[name]())
    return path


@pytest.mark.parametrize("name", [*FORMS, "parquet", "folder"])
def test_large_texts_are_the_same_as_small_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[int], name: str
) -> None:
    data = Data(path=str(written(tmp_path, name)))
    small = load_text(data)
    assert held_bytes(data) == small.num_bytes
    for module in (text, cache):
        monkeypatch.setattr(module, "LARGE_BYTES", 1)
    large = load_text(data)
    del reads[:]
    again = load_text(data)
    assert not reads, "the second run reads nothing"
    assert bytes(large.tokens) == bytes(again.tokens) == bytes(small.tokens)
    assert large.fingerprint == again.fingerprint == small.fingerprint and again.digest is not None
    assert large.largest == small.tokens.max()
    assert held_bytes(data) == 0


@pytest.mark.usefixtures("small_is_large")
@pytest.mark.parametrize("name", [*FORMS, "parquet", "folder"])
def test_a_size_is_about_where_it_is_scaled_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    data = Data(path=str(written(tmp_path, name)))
    counted = load_text(data).num_bytes
    monkeypatch.setattr("simulate.data.text_size.SAMPLED_BYTES", 400_000)
    size = text_size(data)
    exact = name in ("plain.txt", "folder")
    assert size.is_about != exact and size.is_sampled
    # bzip2 gives no text before a whole block of a tenth of this file is read, which counts as used.
    error = 0.0 if exact else 0.25 if name == "text.bz2" else 0.1
    assert size.num_bytes == pytest.approx(counted, rel=error, abs=0)
    assert len(size.sample) < counted


@pytest.mark.usefixtures("small_is_large")
def test_what_a_sample_shows_is_refused_by_a_plan_and_the_rest_by_training(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"caf\xe9" * 500)
    with pytest.raises(InputError, match=r"not UTF-8 text \(byte 3\)"):
        check_data(run_of(path))
    path.write_bytes(b"x" * (SAMPLED_BYTES + 99_999) + b"\xe9!")
    check_data(run_of(path))
    with pytest.raises(InputError, match=rf"not UTF-8 text \(byte {SAMPLED_BYTES + 99_999}\)"):
        load_text(Data(path=str(path)))
    with pytest.raises(InputError, match="does not cover byte 120"):
        check_data(run_of(path, model={"vocab": 100}))
    path.write_bytes(b"short")
    with pytest.raises(InputError, match="has 5 bytes; windows of 9"):
        check_data(run_of(path))
    path.write_bytes(b" \n" * 99)
    with pytest.raises(InputError, match="is empty"):
        load_text(Data(path=str(path)))


@pytest.mark.usefixtures("small_is_large")
def test_tokens_are_counted_in_a_sample(tmp_path: Path, reads: list[int]) -> None:
    pytest.importorskip("tokenizers")
    data = Data(path=str(written(tmp_path, "plain.txt")), tokenizer="bpe:400")
    counted = count_tokens(data)
    assert counted is not None and counted.is_about
    trained = load_text(data)
    assert counted.count == pytest.approx(len(trained.tokens), rel=0.1)
    assert trained.fingerprint == hashlib.sha256(trained.tokens.tobytes()).hexdigest()
    (note,) = check_data(run_of(tmp_path / "plain.txt", tokenizer="bpe:400", model={"vocab": 400}))
    assert "million tokens; bpe:400 is trained when training starts" in note


@pytest.mark.usefixtures("small_is_large")
def test_all_that_takes_long_is_counted_to_its_end(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    counts: dict[str, list[float]] = {}

    @contextmanager
    def report(title: str, total: int) -> Iterator[Advance]:
        units: list[float] = []
        yield units.append
        counts[title] = [total, sum(units)]

    path = written(tmp_path, "text.gz")
    with reported_by(report):
        load_text(Data(path=str(path), tokenizer="bpe:300"))
    trained_on = int(0.9 * len(LINES.encode()))
    assert counts["reading text.gz"] == [path.stat().st_size] * 2
    assert counts["encoding text (bpe:300)"] == [len(LINES.encode())] * 2
    assert counts["training the tokenizer bpe:300"] == [pytest.approx(trained_on, abs=4)] * 2
