"""The shared secret: where it comes from, and that it stays one."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import pytest

from simulate.common.errors import InputError
from simulate.launch.preflight.secret import Secret, make_secret, read_secret
from tests.simulate.launch.preflight.nodes import SECRET, SECRET_TEXT


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def same(one: Secret | None, other: Secret | None) -> bool:
    assert one is not None and other is not None
    return one.mac("x", b"y") == other.mac("x", b"y")


def test_it_is_read_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = write(tmp_path / "secret", f"{SECRET_TEXT}\n")
    assert same(read_secret(file, {}), SECRET)
    assert same(read_secret(None, {"LTE_SECRET": SECRET_TEXT}), SECRET)
    assert same(read_secret(file, {"LTE_SECRET": "another-one-that-is-long"}), SECRET)
    assert read_secret(None, {}) is None


def test_the_environment_is_this_process_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTE_SECRET", SECRET_TEXT)
    assert same(read_secret(None), SECRET)


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o644, 0o620, 0o660])
def test_a_file_that_others_may_open_is_refused(tmp_path: Path, mode: int) -> None:
    file = write(tmp_path / "secret", SECRET_TEXT, mode)
    with pytest.raises(InputError, match=rf"open to other users \(mode {mode:o}\); chmod 600") as caught:
        read_secret(file, {})
    assert SECRET_TEXT not in str(caught.value)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_secret(tmp_path / "nowhere", {})
    with pytest.raises(InputError, match="no plain file"):
        read_secret(tmp_path, {})
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(InputError, match="no plain file"):  # and it does not wait for a writer
        read_secret(tmp_path / "pipe", {})


@pytest.mark.parametrize("text", ["", "short", "x" * 15, " " * 40, "x" * 5000])
def test_a_secret_of_a_wrong_length_is_refused_and_not_quoted(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="16 to 4096 are needed") as caught:
        read_secret(None, {"LTE_SECRET": text})
    assert not text.strip() or text not in str(caught.value)
    with pytest.raises(InputError, match="16 to 4096 are needed"):
        read_secret(write(tmp_path / "secret", text), {})


def test_it_shows_itself_nowhere() -> None:
    assert SECRET_TEXT not in f"{SECRET} {SECRET!r} {vars(type(SECRET))} {[SECRET]}"
    assert SECRET_TEXT.encode() not in SECRET._key
    with pytest.raises(TypeError, match="not written anywhere"):
        pickle.dumps(SECRET)
    assert copy.deepcopy(SECRET) is SECRET


def test_labels_and_derivations_keep_uses_apart() -> None:
    macs = [SECRET.mac(label, data) for label in ("caller", "answerer") for data in (b"1", b"2")]
    macs += [SECRET.derived("session", b"1").mac("caller", b"1"), Secret(b"x" * 16).mac("caller", b"1")]
    assert len(set(macs)) == len(macs)
    assert SECRET.mac("caller", b"1") == macs[0]


def test_a_made_secret_is_long_new_and_accepted() -> None:
    one, other = make_secret(), make_secret()
    assert one != other
    assert len(one) >= 43  # 256 bits in base64
    assert not same(Secret(one.encode()), Secret(other.encode()))
