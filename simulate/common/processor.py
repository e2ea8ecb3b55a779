"""The processor that computes, its instruction sets, and the versions of libraries: without importing any of them.

Libraries choose their kernels by what the processor has, so that the last bits of a result, and mistakes, can depend on
it; a report names both.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")
INSTRUCTION_SETS = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "amx_fp16",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
"""Those that kernels are chosen by, of x86 and then of Arm, by Linux's names."""
MULTIPLIES = {
    "bf16": frozenset({"avx512_bf16", "amx_bf16", "bf16"}),
    "fp16": frozenset({"avx512_fp16", "amx_fp16", "asimdhp"}),
}
"""Instruction sets with products in a format; other processors compute them by way of fp32, many times slower."""
PACKAGES = ("torch", "numpy", "bitsandbytes")
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "OMP_NUM_THREADS")
"""Variables with which libraries choose other kernels."""


@cache
def machine_facts() -> dict[str, Any]:
    """Return this machine's processor, instruction sets, versions and limits, as JSON has them."""
    processor, sets = parse_cpuinfo(CPUINFO.read_text(encoding="utf-8") if CPUINFO.is_file() else "")
    return {
        "processor": processor or platform.processor() or platform.machine(),
        "instruction_sets": sets,
        "versions": {"python": platform.python_version(), **dict(_versions())},
        "limits": {name: os.environ[name] for name in LIMITS if name in os.environ},
    }


def multiplied_formats() -> frozenset[str]:
    """Return which of bf16 and fp16 this processor multiplies itself."""
    sets = machine_facts()["instruction_sets"]
    return frozenset(name for name, having in MULTIPLIES.items() if having.intersection(sets))


def parse_cpuinfo(text: str) -> tuple[str | None, list[str]]:
    """Return the model and the instruction sets that the first processor of /proc/cpuinfo has; None where unnamed."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        # The first core's; on chips of unequal cores the others may differ.
        fields.setdefault(key.strip(), value.strip())
    had = set(fields.get("flags", fields.get("Features", "")).split())
    return fields.get("model name") or None, [name for name in INSTRUCTION_SETS if name in had]


def _versions() -> Iterable[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def machine_text(facts: Mapping[str, Any]) -> str:
    """Return facts of a machine as one line."""
    sets = " ".join(facts["instruction_sets"]) or "instruction sets unknown"
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    limits = "".join(f", {name}={value}" for name, value in facts["limits"].items())
    return f"{facts['processor']} ({sets}), {versions}{limits}"


def distinct(machines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each of several machines once, in order."""
    known: list[dict[str, Any]] = []
    for machine in machines:
        if machine not in known:
            known.append(machine)
    return known
