"""The secret that all nodes of a run share: one certificate and its private key, made by `lte secret`.

Every node shows this certificate over TLS 1.3, and accepts a peer that shows the very same one and proves to hold its
key. All nodes hold one file, so that there is no authority to run and nothing to renew. The nodes of a preflight and
both ends of `lte profile measure --link` read it here; only making one needs the package `cryptography`.
"""

from __future__ import annotations

import base64
import codecs
import functools
import hashlib
import json
import os
import re
import ssl
import stat
import tempfile
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

from simulate.common.errors import InputError

VARIABLE = "LTE_SECRET"
MAX_BYTES = 16384
MAX_INVITATION_BYTES = 2**20
"""Invitations hold a run.toml and a profile beside the secret."""
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


class Secret:
    """A run's certificate, with TLS contexts that show it and demand it; str, repr and pickle do not reveal its key."""

    __slots__ = ("certificate", "client", "server")

    def __init__(self, pem: bytes) -> None:
        """Read a private key and its certificate; raises ValueError where they are not both there."""
        found = _CERTIFICATE.search(pem)
        if found is None:
            raise ValueError("no certificate")
        self.certificate = ssl.PEM_cert_to_DER_cert(found[0].decode())
        # OpenSSL takes keys from files only. The folder is its owner's alone (0700), and gone a moment later.
        with tempfile.TemporaryDirectory(prefix="lte-") as folder:
            path = Path(folder) / "secret.pem"
            path.write_bytes(pem)
            self.client = self._context(ssl.PROTOCOL_TLS_CLIENT, path)
            self.server = self._context(ssl.PROTOCOL_TLS_SERVER, path)
        # Without session tickets every connection proves the key anew, and what a caller reads first is a message.
        self.server.num_tickets = 0

    def _context(self, protocol: int, path: Path) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        # The certificate names no host: all nodes show the same one, and peers are compared with it byte by byte.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            # An empty password, since OpenSSL would ask the terminal for one of an encrypted key.
            context.load_cert_chain(path, password="")
            context.load_verify_locations(cadata=self.certificate)
        except ssl.SSLError as error:
            raise ValueError(f"no key of this certificate ({error.reason})") from None
        return context

    @classmethod
    @functools.cache
    def for_loopback(cls) -> Secret:
        """Return the publicly known secret of runs without one; loopback only."""
        return cls(_make_pem(hashlib.sha256(b"lte preflight without a secret").digest()))

    def __repr__(self) -> str:
        return "Secret(hidden)"


def make_secret() -> str:
    """Return a new private key and its certificate, as PEM text."""
    return _make_pem(os.urandom(32)).decode()


def _make_pem(key: bytes) -> bytes:
    """Return an Ed25519 key of 32 bytes and its self-signed certificate; the same key gives the same text."""
    # Imported here, since no other command needs it.
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.from_private_bytes(key)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "lte")])
    certificate = (
        x509.CertificateBuilder(issuer_name=name, subject_name=name, public_key=private.public_key(), serial_number=1)
        # Valid from the epoch on and without an end (RFC 5280, 4.1.2.5): a node whose clock is wrong must not fail
        # here, in words about certificates; the preflight measures clocks and names them. A new file replaces an old
        # one, so that nothing needs to expire.
        .not_valid_before(datetime(1970, 1, 1, tzinfo=timezone.utc))
        .not_valid_after(datetime(9999, 12, 31, 23, 59, 59, tzinfo=timezone.utc))
        .sign(private, algorithm=None)
    )
    text = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return text + certificate.public_bytes(serialization.Encoding.PEM)


def read_secret(path: Path | None, environ: Mapping[str, str] | None = None) -> Secret | None:
    """Return the secret in a file, else in LTE_SECRET, else None; it is PEM text, or base64 of that on one line.

    Raises InputError for a file that is missing, not plain or readable by others, and for text that is no such secret;
    never quotes it.
    """
    text = read_secret_text(path, environ)
    return None if text is None else Secret(text.encode())


def read_secret_text(path: Path | None, environ: Mapping[str, str] | None = None) -> str | None:
    """Return the secret as PEM text, from where `read_secret` takes it. Raises InputError as that does."""
    if path is not None:
        name, text = (
            f"--secret-file {path}",
            read_private(path, "--secret-file", "copy node 0's there (chmod 600)", MAX_INVITATION_BYTES),
        )
    else:
        # Never an option of the command line, since arguments show in the list of processes.
        given = (os.environ if environ is None else environ).get(VARIABLE)
        if given is None:
            return None
        name, text = VARIABLE, given.encode()
    # Editors of Windows put a mark before text, which is no part of the secret.
    text = text.removeprefix(codecs.BOM_UTF8).strip()
    try:
        if text.startswith(b"{"):  # an invitation, which holds the secret, too
            text = str(json.loads(text)["secret"]).encode()
        pem = text if text.startswith(b"-----BEGIN") else base64.b64decode(b"".join(text.split()), validate=True)
        Secret(pem)
        return pem.decode().strip() + "\n"
    except (ValueError, KeyError):
        raise InputError(
            f"{name} holds no certificate with its key, which is what lte secret makes (plain text of earlier versions "
            "is no secret any more); make a new one with lte secret PATH and copy it to all nodes, or set "
            f"{VARIABLE} to its base64"
        ) from None


def read_private(path: Path, option: str, where_missing: str, most_bytes: int = MAX_BYTES) -> bytes:
    """Return the content of a file that nobody but its owner may open; raises InputError, which names `option`."""
    try:
        # Non-blocking: opening a named pipe would wait for its writer.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise InputError(f"{option} {path}: no such file; {where_missing}") from None
    except OSError as error:
        raise InputError(f"{option} {path} cannot be read ({error.strerror}); check its permissions") from None
    try:
        # Check the opened file, not its name, which may stand for another file by now.
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise InputError(f"{option} {path} is no plain file; save its text in one{_or_variable(option)}")
        if os.name == "posix" and mode & 0o077:
            permissions = stat.S_IMODE(mode)
            raise InputError(f"{option} {path} is open to other users (mode {permissions:o}); chmod 600 {path}")
        return os.read(handle, most_bytes)
    finally:
        os.close(handle)


def _or_variable(option: str) -> str:
    return f", or use {VARIABLE}" if option == "--secret-file" else ""
