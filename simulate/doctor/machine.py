"""Facts of this machine that decide whether a run can start: torch, GPUs, driver, limits, disks and sockets.

`lte doctor` shows them, and simulate.doctor.checks judges them; nothing is judged here. `examine` asks torch through
simulate.layers.accelerator, and Linux by files of /proc, /sys and /dev below `root`, where tests put made-up ones.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from simulate.common.errors import first_line
from simulate.common.limits import Limits, UserLimits, control_group_limits, usable_cores, usable_memory, user_limits
from simulate.common.processor import multiplied_formats

LOOPBACK = "127.0.0.1"
NVIDIA_VENDOR, DISPLAY_CLASS = "0x10de", "0x03"
"""As the PCI bus numbers them; audio and USB parts of a card are of other classes."""
BF16_CAPABILITY = (8, 0)
QUERY = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
QUERY_S = 10.0
HIDING = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide all GPUs."""


@dataclass(frozen=True)
class Torch:
    """The installed build of torch."""

    version: str
    cuda_version: str | None
    """Version of CUDA, or of ROCm, that it was built for; None for CPUs alone."""
    architectures: tuple[str, ...]
    """Architectures that it has kernels for: sm_75, compute_90, gfx90a; nothing in a build for CPUs."""
    threads: int
    has_distributed: bool
    backends: tuple[str, ...]
    """Those of gloo, nccl and mpi that torch.distributed has."""


@dataclass(frozen=True)
class Gpu:
    """One accelerator that torch sees."""

    name: str
    capability: tuple[int, int] | None
    """Compute capability of a CUDA GPU."""
    architecture: str | None
    total_bytes: int | None
    has_kernels: bool
    has_bf16: bool


@dataclass(frozen=True)
class Nvidia:
    """NVIDIA cards and driver of the system, found without torch."""

    cards: int = 0
    """Cards on the PCI bus; a Jetson's GPU is on none."""
    driver: str | None = None
    """Version of the loaded kernel module."""
    has_device_files: bool = False
    """Whether processes can reach a GPU; a container gets the files only when asked to."""
    is_hidden: bool = False
    """Whether CUDA_VISIBLE_DEVICES hides all GPUs on purpose."""
    is_jetson: bool = False
    capability: tuple[int, int] | None = None
    """The first card's, from nvidia-smi; asked only where torch sees none."""


@dataclass(frozen=True)
class Folder:
    """A folder that runs write into."""

    option: str
    """Option or variable that names another one: --out, TMPDIR, LTE_CACHE."""
    path: Path
    is_writable: bool
    free_bytes: int


@dataclass(frozen=True)
class Machine:
    """All that the checks look at."""

    system: str = "Linux"
    processor: str = "x86_64"
    formats: frozenset[str] = frozenset({"bf16", "fp16"})
    """Lower formats that the processor multiplies itself."""
    torch: Torch | None = None
    torch_error: str = ""
    gpus: tuple[Gpu, ...] = ()
    nvidia: Nvidia = field(default_factory=Nvidia)
    cores: int = 1
    """Cores for threads, within all limits."""
    limits: Limits = field(default_factory=Limits)
    user_limits: UserLimits = field(default_factory=UserLimits)
    memory_bytes: int = 0
    memory_free_bytes: int = 0
    folders: tuple[Folder, ...] = ()
    shared_memory_bytes: int | None = None
    """Size of /dev/shm; None where there is none."""
    loopback_error: str = ""
    used_port: int | None = None
    """The asked port, where another program listens at it."""


def examine(folders: Mapping[str, Path], port: int | None = None, root: Path = Path("/")) -> Machine:
    """Look at this machine; `folders` are those that runs write into, by the option that names another one."""
    torch, torch_error = _torch()
    gpus = _gpus() if torch is not None else ()
    limits = control_group_limits(root)
    total, free = usable_memory()
    return Machine(
        system=platform.system(),
        processor=platform.machine(),
        formats=multiplied_formats(),
        torch=torch,
        torch_error=torch_error,
        gpus=gpus,
        nvidia=_nvidia(root, ask=not gpus),
        cores=usable_cores(),
        limits=limits,
        user_limits=user_limits(root),
        memory_bytes=total,
        memory_free_bytes=free,
        folders=tuple(_folder(option, path) for option, path in folders.items()),
        shared_memory_bytes=_total_bytes(root / "dev/shm"),
        loopback_error=_listening_error(LOOPBACK, 0),
        used_port=port if port is not None and _listening_error(LOOPBACK, port) else None,
    )


