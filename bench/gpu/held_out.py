"""Part d: this machine measured as `lte profile measure` does it, and steps that the measurement did not use.

The profile lies in the scratch folder, `measured.toml`, and can be planned with: lte plan --profile PATH.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from simulate.common import toml_io
from simulate.common.errors import RunFailedError
from simulate.config.profiles import detect_local, load_profile
from simulate.measure.kernels import FULL, Sizes
from simulate.measure.machine import MeasurementScope, measure_profile
from simulate.measure.step_times import CASES, LTE, Case, held_out_times

Table = dict[str, Any]
PROFILE = "measured.toml"
GPT = {"name": "gpt", "context": 256, "vocab": 256}
IMAGES = {"image": 64, "patch": 8, "colours": 3, "classes": 100}


def _gpt(layers: int, width: int, heads: int) -> Table:
    return {**GPT, "layers": layers, "width": width, "attention_heads": heads}


LARGE: tuple[Case, ...] = (
    Case("gpt 6 x 512, batch 16, ddp", _gpt(6, 512, 8), {"name": "ddp"}, 16),
    Case("gpt 6 x 512, batch 16, lte rank 32", _gpt(6, 512, 8), {**LTE, "rank": 32}, 16),
    Case("gpt 12 x 768, batch 8, ddp", _gpt(12, 768, 12), {"name": "ddp"}, 8),
    Case("gpt 3 x 1024, batch 8, lte reset-less", _gpt(3, 1024, 16), {**LTE, "rank": 64, "reset": "none"}, 8),
    Case(
        "vit 8 x 384, batch 32, ddp", {"name": "vit", "layers": 8, "width": 384, "attention_heads": 6, **IMAGES},
        {"name": "ddp"}, 32,
    ),
    Case(
        "vit 8 x 384, batch 32, lte rank 32",
        {"name": "vit", "layers": 8, "width": 384, "attention_heads": 6, **IMAGES}, {**LTE, "rank": 32}, 32,
    ),
    Case(
        "llama 6 x 640, batch 8, ddp",
        {
            "name": "llama", "layers": 6, "width": 640, "attention_heads": 10, "mlp_width": 1792, "context": 192,
            "vocab": 256,
        },
        {"name": "ddp"}, 8,
    ),
    Case(
        "mixer 8 x 448, batch 32, lte",
        {
            "name": "mixer_s16", "layers": 8, "width": 448, "tokens_width": 224, "channels_width": 1600, **IMAGES,
        },
        {**LTE, "rank": 16}, 32,
    ),
)  # fmt: skip
"""Networks that keep a GPU busy. simulate.measure.step_times has smaller ones, for a CPU."""
TINY = Sizes([(64, 32, 32), (64, 32, 4)], [(16, 16)], [2**12], [(2, 32, 2)], [(2, 32, 2)], [64])


def measure(given: Table, device: torch.device, folder: Path) -> Table:
    """Return what the measurement took and found, or one held-out step."""
    path, is_full = folder / PROFILE, given["size"] == "full"
    if given["case"] is None:
        return _measure_profile(path, device, FULL if is_full else TINY, is_full)
    if not path.exists():
        raise RunFailedError(f"there is no {path.name}: the row before this one measures it")
    case = (LARGE if is_full else CASES)[given["case"]]
    [(name, planned_s, taken_s)] = held_out_times(load_profile(str(path)), cases=[case])
    return {"case": name, "planned_s": planned_s, "taken_s": taken_s, "error": planned_s / taken_s - 1}


def _measure_profile(path: Path, device: torch.device, sizes: Sizes, is_full: bool) -> Table:
    scope = MeasurementScope(quick=not is_full, device=device.type)
    profile = measure_profile(scope, detect_local().link, lambda what: None, sizes)
    path.write_text(toml_io.dump(profile.model_dump(exclude_none=True)), encoding="utf-8")
    measured = profile.device[0]
    peaks = measured.flop_per_s
    rates = {"fp32": peaks.fp32, "bf16": peaks.bf16, "fp16": peaks.fp16}
    peak = ", ".join(f"{name} {rate / 1e12:.1f} TFLOP/s" for name, rate in rates.items() if rate)
    return {"case": f"{peak}; memory {measured.memory_bytes_per_s / 1e9:.0f} GB/s"}
