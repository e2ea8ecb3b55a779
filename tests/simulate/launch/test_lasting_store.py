"""A store that is apart: who may ask for it, and that its clients find it again when it was restarted."""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from simulate.common.errors import InputError, RunFailedError
from simulate.launch.lasting_store import LastingStore, ask_store, read_address, serve_store, write_address
from simulate.launch.preflight.secret import VARIABLE, Secret, make_secret, read_secret

CONTEXT = multiprocessing.get_context("fork")


@contextmanager
def served(where: str, secret: Secret | None = None) -> Iterator[None]:
    """Serve a store in a process that is killed at the end."""
    process = CONTEXT.Process(target=serve_store, args=(where, secret, False, lambda line: None), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


@pytest.fixture()
def where() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def client(where: str, prefix: str = "", patience_s: float = 30.0) -> LastingStore:
    return LastingStore(lambda: ask_store(where, None), patience_s, prefix)


def test_who_has_set_a_key_may_say_so_to_others(where: str) -> None:
    with served(where):
        first, second = client(where), client(where)
        for index in range(300):
            first.set(f"key{index}", "1")
            assert second.get(f"key{index}") == b"1"


def test_a_restarted_store_is_found_again_and_is_another_one(where: str) -> None:
    with served(where):
        first, second = client(where), client(where)
        first.set("key", "1")
        assert (second.get("key"), second.add("counter", 2), first.generation, second.generation) == (b"1", 2, 1, 1)
        assert first.compare_set("key", "", "2") == b"1"
        assert first.delete_key("key")
    with served(where):
        assert not first.check(["counter"])  # waits for it, and is empty
        first.set("key", "3")
        assert (second.get("key"), first.generation, second.generation) == (b"3", 2, 2)


def test_launches_have_keys_of_their_own(where: str) -> None:
    with served(where):
        first, second = client(where, "one"), client(where, "two")
        first.set("key", "1")
        first.set_for_all("newest", "one")
        assert not second.check(["key"])
        assert client(where).get("newest") == b"one"


def test_patience_ends(where: str) -> None:
    with served(where):
        store = client(where, patience_s=1.0)
    begun_s = time.monotonic()
    with pytest.raises(RunFailedError, match=r"the store has not answered for 1 s \(cluster\.join_timeout_s\)"):
        store.check(["key"])
    assert time.monotonic() - begun_s < 20


def test_only_who_has_the_secret_is_told_the_port(where: str) -> None:
    secret = read_secret(None, {VARIABLE: make_secret()})
    with served(where, secret):
        deadline = time.monotonic() + 30
        while True:
            try:
                with pytest.raises(InputError, match=r"--store 127\.0\.0\.1:\d+: it .*same secret"):
                    ask_store(where, None)
                break
            except OSError:
                assert time.monotonic() < deadline
        host, port = ask_store(where, secret)
        assert host == "127.0.0.1"
        assert port != int(where.rpartition(":")[2])


@pytest.mark.parametrize("where", ["nonsense", "8.8.8.8:29600"])
def test_what_a_store_cannot_listen_at_is_refused_by_its_option(where: str) -> None:
    with pytest.raises(InputError, match=r"--listen"):
        serve_store(where, None, False, lambda line: None)


def test_workers_read_where_the_store_is(tmp_path: Path) -> None:
    write_address(tmp_path / "logs", ("127.0.0.1", 4711))
    assert read_address(tmp_path / "logs") == ("127.0.0.1", 4711)
