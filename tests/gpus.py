"""Stand-ins for GPUs: what torch answers about them, put in the place where simulate.layers.accelerator asks.

They answer questions and compute nothing. Whole runs on a device that is no CPU are in tests/fakegpu.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch

from simulate.layers import accelerator

LEGACY, CURRENT = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"], ["sm_75", "sm_80", "sm_90", "sm_120"]
"""What torch's CUDA 12.6 and 13.0 builds are compiled for."""


@dataclass(frozen=True)
class Properties:
    """What torch tells about a GTX 1080 Ti, unless another is given."""

    name: str = "NVIDIA GeForce GTX 1080 Ti"
    major: int = 6
    minor: int = 1
    multi_processor_count: int = 28
    clock_rate: int = 1_582_000
    total_memory: int = 11_700_000_000


@dataclass
class DeviceModule:
    """Answers as torch.cuda does; keeps what it was told to do."""

    properties: Properties = field(default_factory=Properties)
    gpus: int = 1
    compiled: Sequence[str] = tuple(LEGACY)
    bf16: bool = False
    calls: list[tuple[str, object]] = field(default_factory=list)

    def device_count(self) -> int:
        return self.gpus

    def get_device_properties(self, index: int) -> Properties:
        return self.properties

    def get_arch_list(self) -> list[str]:
        return list(self.compiled)

    def is_bf16_supported(self, including_emulation: bool) -> bool:
        assert not including_emulation
        return self.bf16

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return self.properties.total_memory - 700_000_000, self.properties.total_memory

    def set_device(self, index: int) -> None:
        self.calls.append(("set_device", index))

    def synchronize(self, device: torch.device) -> None:
        self.calls.append(("synchronize", device))


def stand_in(
    monkeypatch: pytest.MonkeyPatch, module: DeviceModule | None = None, kind: str = "cuda", fp64: bool = True
) -> DeviceModule:
    """Make torch see GPUs of a kind that answer as `module`."""
    module = module or DeviceModule()
    monkeypatch.setattr(accelerator, "_api", lambda asked: {kind: module}[asked])
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: module.gpus > 0)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(accelerator, "has_fp64", lambda device: fp64)
    return module


def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch see none."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
