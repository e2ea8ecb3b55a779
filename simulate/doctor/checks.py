"""Checks of a machine: each finds one thing that stops or spoils a run, and says in one line what mends it.

`lte doctor`, `lte train` and its launches call `diagnose` with the facts of simulate.doctor.machine. A check is a
function in CHECKS that yields findings; docs/doctor.md lists them all. No check asks the system anything, so that tests
hand in made-up machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from simulate.common.units import bytes_text
from simulate.doctor.machine import Machine

Stops = Literal["run", "gpu", "launch", "nothing"]
"""Reach of a finding: any run, one on the GPU, a launched one, or nothing: a run starts, and is slow or may fail."""
WHEELS = "https://download.pytorch.org/whl"
TORCH = "'torch<2.15'"
"""The last release with kernels for capabilities below 7.5 is 2.14 (pytorch issue 190385)."""
OLD_INDEX, OLDEST, NEW_INDEX, NEW = "cu126", (5, 0), "cu130", (7, 5)
"""CUDA 12.6 wheels have kernels from 5.0, CUDA 13.0 ones from 7.5 (pytorch pull requests 182849 and 187075)."""
NEWEST_OF_OLD_INDEX = (10, 0)
"""The first capability that CUDA 12.6 wheels have no kernels for."""
OLDEST_ARM = (8, 0)
"""The first capability in wheels for arm64, of either index."""
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""First driver branch by CUDA's major version.

Source: docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html, table 1.
"""
HALF_CAPABILITIES = ((5, 3), (6, 0), (6, 2))
"""Below 7.0, those that multiply in fp16 faster than in fp32 (CUDA C++ programming guide, arithmetic throughput)."""
TORCH_BYTES = 230_000_000
"""Memory of a process that has imported torch, before it trains (measured: 2.13 for CPUs)."""
COMMAND_THREADS, WORKER_THREADS = 9, 12
"""Threads of `lte train --launch` itself and of each of its processes (measured: gloo, two processes of one thread)."""
COMMAND_FILES, FILES_OF_PROCESS = 16, 5
"""Open files and sockets of `lte train --launch`, and how many more for each process (measured: 23, 31 and 49 for two,
four and eight processes; each of these has fewer)."""
LEAST_FREE_BYTES = 1_000_000_000
"""Free bytes below which a disk is worth a word; that checkpoints fit is checked for each run by itself."""
LEAST_SHARED_BYTES = 1_000_000_000
"""NCCL's guide asks for --shm-size=1g in containers, whose default of 64 MiB it can use up."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, and the command or setting that mends it."""

    name: str
    stops: Stops
    text: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.text}: {self.remedy}"


@dataclass(frozen=True)
class Purpose:
    """Use that the machine is meant for."""

    device: str = "auto"
    """Value of --device."""
    launch: bool = False
    processes: int = 1
    """Processes of this machine."""
    autocast: str = "none"
    """train.autocast of the run."""


def diagnose(machine: Machine, purpose: Purpose) -> list[Finding]:
    """Return all findings that matter for a purpose, those that stop it first."""
    found = [finding for check in CHECKS for finding in check(machine, purpose)]
    return sorted(found, key=lambda finding: not stops(finding, purpose))


def stops(finding: Finding, purpose: Purpose) -> bool:
    """Whether a finding stops what is meant; a GPU that cannot be used counts, also where the CPU would take over."""
    return finding.stops in ("run", "gpu") or (finding.stops == "launch" and purpose.launch)


def torch_is_broken(machine: Machine, purpose: Purpose) -> Iterator[Finding]:
    """Find a torch that cannot be imported."""
    if machine.torch is None:
        remedy = f"pip install --force-reinstall {TORCH} (--index-url {WHEELS}/cpu for the small build without CUDA)"
        yield Finding("torch-import", "run", f"torch cannot be imported ({machine.torch_error})", remedy)


def gpu_without_kernels(machine: Machine, purpose: Purpose) -> Iterator[Finding]:
    """Find GPUs that this build of torch has no kernels for."""
    if machine.torch is None or purpose.device == "cpu":
        return
    usable = [str(index) for index, gpu in enumerate(machine.gpus) if gpu.has_kernels]
    for index, gpu in enumerate(machine.gpus):
        if gpu.has_kernels:
            continue
        remedy = f"{_install(gpu.capability, machine)}, or --device cpu"
        if usable:
            remedy += f", or leave it out: export CUDA_VISIBLE_DEVICES={','.join(usable)}"
        built = f"torch {machine.torch.version} has kernels only for {' '.join(machine.torch.architectures)}"
        text = f"GPU {index} ({gpu.name}, {gpu.architecture}): {built}"
        yield Finding("no-kernels", "gpu", text, remedy)


