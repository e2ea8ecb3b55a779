"""Find a hardware profile: a shipped one by name, a TOML file by path, or `local`, which describes this machine.

A plan of this machine needs figures that nobody has measured yet; the `local` profile takes them from psutil, or from
torch where training has imported it anyway, and marks them as guesses, until simulate.config.calibration has measured
ones. `lte plan`, `lte train` and the measurements
call load_profile; training on a GPU calls local_gpu_profile.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import profiles
from simulate.common import toml_io
from simulate.common.errors import InputError, near_match
from simulate.common.limits import usable_cores, usable_memory
from simulate.common.processor import multiplied_formats
from simulate.config.calibration import calibrated
from simulate.config.hardware import BETWEEN_CPUS, LOCAL, Device, FlopPerSecond, Link, Profile

EMBEDDED = "profile"
"""Table of run.toml that has a profile, so that one file is a whole run."""
EXAMPLE = "rtx3060_x4_home"
"""Shipped profile whose values are examples."""
CORES_PER_MULTIPROCESSOR = {(6, 0): 64, (7, 0): 64, (7, 2): 64, (7, 5): 64, (8, 0): 64, None: 64}
"""fp32 cores by compute capability (NVIDIA, CUDA C++ programming guide, arithmetic throughput); 128 in all others.
AMD's GPUs have none, and 64 cores in a compute unit."""
TENSOR_CORE_GAIN = 4
"""Guess: rate of half precision over fp32 with tensor cores; 2 on GeForce cards, up to 16 on data centre cards."""
GUESSED_CLOCK_KHZ = 1_500_000
GUESSED_MEMORY_BYTES_PER_S = 250e9
GUESSED_FP32_FLOP_PER_S = 10e12
"""Where torch tells neither cores nor clock."""
BETWEEN_GPUS = "what launched runs use between GPUs"
CPU_BF16_GAIN = 2
"""Guess: rate of bf16 over fp32 on a CPU that has such instructions."""


def is_profile_path(name: str) -> bool:
    """Whether a profile's name is the path to a TOML file."""
    return name.endswith(".toml") or "/" in name or Path(name).is_absolute()


def load_profile(name: str) -> Profile:
    """Load a profile by shipped name, `local` (detected now), or path to a TOML file; raises InputError.

    The file may be a run.toml that embeds its profile.
    """
    if name == LOCAL:
        guess = detect_local()
        return guess.model_copy(update={"device": [calibrated(device) for device in guess.device]})
    shipped = profiles.names()
    if name in shipped:
        profile = _shipped(name)
        return profile.model_copy(update={"device": list(profile.device)})
    if not is_profile_path(name):
        raise InputError(
            f"profile = {name!r} is neither a shipped profile nor a path to a .toml file; "
            f"{near_match(name, [*shipped, LOCAL])}"
        )
    text = toml_io.read(Path(name))
    table = toml_io.parse(text, name)
    if isinstance(table.get(EMBEDDED), dict):
        table, text = table[EMBEDDED], _embedded_text(text)
    if not table.get("name"):  # run folders and run.toml call it by its name
        table["name"] = Path(name).stem
    return toml_io.validate(Profile, table, name, text, example=_example)


@lru_cache(maxsize=64)
def _shipped(name: str) -> Profile:
    """Return a shipped profile: one object, whose devices are the keys of cached costs in every later plan."""
    text, where = profiles.read_text(name), f"profiles/{name}.toml"
    return toml_io.validate(Profile, toml_io.parse(text, where), where, text)


def _embedded_text(text: str) -> str:
    """Return the text of run.toml as if its profile had a file of its own, on the same lines, which errors name."""
    header = re.compile(rf"(\s*\[\[?\s*){EMBEDDED}(\.|(?=\s*\]))")
    lines, inside = [], False
    for line in text.splitlines():
        if line.lstrip().startswith("["):
            inside = header.match(line) is not None
        own = header.sub(r"\1", line, count=1) if inside else ""
        lines.append("" if own.strip() == "[]" else own)
    return "\n".join(lines)


def profile_to_embed(profile: Profile) -> Profile | None:
    """Return the profile, if run.toml must have it whole; None for a shipped one, which every machine has."""
    is_shipped = profile.name in profiles.names() and profile == load_profile(profile.name)
    return None if is_shipped else profile


def _example() -> toml_io.Table:
    """Return a shipped profile, for values of keys that are missing in another."""
    return toml_io.parse(profiles.read_text(EXAMPLE), EXAMPLE)


