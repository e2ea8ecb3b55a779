"""Restored adapter methods continue bit for bit: in mid-round, between fragments, around the first adapters."""

from __future__ import annotations

import pytest

from simulate.config.method_options import AdapterOptions
from simulate.config.method_table import method_options
from simulate.layers.lora import lora_layers
from simulate.methods.averaging import Averaging
from simulate.methods.lte.merge import LayerMerger
from tests import tiny
from tests.selection import others_slow, selected

ADAPTERS = [name for name, table in tiny.VARIANTS.items() if issubclass(method_options(table["name"]), AdapterOptions)]
# LTE's T is 4 and its fragments merge 2 apart: in mid-round, between two of them. ReLoRA restarts after 7; or it begins
# after 5 and restarts after 11.
AWKWARD = [(name, 6) for name in ADAPTERS]
QUICK = [(name, 6) for name in selected("resume", ADAPTERS)]
RIGHT_AFTER = [("lte", 4), ("lte, forgetful", 8), ("lte, streaming int8", 8), ("lte, reduced int4", 8)]
RELORA = [("relora", 7), ("relora, warm start", 3), ("relora, warm start", 5), ("relora, warm start", 11)]


@pytest.mark.parametrize(
    ("name", "steps_before"), others_slow([*AWKWARD, *RIGHT_AFTER, *RELORA], [*QUICK, *RIGHT_AFTER[:2], *RELORA[:2]])
)
def test_a_restored_method_continues_bit_for_bit(name: str, steps_before: int) -> None:
    tiny.assert_resumes(name, steps_before, devices=4 if "nodes" in name else 2)


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        pytest.param("lte, int8", LayerMerger, id="what rounding lost of factors"),
        pytest.param("lte, reduced int4", LayerMerger, id="what rounding lost of deltas"),
        pytest.param("lte, reduced int4", Averaging, id="weights at the last merge"),
    ],
)
def test_what_a_method_keeps_is_missed(monkeypatch: pytest.MonkeyPatch, name: str, owner: type) -> None:
    monkeypatch.setattr(owner, "state_dict", lambda keeper: {})
    with pytest.raises(AssertionError):
        tiny.assert_resumes(name, 6, devices=2)


@pytest.mark.parametrize("steps_before", [3, 8], ids=["dense", "with adapters"])
def test_a_state_around_the_first_adapters_brings_its_own_kind_of_model(steps_before: int) -> None:
    run = tiny.variant_run("relora, warm start", 2)
    method, restored = tiny.build(run), tiny.build(run)
    tiny.train(method, 0, steps_before)
    restored.state.load_state_dict(method.state.state_dict())
    assert len(lora_layers(restored.model)) == len(lora_layers(method.model)) == (8 if steps_before > 5 else 0)
