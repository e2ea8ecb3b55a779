"""Where something was computed: read from the system's own words, without libraries."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from simulate.common import processor
from simulate.common.processor import distinct, machine_facts, machine_text, parse_cpuinfo

XEON = """processor : 0
model name\t: Intel(R) Xeon(R) Processor
flags\t\t: fpu sse4_2 avx avx2 avx512f amx_tile

processor : 1
model name\t: another
flags\t\t: fpu
"""
GRAVITON = """processor\t: 0
Features\t: fp asimd sve bf16
CPU implementer\t: 0x41
"""


@pytest.mark.parametrize(
    ("text", "model", "sets"),
    [
        (XEON, "Intel(R) Xeon(R) Processor", ["sse4_2", "avx", "avx2", "avx512f", "amx_tile"]),
        (GRAVITON, None, ["asimd", "bf16", "sve"]),
        ("", None, []),
    ],
)
def test_models_and_instruction_sets_are_read(text: str, model: str | None, sets: list[str]) -> None:
    assert parse_cpuinfo(text) == (model, sets)


def test_this_machine_is_said_with_what_limits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_facts.cache_clear()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    facts = machine_facts()
    machine_facts.cache_clear()
    assert facts["processor"]
    assert facts["versions"].keys() >= {"python", "torch", "numpy"}
    text = machine_text(facts)
    assert all(word in text for word in (facts["processor"], platform.python_version(), "ATEN_CPU_CAPABILITY=avx2"))


def test_a_system_without_such_a_file_says_what_it_knows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine_facts.cache_clear()
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "missing")
    monkeypatch.setattr(platform, "processor", lambda: "")
    facts = machine_facts()
    machine_facts.cache_clear()
    assert (facts["processor"], facts["instruction_sets"]) == (platform.machine(), [])
    assert "instruction sets unknown" in machine_text(facts)


def test_machines_are_named_once() -> None:
    assert distinct([{"a": 1}, {"a": 2}, {"a": 1}]) == [{"a": 1}, {"a": 2}]
