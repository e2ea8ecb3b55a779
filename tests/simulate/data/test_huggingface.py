"""Data sets of the datasets library, made here and loaded without a network: texts and images, streamed once."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulate.common.errors import InputError
from simulate.config.tables import Data
from simulate.data import huggingface as hub
from simulate.data.images import load_images
from simulate.data.load import image_source
from simulate.data.text import load_text
from tests.simulate.data.pictures import encoded, pixels

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the library's own
    pytest.mark.skipif(find_spec("datasets") is None, reason="the hf extra has datasets"),
]

ROWS = [{"text": f"line {n} of ünicode", "number": n, "title": f"t{n}"} for n in range(30)]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the library off the network."""
    import datasets  # not above: it takes seconds, of every process that only lists tests

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def write_rows(folder: Path, rows: list[dict[str, Any]], split: str = "train") -> str:
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"hf:{folder}"


def write_pictures(folder: Path, split: str, count: int, **columns: Any) -> str:
    folder.mkdir(exist_ok=True)
    content = {
        "image": [{"bytes": encoded(pixels(n)), "path": None} for n in range(count)],
        "label": [n % 3 for n in range(count)],
        **columns,
    }
    import datasets

    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cow"])}
    kinds |= {name: datasets.Value("string") for name in columns}
    datasets.Dataset.from_dict(content, datasets.Features(kinds)).to_parquet(str(folder / f"{split}.parquet"))
    return f"hf:{folder}"


def refusal(**data: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_text(Data(**data)) if image_source(Data(**data)) is None else None
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("rows", "expected"), [(None, 30), (7, 7), (100, 30)])
def test_texts_are_rows_between_newlines(tmp_path: Path, rows: int | None, expected: int) -> None:
    name = write_rows(tmp_path / "set", ROWS)
    data = Data(name=name, column="text", rows=rows)
    assert image_source(data) is None
    text = load_text(data)
    assert bytes(text.tokens).decode().split("\n") == [row["text"] for row in ROWS[:expected]]
    assert text.source == name


def test_a_stream_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = write_rows(tmp_path / "set", [{"text": "once"}])
    first = load_text(Data(name=name)).fingerprint
    monkeypatch.setattr(hub, "_Stream", None)
    assert load_text(Data(name=name)).fingerprint == first
    write_rows(tmp_path / "set", [{"text": "changed"}])
    with pytest.raises(TypeError):
        load_text(Data(name=name))


def test_rows_are_kept_by_the_library_and_texts_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTE_CACHE", str(tmp_path / "cache"))
    text = load_text(Data(name=write_rows(tmp_path / "set", ROWS), column="text"))
    (kept,) = (tmp_path / "cache").glob("hub-*.arrow")
    import datasets

    rows = datasets.Dataset.from_file(str(kept))
    assert b"".join(rows["content"]) == bytes(text.tokens)
    assert isinstance(text.tokens, np.memmap)


def test_a_damaged_file_of_rows_is_streamed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTE_CACHE", str(tmp_path / "cache"))
    data = Data(name=write_rows(tmp_path / "set", ROWS), column="text")
    first = load_text(data)
    (kept,) = (tmp_path / "cache").glob("hub-*.arrow")
    sound = kept.read_bytes()
    for damaged in (b"", sound[:100], sound[: len(sound) // 2]):
        kept.write_bytes(damaged)
        assert load_text(data).fingerprint == first.fingerprint


def test_images_are_read_by_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool of processes opens the file of rows by its path."""
    monkeypatch.setattr("simulate.data.decode_images.POOL_FROM_IMAGES", 4)
    monkeypatch.setattr("simulate.data.decode_images.CHUNK_IMAGES", 6)
    monkeypatch.setattr("simulate.data.decode_images.usable_workers", lambda tasks: 2)
    source = image_source(Data(name=write_pictures(tmp_path / "set", "train", 12)))
    assert source is not None
    loaded = load_images(source, source.frame(None, None, False))
    assert all(np.array_equal(loaded.pixels[row], pixels(row).transpose(2, 0, 1)) for row in range(12))


def test_other_tokens_are_made_of_it_like_of_any_text(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    text = load_text(Data(name=write_rows(tmp_path / "set", ROWS), column="text", tokenizer="bpe:300"))
    assert text.vocabulary is not None and len(text.tokens) < sum(len(row["text"]) for row in ROWS)


@pytest.mark.parametrize("held_out", [None, "test", "validation"])
def test_images_come_with_labels_class_names_and_splits(tmp_path: Path, held_out: str | None) -> None:
    name = write_pictures(tmp_path / "set", "train", 12)
    if held_out:
        write_pictures(tmp_path / "set", held_out, 6)
    source = image_source(Data(name=name))
    assert source is not None and source.classes == ("ant", "bee", "cow")
    loaded = load_images(source, source.frame(None, None, False))
    assert len(loaded.train) == (12 if held_out else 9) and len(loaded.validation) == (6 if held_out else 3)
    for row in range(len(loaded.labels)):
        assert np.array_equal(loaded.pixels[row], pixels(row % 12).transpose(2, 0, 1))
        assert loaded.labels[row] == row % 12 % 3


def test_a_cap_on_rows_holds_for_each_split(tmp_path: Path) -> None:
    name = write_pictures(tmp_path / "set", "train", 12)
    write_pictures(tmp_path / "set", "test", 6)
    source = image_source(Data(name=name, rows=5))
    assert source is not None and source.held_out.tolist() == [False] * 5 + [True] * 5


def test_a_picture_beside_a_caption_is_the_image(tmp_path: Path) -> None:
    name = write_pictures(tmp_path / "set", "train", 6, caption=["words"] * 6)
    assert image_source(Data(name=name)) is not None
    assert image_source(Data(name=name, column="caption")) is None


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    name = write_rows(tmp_path / "two", ROWS)
    assert "columns text, number, title, of which one must be text or images" in refusal(name=name)
    assert "--set data.column=NAME" in refusal(name=name, column="number")
    assert "cannot be loaded" in refusal(name="hf:nobody/has-this")
    assert "cannot be loaded" in refusal(name=f"hf:{tmp_path / 'nowhere'}")
    name = write_rows(tmp_path / "test only", ROWS, split="test")
    assert "has no split 'train' (but test)" in refusal(name=name, column="text")
    name = write_rows(tmp_path / "blank", [{"text": ""}, {"text": " "}])
    assert "holds no text" in refusal(name=name)
    name = write_rows(tmp_path / "nothing", [{"text": ""}])
    assert "nothing in them" in refusal(name=name)


def test_a_missing_library_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'lte[hf]'" in refusal(name=write_rows(tmp_path / "set", ROWS))


def test_keys_of_the_hub_need_a_name_of_it() -> None:
    for key, value in {"rows": 3, "subset": "en", "column": "text"}.items():
        with pytest.raises(ValueError, match=f"{key} = .* belongs to a name that starts with hf:"):
            Data(name="stdlib", **{key: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hf:NAME"):
        Data(name="hf:")
