"""Planned and measured seconds of steps, for networks that the measurement of a profile did not use.

Each is the real step of one device's program, whose peers answer at once, so that exchanges take no time. The errors
show how far a measured profile can be trusted: `lte validate` and bench/studies/step_time.py print them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from simulate.common.errors import InputError
from simulate.config.hardware import Profile
from simulate.config.run import Run
from simulate.costs.step_time import device_step_s
from simulate.layers.accelerator import refusal
from simulate.measure.kernels import packed_formats, step_s, timed_run
from simulate.measure.timer import Stopwatch

LEAST_STEPS = 7
DEVICES = 2
LTE = {"name": "lte", "rank": 8}
IMAGES = {"image": 32, "patch": 4, "colours": 3, "classes": 10}
BUDGET_S = 0.5
"""Seconds for the steps of one case."""


@dataclass(frozen=True)
class Case:
    """A network, a method and a batch."""

    name: str
    model: dict[str, Any]
    method: dict[str, Any]
    samples: int

    def run(self) -> Run:
        """Return the case as a run."""
        return timed_run(self.model, self.method, self.samples, DEVICES)


def _gpt(layers: int, width: int, context: int) -> dict[str, Any]:
    return {"name": "gpt", "layers": layers, "width": width, "attention_heads": 4, "context": context, "vocab": 256}


def _vit(layers: int, width: int) -> dict[str, Any]:
    return {"name": "vit", "layers": layers, "width": width, "attention_heads": 3, **IMAGES}


def _llama(layers: int, width: int) -> dict[str, Any]:
    sizes = {"layers": layers, "width": width, "attention_heads": 4, "mlp_width": 256, "context": 96, "vocab": 256}
    return {"name": "llama", **sizes}


def _mixer(layers: int, width: int) -> dict[str, Any]:
    return {"name": "mixer_s16", "layers": layers, "width": width, "tokens_width": 48, "channels_width": 320, **IMAGES}


QUICK_CASES: tuple[Case, ...] = (
    Case("gpt 3 x 80, batch 6, ddp", _gpt(3, 80, 96), {"name": "ddp"}, 6),
    Case("gpt 3 x 80, batch 6, lte reset b", _gpt(3, 80, 96), {**LTE, "reset": "b", "frozen_a": False}, 6),
    Case("vit 4 x 144, batch 5, ddp", _vit(4, 144), {"name": "ddp"}, 5),
    Case("vit 4 x 144, batch 5, lte reset-less", _vit(4, 144), {**LTE, "reset": "none"}, 5),
)
CASES: tuple[Case, ...] = (
    *QUICK_CASES,
    Case("gpt 4 x 48, batch 2, ddp", _gpt(4, 48, 128), {"name": "ddp"}, 2),
    Case("gpt 4 x 48, batch 2, lte reset-less", _gpt(4, 48, 128), {**LTE, "reset": "none"}, 2),
    Case("gpt 3 x 192, batch 12, ddp", _gpt(3, 192, 96), {"name": "ddp"}, 12),
    Case(
        "gpt 3 x 192, batch 12, lte rank 24 reset b",
        _gpt(3, 192, 96),
        {**LTE, "rank": 24, "reset": "b", "frozen_a": False},
        12,
    ),
    Case("gpt 1 x 320, batch 3, ddp", _gpt(1, 320, 160), {"name": "ddp"}, 3),
    Case("vit 6 x 192, batch 9, ddp", _vit(6, 192), {"name": "ddp"}, 9),
    Case(
        "vit 6 x 192, batch 9, lte rank 16 reset b",
        _vit(6, 192),
        {**LTE, "rank": 16, "reset": "b", "frozen_a": False},
        9,
    ),
    Case("vit 2 x 288, batch 3, lte reset-less", _vit(2, 288), {**LTE, "reset": "none"}, 3),
    Case("llama 3 x 96, batch 7, ddp", _llama(3, 96), {"name": "ddp"}, 7),
    Case("llama 3 x 96, batch 7, lte", _llama(3, 96), LTE, 7),
    Case("mixer 4 x 112, batch 6, ddp", _mixer(4, 112), {"name": "ddp"}, 6),
    Case("mixer 4 x 112, batch 6, lte", _mixer(4, 112), LTE, 6),
)


def quantized_cases() -> tuple[Case, ...]:
    """Return one case with frozen weights in fp32, and one for each format that can be unpacked here."""
    formats = ("none", *packed_formats())
    lte = {**LTE, "frozen_a": False, "reset": "b"}
    return tuple(
        Case(f"gpt 4 x 256, batch 4, lte {name}", _gpt(4, 256, 64), {**lte, "quantize": name}, 4) for name in formats
    )


def held_out_times(
    profile: Profile, quick: bool = False, cases: Sequence[Case] | None = None
) -> list[tuple[str, float, float]]:
    """Return name, planned and measured seconds of a step on this machine, taken as the profile's first device.

    It uses the number of threads of the profile's measurement, and the median of 7 steps or more after a warm-up.
    """
    watch = Stopwatch(_device(profile), BUDGET_S)
    threads = torch.get_num_threads()
    if profile.measurement is not None:
        torch.set_num_threads(profile.measurement.threads)
    chosen = cases if cases is not None else QUICK_CASES if quick else CASES
    # The profile's rates hold for its number of threads only; the caller's is restored.
    try:
        return [_compare(case, profile, watch) for case in chosen]
    finally:
        torch.set_num_threads(threads)


def _compare(case: Case, profile: Profile, watch: Stopwatch) -> tuple[str, float, float]:
    run = case.run()
    planned_s = device_step_s(run, run.shape(), profile.device[:1])[0]
    return case.name, planned_s, step_s(watch, run, LEAST_STEPS)


def _device(profile: Profile) -> torch.device:
    measured_on = "cpu" if profile.measurement is None else profile.measurement.device
    device = torch.device(measured_on)
    if measured_on != "cpu" and (reason := refusal(device)):
        raise InputError(
            f"profile {profile.name!r} was measured on a GPU, and {reason}; or measure this machine: "
            "lte profile measure -o mine.toml"
        )
    return device
