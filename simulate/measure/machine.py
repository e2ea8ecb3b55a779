"""Measure this machine as a profile: kernels, memory bandwidth, peaks, disk.

A plan's times are as good as its profile's rates, so measured rates replace guesses. `lte profile measure` calls
`measure_profile`; simulate.measure.kernels measures the kernels.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from simulate.common.errors import InputError
from simulate.config.calibration import keep
from simulate.config.hardware import BETWEEN_CPUS, Device, FlopPerSecond, Kernels, Link, Measurement, Profile
from simulate.config.profiles import BETWEEN_GPUS, detect_local, local_gpu_profile
from simulate.layers.accelerator import choose
from simulate.measure.kernels import CALIBRATION, FULL, QUICK, Log, Sizes, measure_kernels
from simulate.measure.timer import Stopwatch
from simulate.training.checkpoints import write_part

COPY_BYTES = 2**27
PEAK_SIZE, PROBE_SIZE = 1024, 128
FORMATS = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
DISK_BYTES, SHORT_DISK_BYTES, DISK_REPEATS = 2**26, 2**23, 5
QUICK_S, FULL_S, SHORT_S = 0.15, 0.8, 0.06
"""Seconds for the repetitions of one program."""
CALIBRATION_S = 8.0
"""Time after which a calibration times nothing any more; with what is under way then it takes at most about 10 s."""


@dataclass(frozen=True)
class MeasurementScope:
    """Options of a measurement."""

    quick: bool = False
    """Whether to measure fewer sizes, each for a shorter time."""
    devices: int = 1
    """Number of devices, alike, in the profile."""
    threads: int | None = None
    """Threads of the processor; None: torch's default."""
    device: str = "auto"
    """auto, cpu or a kind of accelerator."""
    short: bool = False
    """Whether to stop after CALIBRATION_S, with few repetitions of each program."""


def measure_profile(scope: MeasurementScope, link: Link, log: Log, sizes: Sizes | None = None) -> Profile:
    """Measure this machine and return its profile; `link` is taken over, since one machine cannot measure it."""
    started = time.monotonic()
    threads = torch.get_num_threads()
    if scope.threads:
        torch.set_num_threads(scope.threads)
    try:
        chosen = choose(scope.device)
        budget_s = SHORT_S if scope.short else QUICK_S if scope.quick else FULL_S
        watch = Stopwatch(chosen, budget_s, started + CALIBRATION_S if scope.short else None)
        log("disk")
        disk = measure_disk(SHORT_DISK_BYTES if scope.short else DISK_BYTES)
        log("memory bandwidth and peaks")
        memory_bytes_per_s = _copy_bytes_per_s(watch, COPY_BYTES)
        peaks = _peaks(watch)
        kernels = measure_kernels(watch, sizes or (QUICK if scope.quick else FULL), log)
        measurement = _measurement(watch, scope, started, disk)
    finally:
        torch.set_num_threads(threads)
    device = _device(scope, chosen.type != "cpu", memory_bytes_per_s, peaks, kernels, disk)
    sources = {**link.sources, "collectives": BETWEEN_CPUS if chosen.type == "cpu" else BETWEEN_GPUS}
    link = link.model_copy(update={"collectives": "gloo" if chosen.type == "cpu" else "nccl", "sources": sources})
    return Profile(
        name="measured", description=f"{device.kind}, measured {measurement.date[:10]}", device=[device], link=link,
        measurement=measurement,
    )  # fmt: skip


def calibrate(log: Log) -> str:
    """Measure this machine's processor in a few seconds and keep its rates for plans on `local`.

    Returns a line about what prevented that, else "".
    """
    scope = MeasurementScope(quick=True, device="cpu", short=True)
    try:
        profile = measure_profile(scope, detect_local().link, log, CALIBRATION)
    except InputError as error:  # the current folder is read-only
        return str(error)
    except TimeoutError:
        return "this machine is too busy to be measured within 10 s, so times on `local` stay guesses"
    assert profile.measurement is not None
    return keep(profile.device[0], profile.measurement)


