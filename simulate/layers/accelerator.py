"""Every question that is asked of torch about accelerators: which there are, what they can do, what they hold.

The rest of the program names a `torch.device` and asks here, so that a test can stand in for a GPU at one place: the
device module (`torch.cuda`, `torch.xpu`, `torch.mps`), which `_api` looks up, and `torch.accelerator`. The command line
chooses its device here, `simulate.launch.worker` its process's GPU, `simulate.comm.process_group` its streams, and
`simulate.measure` reads clocks and memory. `cuda` is also the name of AMD's GPUs in a ROCm build of torch.

`refusal` tells why a device cannot train, in one line. For a report on this machine, ask `current`, then for each
index below `count`: `describe`, `refusal` and `has_bf16`; `compiled_architectures` tells what this torch was built for.
Nothing here starts a CUDA context, but for what says so.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from simulate.common.errors import InputError

CPU_NAME, AUTO = "cpu", "auto"
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}
"""Backend that moves tensors between processes, by kind of device (torch.distributed's table of backends,
docs.pytorch.org/docs/stable/distributed.html): gloo sends and gathers no tensors of GPUs."""
INSTALL = "install the build of torch for it (pytorch.org/get-started/locally)"


@dataclass(frozen=True)
class Card:
    """One accelerator as torch describes it; None where torch does not tell."""

    kind: str
    """Type of its torch.device: cuda, xpu, mps."""
    name: str
    architecture: str | None
    """The code that it runs, as `compiled_architectures` names it: sm_61, gfx90a."""
    capability: tuple[int, int] | None
    """Compute capability of a CUDA GPU."""
    multiprocessors: int | None
    clock_khz: int | None
    total_bytes: int | None


def _api(kind: str) -> Any:
    """Return torch's module for a kind of device; tests put a stand-in here."""
    return torch.get_device_module(kind)


def current() -> str | None:
    """Return the kind of accelerator that torch sees here; None where it sees none."""
    if not torch.accelerator.is_available():
        return None
    found: torch.device | None = torch.accelerator.current_accelerator()
    return None if found is None else found.type


def count(kind: str) -> int:
    """Return how many accelerators of a kind torch sees here."""
    return int(_api(kind).device_count()) if current() == kind else 0


def describe(device: torch.device) -> Card:
    """Return what torch tells about an accelerator. Starts a context on it."""
    api, index = _api(device.type), device.index or 0
    properties: Any = api.get_device_properties(index) if hasattr(api, "get_device_properties") else None
    capability = architecture = None
    if device.type == "cuda":
        rocm = getattr(properties, "gcnArchName", None)  # "gfx90a:sramecc+:xnack-"
        if torch.version.hip and rocm:
            architecture = rocm.partition(":")[0]
        else:
            capability = (int(properties.major), int(properties.minor))
            architecture = f"sm_{capability[0]}{capability[1]}"
    return Card(
        kind=device.type,
        name=getattr(properties, "name", device.type),
        architecture=architecture,
        capability=capability,
        multiprocessors=getattr(properties, "multi_processor_count", None),
        clock_khz=getattr(properties, "clock_rate", None),  # older versions of torch do not have it
        total_bytes=getattr(properties, "total_memory", None),
    )


def compiled_architectures(kind: str = "cuda") -> list[str]:
    """Return what this torch has kernels for: sm_61 (code), compute_90 (to be compiled when loaded), gfx90a (AMD)."""
    return list(_api(kind).get_arch_list()) if hasattr(_api(kind), "get_arch_list") else []