def _torch() -> tuple[Torch | None, str]:
    try:
        import torch
        import torch.distributed as dist

        from simulate.layers import accelerator
    except (ImportError, OSError) as error:  # a missing library of CUDA is an OSError
        return None, f"{type(error).__name__}: {first_line(error)}"
    backends: tuple[str, ...] = ()
    if dist.is_available():
        has = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available, "mpi": dist.is_mpi_available}
        backends = tuple(name for name, is_there in has.items() if is_there())
    return Torch(
        version=str(torch.__version__),
        cuda_version=torch.version.cuda or torch.version.hip,
        architectures=tuple(accelerator.compiled_architectures(accelerator.current() or "cuda")),
        threads=torch.get_num_threads(),
        has_distributed=dist.is_available(),
        backends=backends,
    ), ""


def _gpus() -> tuple[Gpu, ...]:
    import torch

    from simulate.layers import accelerator

    kind = accelerator.current()
    found = []
    for index in range(accelerator.count(kind) if kind else 0):
        device = torch.device(str(kind), index)
        card = accelerator.describe(device)
        has_kernels = accelerator.has_kernels(card, accelerator.compiled_architectures(device.type))
        # torch.cuda tells of the current GPU alone; from 8.0 on all have it.
        bf16 = accelerator.has_bf16(device) if card.capability is None else card.capability >= BF16_CAPABILITY
        found.append(Gpu(card.name, card.capability, card.architecture, card.total_bytes, has_kernels, bf16))
    return tuple(found)


def _nvidia(root: Path, ask: bool) -> Nvidia:
    """Return what /sys, /proc and /dev tell of NVIDIA's hardware; `ask` allows to start nvidia-smi."""
    places = list(root.glob("sys/bus/pci/devices/*"))
    cards = [p for p in places if _text(p / "vendor") == NVIDIA_VENDOR and _text(p / "class").startswith(DISPLAY_CLASS)]
    has_files = any((root / "dev" / name).exists() for name in ("nvidiactl", "nvgpu", "nvhost-gpu", "dxg"))
    # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 ..."
    loaded = re.search(r"Module\s+(?:for \S+\s+)?([\d.]+)", _text(root / "proc/driver/nvidia/version"))
    return Nvidia(
        cards=len(cards),
        driver=loaded.group(1) if loaded else _text(root / "sys/module/nvidia/version") or None,
        has_device_files=has_files,
        is_hidden=os.environ.get("CUDA_VISIBLE_DEVICES") in HIDING,
        is_jetson="Jetson" in _text(root / "proc/device-tree/model"),
        capability=_capability() if ask and has_files else None,
    )


def _capability() -> tuple[int, int] | None:
    """Return the first card's compute capability; None where nvidia-smi is missing or does not tell."""
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, timeout=QUERY_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    told = re.match(r"(\d+)\.(\d+)", done.stdout)
    return (int(told.group(1)), int(told.group(2))) if told else None


def _folder(option: str, path: Path) -> Folder:
    """Return the facts of a folder, or of the nearest one above it that exists."""
    path = path.absolute()
    there = next(p for p in (path, *path.parents) if p.is_dir())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(4096))  # a full disk takes names, and no content
            file.flush()
        is_writable = True
    except OSError:
        is_writable = False
    return Folder(option, there, is_writable, shutil.disk_usage(there).free)


def _total_bytes(folder: Path) -> int | None:
    return psutil.disk_usage(str(folder)).total if folder.is_dir() else None


def _listening_error(address: str, port: int) -> str:
    """Return why no program can listen at a port now, "" where one can."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as launches do
            listener.bind((address, port))
            listener.listen(1)
        except OSError as error:
            return error.strerror or str(error)
    return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""
