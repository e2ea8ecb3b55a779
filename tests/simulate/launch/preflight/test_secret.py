"""The shared secret: where it comes from, that it stays one, and that no clock makes it fail."""

from __future__ import annotations

import base64
import os
import pickle
import ssl
from pathlib import Path

import pytest
from cryptography import x509

from ltecli.app import main
from simulate.common.errors import InputError
from simulate.launch.preflight.secret import MAX_BYTES, Secret, make_secret, read_secret
from tests.simulate.launch.preflight.nodes import OTHER, OTHER_TEXT, SECRET, SECRET_TEXT


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def same(one: Secret | None, other: Secret | None) -> bool:
    assert one is not None and other is not None
    return one.certificate == other.certificate


def key_text(pem: str) -> str:
    """Return the line of a secret that is its private key."""
    return pem.splitlines()[1]


def test_it_is_read_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = write(tmp_path / "secret", f"{SECRET_TEXT}\n")
    assert same(read_secret(file, {}), SECRET)
    assert same(read_secret(None, {"LTE_SECRET": SECRET_TEXT}), SECRET)
    assert same(read_secret(file, {"LTE_SECRET": OTHER_TEXT}), SECRET)
    assert read_secret(None, {}) is None


def test_it_may_be_base64_on_one_line_or_several(tmp_path: Path) -> None:
    for text in (base64.b64encode(SECRET_TEXT.encode()), base64.encodebytes(SECRET_TEXT.encode())):
        assert same(read_secret(None, {"LTE_SECRET": text.decode()}), SECRET)
        assert same(read_secret(write(tmp_path / "secret", text.decode()), {}), SECRET)


def test_the_environment_is_this_process_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTE_SECRET", SECRET_TEXT)
    assert same(read_secret(None), SECRET)


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o644, 0o620, 0o660])
def test_a_file_that_others_may_open_is_refused(tmp_path: Path, mode: int) -> None:
    file = write(tmp_path / "secret", SECRET_TEXT, mode)
    with pytest.raises(InputError, match=rf"open to other users \(mode {mode:o}\); chmod 600") as caught:
        read_secret(file, {})
    assert key_text(SECRET_TEXT) not in str(caught.value)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_secret(tmp_path / "nowhere", {})
    with pytest.raises(InputError, match="no plain file"):
        read_secret(tmp_path, {})
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(InputError, match="no plain file"):  # and it does not wait for a writer
        read_secret(tmp_path / "pipe", {})


OTHERS_KEY = OTHER_TEXT[: OTHER_TEXT.index("-----BEGIN CERTIFICATE")]
CERTIFICATE = SECRET_TEXT[SECRET_TEXT.index("-----BEGIN CERTIFICATE") :]


@pytest.mark.parametrize(
    "text",
    [
        "correct-horse-battery-staple",
        "0G4WTaN3r2kJcLzqUe7yXQhPv1mBs9dFoRtA5iKxW8E",  # as lte secret made them before
        "x" * (2 * MAX_BYTES),
        CERTIFICATE,
        SECRET_TEXT.removesuffix(CERTIFICATE),
        OTHERS_KEY + CERTIFICATE,
        SECRET_TEXT.replace("-----END CERTIFICATE", "****"),
        CERTIFICATE + "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n",
    ],
    ids=["old", "old made", "long", "no key", "no certificate", "another's key", "cut off", "a password"],
)
def test_text_that_is_no_such_secret_is_refused_by_name_and_not_quoted(text: str, tmp_path: Path) -> None:
    file = write(tmp_path / "secret", text)
    for name, given in (("LTE_SECRET", (None, {"LTE_SECRET": text})), (f"--secret-file {file}", (file, {}))):
        with pytest.raises(InputError, match="make a new one with lte secret PATH and copy it to all nodes") as caught:
            read_secret(*given)
        assert str(caught.value).startswith(f"{name} holds no certificate with its key")
        assert not any(line in str(caught.value) for line in text.splitlines())


@pytest.mark.parametrize("text", ["", " " * 40])
def test_an_empty_one_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="LTE_SECRET holds no certificate"):
        read_secret(None, {"LTE_SECRET": text})


def test_it_shows_itself_nowhere() -> None:
    parts = [getattr(SECRET, name) for name in type(SECRET).__slots__]
    shown = f"{SECRET} {SECRET!r} {vars(type(SECRET))} {[SECRET]} {parts}"
    assert key_text(SECRET_TEXT) not in shown
    assert base64.b64decode(key_text(SECRET_TEXT))[-32:] not in SECRET.certificate
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(SECRET)


def test_its_key_stays_in_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    read_secret(None, {"LTE_SECRET": SECRET_TEXT})
    with pytest.raises(InputError):
        read_secret(None, {"LTE_SECRET": CERTIFICATE})
    assert list(tmp_path.iterdir()) == []


def test_a_made_secret_is_new() -> None:
    one, other = make_secret(), make_secret()
    assert key_text(one) != key_text(other)
    assert not same(Secret(one.encode()), Secret(other.encode()))


def test_no_clock_makes_a_certificate_too_old_or_too_new() -> None:
    for text in (ssl.DER_cert_to_PEM_cert(Secret.for_loopback().certificate), CERTIFICATE):
        certificate = x509.load_pem_x509_certificate(text.encode())
        assert certificate.not_valid_before_utc.timestamp() == 0
        assert certificate.not_valid_after_utc.year == 9999


def test_the_one_of_loopback_is_the_same_on_every_machine() -> None:
    first = Secret.for_loopback().certificate
    Secret.for_loopback.__func__.cache_clear()  # type: ignore[attr-defined]
    assert Secret.for_loopback().certificate == first
    assert first not in (SECRET.certificate, OTHER.certificate)


def test_the_command_writes_one_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "lte.secret"
    assert main(["secret", str(path)]) == 0
    assert path.stat().st_mode & 0o777 == 0o600
    written = read_secret(path, {})
    assert main(["secret", str(path)]) == 2  # it keeps what is there
    assert same(read_secret(path, {}), written)