def has_kernels(card: Card, compiled: list[str]) -> bool:
    """Whether code compiled for these architectures runs on an accelerator; true where torch does not name its own.

    Of CUDA's, sm_XY runs on X.Z with Z ≥ Y, and sm_XYa and sm_XYf surely on X.Y alone; compute_XY is compiled when it
    is loaded, for any later GPU (docs.nvidia.com/cuda/cuda-programming-guide/01-introduction/cuda-platform.html).
    """
    if card.architecture is None or card.architecture in compiled:
        return True
    if card.capability is None:
        return False
    for name in compiled:
        kind, _, number = name.partition("_")
        if not number.isdigit():
            if kind == "sm" and f"sm_{number[:-1]}" == card.architecture:
                return True
            continue
        built_for = (int(number[:-1]), int(number[-1]))
        same_major = card.capability[0] == built_for[0]
        if built_for <= card.capability and (kind == "compute" or same_major):
            return True
    return False


def refusal(device: torch.device) -> str | None:
    """Return why this torch cannot train on an accelerator, with the next move; None where it can. Starts a context."""
    if current() != device.type:
        return f"this PyTorch ({torch.__version__}) sees no {device.type} device; {INSTALL}"
    card, compiled = describe(device), compiled_architectures(device.type)
    if not has_kernels(card, compiled):
        return (
            f"this PyTorch ({torch.__version__}) has no kernels for {card.name}, {card.architecture}: it was built for "
            f"{', '.join(compiled)}; {INSTALL}, an older one for an older GPU"
        )
    if not has_fp64(device):
        return f"{card.name} has no fp64, in which losses are summed and weights checked"
    return None


def has_fp64(device: torch.device) -> bool:
    """Whether an accelerator holds fp64 numbers; Apple's do not. Starts a context on it."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):  # MPS raises TypeError
        return False
    return True


def choose(name: str, option: str = "--device") -> torch.device:
    """Return the device that auto, cpu or a kind of accelerator names; auto is the accelerator where it can train.

    Raises InputError where a named one cannot.
    """
    kind = (current() or CPU_NAME) if name == AUTO else name
    device = torch.device(kind)
    reason = None if kind == CPU_NAME else refusal(device)
    if reason is None:
        return device
    if name == AUTO:
        return torch.device(CPU_NAME)
    raise InputError(f"{option} {name}: {reason}, or use {option} cpu")


def has_bf16(device: torch.device) -> bool:
    """Whether an accelerator multiplies bf16 itself; torch would emulate it, slower than fp32."""
    asked: Any = getattr(_api(device.type), "is_bf16_supported", lambda with_emulation: False)  # MPS does not tell
    try:
        return bool(asked(False))
    except TypeError:  # torch 2.6 asks an XPU without that choice
        return bool(asked())


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """Return an accelerator's free and total memory. Starts a context on it."""
    free, total = _api(device.type).mem_get_info(device.index or 0)
    return int(free), int(total)


def peak_bytes(program: Callable[[], object], device: torch.device) -> int:
    """Return the allocator's peak while a program runs on an accelerator, without what was allocated before."""
    api = _api(device.type)
    synchronize(device)
    before = api.memory_allocated(device)
    api.reset_peak_memory_stats(device)
    program()
    synchronize(device)
    return int(api.max_memory_allocated(device)) - int(before)


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all work that was queued on it; a CPU queues none."""
    if device.type == CPU_NAME:
        return
    if device.type == "mps":
        _api("mps").synchronize()  # there is one device, and no argument
    else:
        _api(device.type).synchronize(device)


def set_current(device: torch.device) -> None:
    """Make an accelerator with an index this process's own: new contexts, streams and NCCL's work go there."""
    _api(device.type).set_device(device.index)


def new_stream(device: torch.device) -> Any:
    """Return a new stream of an accelerator."""
    return _api(device.type).Stream(device)


def current_stream(device: torch.device) -> Any:
    """Return the stream on which an accelerator's operations are queued now."""
    return _api(device.type).current_stream(device)


def on_stream(stream: Any, device: torch.device) -> AbstractContextManager[object]:
    """Return a context whose operations on an accelerator are queued on `stream`."""
    context: AbstractContextManager[object] = _api(device.type).stream(stream)
    return context
