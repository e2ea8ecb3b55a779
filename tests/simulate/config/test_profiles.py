"""The `local` profile on a GPU. No GPU is needed here: torch's answers are put in its place."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from simulate.config.profiles import local_gpu_profile


def test_a_machine_without_a_gpu_has_no_gpu_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert local_gpu_profile() is None


def test_memory_is_what_torch_says_and_the_rate_is_cores_times_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="GTX 1080 Ti", multi_processor_count=28, major=6, minor=1, clock_rate=1_582_000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (11_000_000_000, 11_700_000_000))
    profile = local_gpu_profile()
    assert profile is not None
    device = profile.device[0]
    assert (device.memory_bytes, device.reserved_bytes) == (11_700_000_000, 700_000_000)
    assert device.flop_per_s.fp32 == pytest.approx(28 * 128 * 1.582e9 * 2)  # 11.3 TFLOP/s, as its datasheet says
    assert device.source == "guess"
