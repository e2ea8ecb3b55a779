"""The `local` profile on a machine with a CUDA GPU: asked of torch, and so only when training."""

from __future__ import annotations

from simulate.hardware import LOCAL, Device, FlopPerSecond, Profile, detect_local

CORES_PER_MULTIPROCESSOR = {(6, 0): 64, (7, 0): 64, (7, 2): 64, (7, 5): 64, (8, 0): 64}
"""fp32 cores by compute capability (NVIDIA, CUDA C++ programming guide, arithmetic throughput); 128 in all others."""
TENSOR_CORE_GAIN = 4
"""Guess: half precision over fp32 with tensor cores, between 2 on GeForce cards and 16 on data centre cards."""
GUESSED_CLOCK_KHZ = 1_500_000
GUESSED_MEMORY_BYTES_PER_S = 250e9
BETWEEN_GPUS = "what launched runs use between CUDA GPUs"


def local_gpu_profile() -> Profile | None:
    """Return this machine's first GPU as virtual devices; None where torch sees none. Rates are guesses and say so."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    free_bytes, total_bytes = torch.cuda.mem_get_info(0)
    clock_khz = getattr(properties, "clock_rate", None)
    clock_source = "torch" if clock_khz else "guess"
    cores = properties.multi_processor_count * CORES_PER_MULTIPROCESSOR.get((properties.major, properties.minor), 128)
    cpu = detect_local()
    fp32 = 2.0 * cores * (clock_khz or GUESSED_CLOCK_KHZ) * 1e3
    half = fp32 * (TENSOR_CORE_GAIN if properties.major >= 7 else 1)
    device = Device(
        count=cpu.count,
        kind=f"this machine's {properties.name}",
        memory_bytes=total_bytes,
        reserved_bytes=total_bytes - free_bytes,
        host_memory_bytes=cpu.device[0].memory_bytes,
        memory_bytes_per_s=GUESSED_MEMORY_BYTES_PER_S,
        flop_per_s=FlopPerSecond(fp32=fp32, fp16=half, bf16=half if properties.major >= 8 else None),
        efficiency=0.4,
        disk_write_bytes_per_s=cpu.device[0].disk_write_bytes_per_s,
        disk_flush_s=cpu.device[0].disk_flush_s,
        source="guess",
        sources={
            "memory_bytes": "torch: total memory",
            "reserved_bytes": "torch: memory in use now",
            "host_memory_bytes": "psutil: total memory",
            "memory_bytes_per_s": "guess: a mid-range card",
            "flop_per_s": f"{cores} fp32 cores (torch) x clock ({clock_source}) x 2; half precision guessed",
            "efficiency": "guess: matrices of medium size",
            **{key: cpu.device[0].sources[key] for key in ("disk_write_bytes_per_s", "disk_flush_s")},
        },
    )
    link = cpu.link.model_copy(
        update={"collectives": "nccl", "sources": {**cpu.link.sources, "collectives": BETWEEN_GPUS}}
    )
    return Profile(name=LOCAL, description="This machine's GPU, as virtual devices", device=[device], link=link)
