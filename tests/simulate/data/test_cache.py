"""The cache: equal keys make a file once, damage of any byte is seen, no half-written file is ever used."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from simulate.common.cache_folder import cache_folder
from simulate.common.errors import InputError
from simulate.data import cache
from simulate.data.cache import CachedArrays, Draft, cached, open_arrays
from tests.harness import run_together


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("LTE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Maker:
    """A maker that fills a draft and counts its calls."""

    def __init__(self, value: int = 7) -> None:
        self.value, self.calls = value, 0

    def __call__(self, draft: Draft) -> None:
        self.calls += 1
        places = draft.allocate({"bytes": ("u1", (3, 5)), "wide": ("f8", (2,))}, {"classes": ["é", "b"]})
        places["bytes"].open()[:] = self.value
        places["wide"].open()[:] = 0.5


def the_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def check(kept: CachedArrays, value: int = 7) -> None:
    assert kept.arrays["bytes"].tolist() == [[value] * 5] * 3
    assert kept.arrays["wide"].tolist() == [0.5, 0.5]
    assert kept.facts == {"classes": ["é", "b"]}


def test_equal_keys_are_made_once_and_others_anew() -> None:
    make, other = Maker(), Maker(8)
    for _ in range(2):
        check(cached("test", {"path": "a", "size": 1}, make))
    assert make.calls == 1
    check(cached("test", {"path": "a", "size": 2}, other), 8)
    assert other.calls == 1


def test_arrays_are_mapped_and_cannot_be_written() -> None:
    kept = cached("test", {}, Maker())
    assert isinstance(kept.arrays["bytes"], np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        kept.arrays["bytes"][0, 0] = 1


def test_the_file_is_a_safetensors_file(folder: Path) -> None:
    cached("test", {}, Maker())
    loaded = load_file(the_file(folder))
    assert loaded["bytes"].tolist() == [[7] * 5] * 3 and loaded["wide"].tolist() == [0.5, 0.5]


def test_any_changed_byte_makes_it_anew(folder: Path) -> None:
    cached("test", {}, Maker())
    path = the_file(folder)
    sound = path.read_bytes()
    unseen = []
    for place in range(len(sound)):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        if open_arrays(path) is not None:
            unseen.append(place)
    assert not unseen
    path.write_bytes(sound[:-1] + b"\xff")
    make = Maker()
    check(cached("test", {}, make))
    assert make.calls == 1


def test_a_large_file_is_read_through_once_until_it_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LARGE_BYTES", 1)
    digests: list[int] = []
    inner = cache._digest
    monkeypatch.setattr(cache, "_digest", lambda file: (digests.append(1), inner(file))[1])
    make = Maker()
    for _ in range(3):
        check(cached("test", {}, make))
    assert (make.calls, len(digests)) == (1, 2)  # to seal it, and to open it first
    path = the_file(folder)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    os.utime(path, ns=(0, 0))  # a time of its own, whatever the clock's steps are
    check(cached("test", {}, make))
    assert make.calls == 2


@pytest.mark.parametrize("length", [0, 1, 1000])
def test_an_array_of_unknown_length_is_written_block_by_block(folder: Path, length: int) -> None:
    facts = {"name": "é", "count": 0}

    def blocks() -> Iterator[np.ndarray]:
        for begin in range(0, length, 300):
            block = np.arange(begin, min(length, begin + 300), dtype="u2")
            facts["count"] += len(block)
            yield block

    kept = cached("test", {}, lambda draft: draft.stream("numbers", "u2", blocks(), facts))
    numbers = np.arange(length, dtype="u2")
    assert kept.arrays["numbers"].tolist() == load_file(the_file(folder))["numbers"].tolist() == numbers.tolist()
    assert kept.facts == {"name": "é", "count": length, "sha256": hashlib.sha256(numbers.tobytes()).hexdigest()}


def test_facts_are_found_out_once(folder: Path) -> None:
    calls: list[int] = []
    for _ in range(2):
        assert cache.cached_facts("test", {}, lambda: (calls.append(1), {"count": 3})[1]) == {"count": 3}
    (path,) = folder.glob("*.json")
    path.write_text("{")
    assert cache.cached_facts("test", {}, lambda: {"count": 4}) == {"count": 4}
    assert len(calls) == 1


@pytest.mark.parametrize("length", [0, 4, 9, 100, -1])
def test_a_truncated_file_is_made_anew(folder: Path, length: int) -> None:
    cached("test", {}, Maker())
    path = the_file(folder)
    path.write_bytes(path.read_bytes()[:length])
    make = Maker()
    check(cached("test", {}, make))
    assert make.calls == 1


def test_a_maker_that_fails_leaves_nothing(folder: Path) -> None:
    def fail(draft: Draft) -> None:
        Maker()(draft)
        raise InputError("damaged")

    with pytest.raises(InputError, match="damaged"):
        cached("test", {}, fail)
    assert not [path for path in folder.iterdir() if path.suffix != ".lock"]


def test_equal_contents_have_equal_digests_and_others_differ() -> None:
    first, second, other = (cached("test", {"n": n}, Maker(8 if n == 2 else 7)).digest for n in range(3))
    assert first == second != other


def test_a_full_disk_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache, "reserve", full)
    with pytest.raises(InputError, match=r"No space left on device.*set LTE_CACHE to another folder") as caught:
        cached("test", {}, Maker())
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_made_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTE_CACHE", "/dev/null/cache")
    with pytest.raises(InputError, match="/dev/null/cache cannot be used"):
        cached("test", {}, Maker())


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("LTE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(InputError, match=r"this user has no home folder.*export LTE_CACHE=FOLDER"):
        cached("test", {}, Maker())


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LTE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "lte"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "lte"


MAKE_SLOWLY = """
import sys, time
from simulate.data.cache import cached
def make(draft):
    print("made", flush=True)
    time.sleep(1)
    draft.allocate({"bytes": ("u1", (3,))}, {})["bytes"].open()[:] = 7
cached("test", {}, make)
"""


def test_of_two_processes_one_makes_and_the_other_waits() -> None:
    outcomes = run_together([[sys.executable, "-c", MAKE_SLOWLY]] * 2, 60)
    assert sorted(outcome.stdout for outcome in outcomes) == ["", "made\n"]