def detect_local() -> Profile:
    """Return this machine as four virtual devices, from psutil and a container's limits; rates are guesses."""
    import psutil

    cores = min(psutil.cpu_count(logical=False) or psutil.cpu_count() or 1, usable_cores())
    frequency = psutil.cpu_freq()
    clock_hz, clock_source = (frequency.max or frequency.current) * 1e6 if frequency else 0.0, "psutil"
    if not clock_hz:
        clock_hz, clock_source = 2e9, "guess: the system does not report the clock"
    memory_bytes, free_bytes = usable_memory()
    gain = CPU_BF16_GAIN if "bf16" in multiplied_formats() else None
    fp32 = cores * clock_hz * 32  # AVX2: two fused multiply-adds of 8 floats a cycle, 2 operations each
    device = Device(
        count=4,
        kind=f"this machine ({cores} cores)",
        memory_bytes=memory_bytes,
        # At least a byte must be left, or the profile would not validate on a machine that is full.
        reserved_bytes=min(memory_bytes - free_bytes, memory_bytes - 1),
        host_memory_bytes=0,
        memory_bytes_per_s=20e9,
        flop_per_s=FlopPerSecond(fp32=fp32, fp64=fp32 / 2, bf16=fp32 * gain if gain else None),
        efficiency=0.3,
        disk_write_bytes_per_s=200e6,
        disk_flush_s=0.02,
        source="guess",
        sources={
            "count": "virtual devices, each as strong as this whole machine",
            "memory_bytes": "psutil: total memory, or a container's limit",
            "reserved_bytes": "psutil: memory in use now",
            "host_memory_bytes": "a CPU device has one memory",
            "memory_bytes_per_s": "guess: dual-channel DDR4",
            "flop_per_s": f"{cores} cores (psutil) x {clock_hz / 1e9:.2f} GHz ({clock_source}) x 32 a cycle (AVX2)"
            + ("; bf16 guessed" if gain else ""),
            "efficiency": "guess: small matrices",
            "disk_write_bytes_per_s": "guess: a SATA SSD",
            "disk_flush_s": "guess: a SATA SSD",
        },
    )
    link = Link(
        topology="star",
        up_bytes_per_s=117.5e6,
        down_bytes_per_s=117.5e6,
        latency_s=0.2e-3,
        collectives="gloo",
        source="guess",
        sources={
            **dict.fromkeys(("topology", "up_bytes_per_s", "down_bytes_per_s", "latency_s"), "guess: gigabit LAN"),
            "collectives": BETWEEN_CPUS,
        },
    )
    return Profile(name=LOCAL, description="This machine, as four virtual devices", device=[device], link=link)


def local_gpu_profile() -> Profile | None:
    """Return this machine's first GPU as virtual devices; None where torch sees none; rates are guesses."""
    import torch  # here, since plans load this module and must not import torch

    from simulate.layers import accelerator

    kind = accelerator.current()
    if kind is None or accelerator.refusal(first := torch.device(kind, 0)):
        return None
    card = accelerator.describe(first)
    free_bytes, total_bytes = accelerator.memory_bytes(first)
    cpu = detect_local()
    if card.multiprocessors is None:
        fp32, fp32_source = GUESSED_FP32_FLOP_PER_S, "guess: a mid-range card"
    else:
        cores = card.multiprocessors * CORES_PER_MULTIPROCESSOR.get(card.capability, 128)
        fp32 = 2.0 * cores * (card.clock_khz or GUESSED_CLOCK_KHZ) * 1e3
        clock_source = "torch" if card.clock_khz else "guess"
        fp32_source = f"{cores} fp32 cores (torch) x clock ({clock_source}) x 2; half precision guessed"
    half = fp32 * (1 if card.capability and card.capability < (7, 0) else TENSOR_CORE_GAIN)
    device = Device(
        count=cpu.count,
        device_type="cuda" if kind == "cuda" else None,  # XPU and MPS have caching allocators, too
        kind=f"this machine's {card.name}",
        memory_bytes=total_bytes,
        reserved_bytes=total_bytes - free_bytes,
        host_memory_bytes=cpu.device[0].memory_bytes,
        memory_bytes_per_s=GUESSED_MEMORY_BYTES_PER_S,
        flop_per_s=FlopPerSecond(fp32=fp32, fp16=half, bf16=half if accelerator.has_bf16(first) else None),
        efficiency=0.4,
        disk_write_bytes_per_s=cpu.device[0].disk_write_bytes_per_s,
        disk_flush_s=cpu.device[0].disk_flush_s,
        source="guess",
        sources={
            "memory_bytes": "torch: total memory",
            "reserved_bytes": "torch: memory in use now",
            "host_memory_bytes": "psutil: total memory",
            "memory_bytes_per_s": "guess: a mid-range card",
            "flop_per_s": fp32_source,
            "efficiency": "guess: matrices of medium size",
            **{key: cpu.device[0].sources[key] for key in ("disk_write_bytes_per_s", "disk_flush_s")},
        },
    )
    # The link is a guess about the network, which torch knows nothing of.
    link = cpu.link.model_copy(
        update={"collectives": "nccl", "sources": {**cpu.link.sources, "collectives": BETWEEN_GPUS}}
    )
    return Profile(name=LOCAL, description="This machine's GPU, as virtual devices", device=[device], link=link)
