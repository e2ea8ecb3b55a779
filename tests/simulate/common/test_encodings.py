"""Byte order marks: every file of the user is read alike with one and without."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulate.common.encodings import read_text
from simulate.common.errors import InputError
from simulate.config.profiles import load_profile
from simulate.config.run import load_run
from simulate.launch.preflight.secret import make_secret, read_secret
from simulate.models.huggingface import _table
from tests.harness import ROOT

TEXT = "# über 😀\n[train]\nsteps = 3\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_run_is_read_in_what_its_mark_says(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(TEXT.encode(encoding))
    assert read_text(path) == TEXT
    assert load_run(path).train.steps == 3
    path.write_bytes(TEXT.replace("= 3", "=").encode(encoding))
    with pytest.raises(InputError, match="line 3"):
        load_run(path)


def test_text_of_no_mark_and_no_utf_8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    for content in (TEXT.encode("latin-1", "replace"), b"\xff\xfe" + TEXT.encode("utf-16-le")[:-1]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"run\.toml: is not UTF-8 text"):
            load_run(path)


def test_profiles_configurations_and_secrets_may_have_a_mark(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    profile, config, secret = (tmp_path / name for name in ("p.toml", "config.json", "s.key"))
    profile.write_bytes(mark + (ROOT / "profiles" / "h200.toml").read_bytes())
    assert load_profile(str(profile)).name == "h200"
    config.write_bytes(mark + b'{"model_type": "gpt2"}')
    assert _table(config, "hf:there") == {"model_type": "gpt2"}
    text = make_secret().replace("\n", "\r\n").encode()
    secret.write_bytes(text)
    secret.chmod(0o600)
    plain = read_secret(secret)
    secret.write_bytes(mark + text)
    marked = read_secret(secret)
    assert plain is not None and marked is not None and plain.certificate == marked.certificate