def gpu_unseen(machine: Machine, purpose: Purpose) -> Iterator[Finding]:
    """Find an NVIDIA GPU that torch does not see, and the first reason for it."""
    torch, nvidia = machine.torch, machine.nvidia
    if machine.gpus or torch is None or purpose.device == "cpu" or nvidia.is_hidden:
        return
    if not (nvidia.cards or nvidia.driver or nvidia.is_jetson or nvidia.capability):
        return
    if nvidia.cards and nvidia.driver is None:
        remedy = "sudo ubuntu-drivers install (Ubuntu), sudo apt-get install nvidia-driver (Debian); then restart"
        yield Finding("no-driver", "gpu", "an NVIDIA card is on the PCI bus, and its driver is not loaded", remedy)
    elif nvidia.driver and not nvidia.has_device_files:
        remedy = "start it with docker run --gpus all (docs/docker.md), or sudo nvidia-modprobe -c 0 outside of one"
        yield Finding("no-device-files", "gpu", "the host has an NVIDIA GPU, and this container got none", remedy)
    elif torch.cuda_version is None:
        text = f"the NVIDIA GPU here stays idle, since torch {torch.version} is a build for CPUs"
        yield Finding("cpu-build", "gpu", text, f"{_install(nvidia.capability, machine)}, or --device cpu")
    elif nvidia.driver and _branch(nvidia.driver) < (needed := _oldest_driver(torch.cuda_version)):
        text = f"NVIDIA's driver {nvidia.driver} is older than CUDA {torch.cuda_version} of this torch needs ({needed})"
        remedy = f"update NVIDIA's driver to {needed} or newer"
        # The older build does with an older driver, but knows no newer card.
        if _branch(nvidia.driver) >= OLDEST_DRIVER[12] and (nvidia.capability or NEW) < NEWEST_OF_OLD_INDEX:
            remedy += f", or pip install --force-reinstall {TORCH} --index-url {WHEELS}/{OLD_INDEX}"
        yield Finding("old-driver", "gpu", text, remedy)
    else:
        text = f"torch {torch.version} sees no GPU, although the driver {nvidia.driver or 'of a Jetson'} is there"
        remedy = "nvidia-smi says why (GTX 900 and 10, P100 and V100 need driver 580 or older), or --device cpu"
        yield Finding("gpu-unseen", "gpu", text, remedy)


def slow_format(machine: Machine, purpose: Purpose) -> Iterator[Finding]:
    """Find processors and GPUs that have no arithmetic for the run's train.autocast."""
    lower = purpose.autocast
    if purpose.device == "cpu" or not machine.gpus:
        if lower != "none" and lower not in machine.formats:
            text = f"this processor has no products in {lower}, and train.autocast emulates them, many times slower"
            yield Finding("slow-format", "nothing", text, "--set train.autocast=none, for a simulation")
        return
    for index, gpu in enumerate(machine.gpus):
        has_half = gpu.capability is None or gpu.capability >= (7, 0) or gpu.capability in HALF_CAPABILITIES
        if purpose.autocast == "bf16" and gpu.has_kernels and not gpu.has_bf16:
            text = f"GPU {index} ({gpu.name}) has no bf16, which train.autocast asks for"
            yield Finding("no-bf16", "run", text, f"--set train.autocast={'fp16' if has_half else 'none'}")
        elif purpose.autocast == "fp16" and not has_half:
            text = f"GPU {index} ({gpu.name}, {gpu.architecture}) is slower in fp16 than in fp32"
            yield Finding("slow-fp16", "nothing", text, "--set train.autocast=none")


def cannot_launch(machine: Machine, purpose: Purpose) -> Iterator[Finding]:
    """Find what a launched run lacks: another system, torch.distributed, a backend."""
    if machine.system == "Windows":
        text = "--launch is not made for Windows (plain lte train simulates there)"
        yield Finding("windows", "launch", text, "wsl --install, then install and run lte inside of WSL2")
    torch = machine.torch
    if torch is None:
        return
    if not torch.has_distributed:
        text = f"torch {torch.version} was built without torch.distributed, as wheels for Jetson often are"
        remedy = "leave --launch away, or install a build that has it (docs/docker.md)"
        yield Finding("no-distributed", "launch", text, remedy)
        return
    if "gloo" not in torch.backends:
        text = f"torch.distributed of torch {torch.version} has no gloo, which launched runs meet by"
        remedy = f"pip install --force-reinstall {TORCH} (built with USE_GLOO=1), or leave --launch away"
        yield Finding("no-gloo", "launch", text, remedy)
    if purpose.device != "cpu" and torch.cuda_version and machine.gpus and "nccl" not in torch.backends:
        text = f"torch.distributed of torch {torch.version} has no NCCL, which launched runs on CUDA GPUs use"
        remedy = "leave --launch away, and export CUDA_VISIBLE_DEVICES=0, or --device cpu"
        yield Finding("no-nccl", "launch", text, remedy)


def sockets(machine: Machine, purpose: Purpose) -> Iterator[Finding]:
    """Find a loopback interface or a port that launched runs cannot listen at."""
    if machine.loopback_error:
        text = f"no program can listen on loopback ({machine.loopback_error})"
        yield Finding("no-loopback", "launch", text, "sudo ip link set lo up")
    if machine.used_port is not None:
        text = f"port {machine.used_port}, which node 0 of a launch over several machines listens at, is in use"
        yield Finding("port-in-use", "nothing", text, f"give all nodes another: --join HOST:{machine.used_port + 1}")