def _device(
    scope: MeasurementScope, on_gpu: bool, memory_bytes_per_s: float, peaks: dict[str, float], kernels: Kernels,
    disk: Disk,
) -> Device:  # fmt: skip
    detected = (local_gpu_profile() if on_gpu else None) or detect_local()
    own = detected.device[0]
    fastest = max(rate for _, rate in (*kernels.products, *kernels.attention, *(kernels.full_attention or ())))
    peaks = {**peaks, "fp32": max(peaks["fp32"], fastest)}  # no kernel may be above the peak
    # The median product stands for all, where a plan has no rates of single kernels.
    middle = sorted(rate for _, rate in kernels.products)[len(kernels.products) // 2]
    own_sources = {key: own.sources[key] for key in ("memory_bytes", "reserved_bytes", "host_memory_bytes")}
    return own.model_copy(
        update={
            "count": scope.devices, "kind": own.kind.replace("this machine's ", "").replace("this ", ""),
            "memory_bytes_per_s": memory_bytes_per_s, "flop_per_s": FlopPerSecond(**peaks),
            "efficiency": min(1.0, middle / peaks["fp32"]), "kernels": kernels, "source": "measured",
            "disk_write_bytes_per_s": disk.write_bytes_per_s, "disk_flush_s": disk.flush_s,
            "sources": {
                "count": "as requested, all equal",
                **own_sources,
                "memory_bytes_per_s": f"measured: a copy of {COPY_BYTES // 2**20} MiB, read and written",
                "flop_per_s": f"measured: products of {PEAK_SIZE} x {PEAK_SIZE} matrices, the fastest product of all",
                "efficiency": "measured: the median product's share; kernels' own rates take its place",
                "disk_write_bytes_per_s": f"measured: {DISK_BYTES // 2**20} MiB, written as checkpoints are",
                "disk_flush_s": "measured: the same with hardly a byte",
                "kernels": "measured: see measurement.median_s and p90_s",
            },
        }
    )  # fmt: skip


def _copy_bytes_per_s(watch: Stopwatch, num_bytes: int) -> float:
    source = torch.zeros(num_bytes // 4, device=watch.device)
    target = torch.empty_like(source)
    # A copy reads and writes each byte.
    return 2 * num_bytes / watch.seconds(f"copy of {num_bytes} bytes", lambda: target.copy_(source), most=10)


def _peaks(watch: Stopwatch) -> dict[str, float]:
    """Return FLOP/s of products by format; half precision only where it is faster than fp32."""
    rates = {name: _product_flop_per_s(watch, name, PEAK_SIZE) for name in ("fp32", "fp64")}
    for name in ("bf16", "fp16"):
        # Emulated formats can be a thousand times slower, so a small product decides whether to time a large one.
        if _multiplies(watch.device, name) and _probe_s(watch.device, name) < 2 * _probe_s(watch.device, "fp32"):
            rates[name] = _product_flop_per_s(watch, name, PEAK_SIZE)
    return {name: rate for name, rate in rates.items() if name in ("fp32", "fp64") or rate > rates["fp32"]}


def _product_flop_per_s(watch: Stopwatch, name: str, size: int) -> float:
    x = torch.randn(size, size, device=watch.device).to(FORMATS[name])
    return 2.0 * size**3 / watch.seconds(f"product of {size} x {size} in {name}", lambda: x @ x, least=3, most=10)


def _probe_s(device: torch.device, name: str) -> float:
    return Stopwatch(device, 0.0).seconds(name, _probe(device, name), least=3)


def _multiplies(device: torch.device, name: str) -> bool:
    try:
        _probe(device, name)()
    except RuntimeError:  # torch has no such kernel for this device
        return False
    return True


def _probe(device: torch.device, name: str) -> Callable[[], object]:
    x = torch.randn(PROBE_SIZE, PROBE_SIZE, device=device).to(FORMATS[name])
    return lambda: x @ x


def _measurement(watch: Stopwatch, scope: MeasurementScope, started: float, disk: Disk) -> Measurement:
    return Measurement(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        host=f"{platform.system()} {platform.machine()}",
        torch=torch.__version__,
        device=watch.device.type,
        threads=torch.get_num_threads(),
        quick=scope.quick,
        clock=watch.clock,
        disk_write_bytes_per_s=disk.write_bytes_per_s,
        seconds=time.monotonic() - started,
        median_s=watch.median_s,
        p90_s=watch.p90_s,
    )


@dataclass(frozen=True)
class Disk:
    """Speed of writing parts of checkpoints to the disk."""

    write_bytes_per_s: float
    flush_s: float
    """Seconds for a part with one byte."""


def measure_disk(num_bytes: int) -> Disk:
    """Time the writing of parts of checkpoints into the current folder; raises InputError where that is refused."""
    try:
        with tempfile.TemporaryDirectory(dir=".", prefix=".lte-disk-") as folder:
            flush_s, whole_s = (_part_s(Path(folder), size) for size in (1, num_bytes))
    except OSError as error:
        where = f"the disk of {Path.cwd()} cannot be measured ({error.strerror})"
        raise InputError(f"{where}; run this in a folder where runs can be saved") from None
    # Noise must not make the flush longer than the whole.
    return Disk(num_bytes / max(whole_s - flush_s, whole_s / 2), flush_s)


def _part_s(folder: Path, num_bytes: int) -> float:
    # Random bytes, since some file systems compress.
    tensors = {"noise": torch.frombuffer(bytearray(os.urandom(num_bytes)), dtype=torch.uint8)}
    seconds = []
    for _ in range(DISK_REPEATS):
        started = time.perf_counter()
        write_part(folder, "noise", tensors, {})
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
