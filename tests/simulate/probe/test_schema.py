"""probe.json: written and read again, and errors for files that are no probe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simulate.common.errors import InputError
from simulate.models.families.gpt import gpt_shape
from simulate.probe.recommend import recommend
from simulate.probe.schema import check_model, dump_probe, load_probe, shapes_fingerprint
from tests.simulate.probe.figures import probe_of

SHAPE = gpt_shape("gpt", 2, 16, 2, 8, 256)


def test_a_probe_comes_back_as_it_was(tmp_path: Path) -> None:
    probe = probe_of((3, 20), (5, 18))
    probe = probe.model_copy(update={"recommendation": recommend(probe, 4, 4)})
    path = tmp_path / "probe.json"
    path.write_text(dump_probe(probe), encoding="utf-8")
    assert load_probe(path) == probe


def _without(*keys: str) -> Callable[[Any], Any]:
    def change(table: Any) -> Any:
        inner = table
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        return table

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without("network", "fingerprint"), ("network.fingerprint is missing",)),
        (_without("version"), ("version = None", "lte probe")),
        (lambda table: {**table, "version": 2}, ("version = 2",)),
        (lambda table: {**table, "layers": []}, ("layers",)),
        (lambda table: {**table, "depth": 3}, ("depth is not a known key",)),
        (lambda table: [table], ("is no probe",)),
    ],
)
def test_what_is_no_probe_is_refused(change: Callable[[Any], Any], words: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "probe.json"
    path.write_text(json.dumps(change(json.loads(dump_probe(probe_of((3, 20)))))), encoding="utf-8")
    with pytest.raises(InputError) as refusal:
        load_probe(path)
    message = str(refusal.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert all(word in message for word in words)


@pytest.mark.parametrize("text", ["", "{", "NaN", "[" * 100_000, '{"version": 1, "layers": NaN}'])
def test_what_is_no_json_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "probe.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"probe\.json"):
        load_probe(path)


def test_equal_shapes_have_one_fingerprint_whatever_their_name() -> None:
    assert shapes_fingerprint(SHAPE) == shapes_fingerprint(gpt_shape("other", 2, 16, 2, 8, 256))
    others = [(3, 16, 2, 8, 256), (2, 18, 2, 8, 256), (2, 16, 2, 9, 256), (2, 16, 2, 8, 255)]
    assert shapes_fingerprint(SHAPE) not in {shapes_fingerprint(gpt_shape("gpt", *sizes)) for sizes in others}


def test_a_probe_of_another_model_is_refused() -> None:
    check_model(probe_of((1, 2), fingerprint=shapes_fingerprint(SHAPE)), SHAPE, Path("probe.json"))
    with pytest.raises(InputError, match="gpt with 1,000 parameters"):
        check_model(probe_of((1, 2)), SHAPE, Path("probe.json"))