def disks(machine: Machine, purpose: Purpose) -> Iterator[Finding]:
    """Find folders that are read-only or nearly full."""
    for folder in machine.folders:
        other = "--out FOLDER/NAME on another disk" if folder.option == "--out" else f"export {folder.option}=FOLDER"
        what = {"--out": "runs", "TMPDIR": "temporary files"}.get(folder.option, "prepared data")
        if not folder.is_writable:
            text = f"{folder.path}, the place of {what}, is not writable or full"
            yield Finding("not-writable", "run", text, f"{other}, or sudo chown $USER {folder.path}")
        elif folder.free_bytes < LEAST_FREE_BYTES:
            text = f"{folder.path}, the place of {what}, has {bytes_text(folder.free_bytes)} free"
            yield Finding("disk-space", "nothing", text, f"make room, or {other}")


def memory(machine: Machine, purpose: Purpose) -> Iterator[Finding]:
    """Find too little memory for torch alone, in a container or without."""
    count = purpose.processes + purpose.launch  # the command itself is one more
    needed = count * TORCH_BYTES
    if machine.memory_free_bytes < needed:
        limit = machine.limits.memory_bytes
        of = f"of this container's {bytes_text(limit)}" if limit else f"of {bytes_text(machine.memory_bytes)}"
        text = (
            f"{bytes_text(machine.memory_free_bytes)} {of} are free, and torch alone takes {bytes_text(needed)} in "
            f"{count} process{'es' if count > 1 else ''}"
        )
        remedy = "docker run --memory 8g, or MemoryMax= of the service" if limit else "end other programs"
        yield Finding("memory", "nothing", text, remedy + (", or a lower --processes" if purpose.processes > 1 else ""))
    shared = machine.shared_memory_bytes
    uses_nccl = purpose.launch and purpose.device != "cpu" and len(machine.gpus) > 1
    if uses_nccl and shared is not None and shared < LEAST_SHARED_BYTES:
        text = f"/dev/shm has {bytes_text(shared)}, which NCCL can use up between {len(machine.gpus)} GPUs"
        yield Finding("shared-memory", "nothing", text, "docker run --shm-size=1g, or --ipc=host")


def processes(machine: Machine, purpose: Purpose) -> Iterator[Finding]:
    """Find a limit of processes that a run would hit, which counts threads, too, or one of open files."""
    needed = COMMAND_THREADS + machine.cores + (WORKER_THREADS * purpose.processes if purpose.launch else 0)
    group, user = machine.limits, machine.user_limits
    for free, limit, whose, remedy in (
        (group.processes_free, group.processes, "", "docker run --pids-limit 4096, or TasksMax= of the service"),
        (user.processes_free, user.processes, " of this user", "ulimit -u 4096, or LimitNPROC= of the service"),
    ):
        if free is not None and free < needed:
            text = f"{free} of {limit} processes and threads{whose} are left, and a run takes about {needed}"
            yield Finding("process-limit", "nothing", text, remedy)
    files = COMMAND_FILES + FILES_OF_PROCESS * purpose.processes
    if purpose.launch and user.open_files is not None and user.open_files < files:
        text = f"a process may open {user.open_files} files and sockets, and a launch takes about {files}"
        yield Finding("file-limit", "nothing", text, "ulimit -n 4096, or LimitNOFILE= of the service")


def cores(machine: Machine, purpose: Purpose) -> Iterator[Finding]:
    """Find more threads than a quota has cores: they are all stopped together when it is used up."""
    quota = machine.limits.cpus
    if machine.torch is None or quota is None or purpose.launch:  # launched processes get their threads by the quota
        return
    if machine.torch.threads > machine.cores:
        text = f"torch computes with {machine.torch.threads} threads, and this container has {quota:.3g} cores"
        yield Finding("threads", "nothing", text, f"export OMP_NUM_THREADS={machine.cores}")


CHECKS: tuple[Callable[[Machine, Purpose], Iterator[Finding]], ...] = (
    torch_is_broken, gpu_without_kernels, gpu_unseen, slow_format, cannot_launch, sockets, disks, memory, processes,
    cores,
)  # fmt: skip


def _install(capability: tuple[int, int] | None, machine: Machine) -> str:
    """Return the command that installs a torch for a GPU, or what to do where there is none."""
    pip = f"pip install --force-reinstall {TORCH} --index-url {WHEELS}/"
    if machine.nvidia.is_jetson:
        return "install NVIDIA's wheel for this JetPack (docs/docker.md)"
    if capability is None:
        return f"{pip}{NEW_INDEX} (RTX 20 and newer; GTX 900 and 10, P100, V100: {OLD_INDEX})"
    if capability < OLDEST or (machine.processor in ("aarch64", "arm64") and capability < OLDEST_ARM):
        return "no wheel of torch has kernels for it"
    return f"{pip}{OLD_INDEX if capability < NEW else NEW_INDEX}"


def _branch(driver: str) -> int:
    return int(driver.partition(".")[0])


def _oldest_driver(cuda: str) -> int:
    """Return the first driver branch for a version of CUDA; 0 where it is not known."""
    return OLDEST_DRIVER.get(int(cuda.partition(".")[0]), 0)
