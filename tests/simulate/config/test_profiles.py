"""The `local` profile on a GPU. No GPU is needed here: torch's answers are put in its place."""

from __future__ import annotations

import pytest

from simulate.config.profiles import local_gpu_profile
from tests.gpus import CURRENT, DeviceModule, Properties, no_gpu, stand_in


def test_a_machine_without_a_gpu_has_no_gpu_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch)
    assert local_gpu_profile() is None
    stand_in(monkeypatch, DeviceModule(compiled=CURRENT))  # one that this torch has no kernels for
    assert local_gpu_profile() is None


def test_memory_is_what_torch_says_and_the_rate_is_cores_times_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    profile = local_gpu_profile()
    assert profile is not None
    device = profile.device[0]
    assert (device.memory_bytes, device.reserved_bytes) == (11_700_000_000, 700_000_000)
    assert device.flop_per_s.fp32 == pytest.approx(28 * 128 * 1.582e9 * 2)  # 11.3 TFLOP/s, as its datasheet says
    assert device.flop_per_s.fp16 == device.flop_per_s.fp32  # no tensor cores
    assert device.flop_per_s.bf16 is None
    assert device.source == "guess"


def test_a_gpu_whose_cores_torch_does_not_tell_gets_a_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    arc = Properties("Intel Arc B580", multi_processor_count=None)  # type: ignore[arg-type]
    stand_in(monkeypatch, DeviceModule(properties=arc, bf16=True), "xpu")
    profile = local_gpu_profile()
    assert profile is not None
    assert profile.device[0].sources["flop_per_s"].startswith("guess")
    assert profile.device[0].flop_per_s.bf16 == profile.device[0].flop_per_s.fp16
