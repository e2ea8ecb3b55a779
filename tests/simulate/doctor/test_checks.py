"""Every finding of the doctor, on a made-up machine that has nothing else; and its absence on a healthy one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from simulate.common.limits import Limits, UserLimits
from simulate.doctor import checks
from simulate.doctor.checks import CHECKS, Purpose, diagnose, stops
from simulate.doctor.machine import Folder, Gpu, Machine, Nvidia, Torch
from tests.gpus import CURRENT, LEGACY
from tests.harness import ROOT

CPU = Torch("2.13.0+cpu", None, (), 4, True, ("gloo",))
CUDA13 = Torch("2.14.1+cu130", "13.0", tuple(CURRENT), 4, True, ("gloo", "nccl"))
CUDA12 = Torch("2.14.1+cu126", "12.6", tuple(LEGACY), 4, True, ("gloo", "nccl"))
GTX = Gpu("NVIDIA GeForce GTX 1080 Ti", (6, 1), "sm_61", 11_700_000_000, False, False)
OLD_GTX = replace(GTX, has_kernels=True)
K80 = Gpu("Tesla K80", (3, 7), "sm_37", 12_000_000_000, False, False)
V100 = Gpu("Tesla V100", (7, 0), "sm_70", 16_000_000_000, True, False)
UNFIT_V100 = replace(V100, has_kernels=False)
RTX = Gpu("NVIDIA GeForce RTX 3060", (8, 6), "sm_86", 12_900_000_000, True, True)
BLACKWELL = Gpu("NVIDIA GeForce RTX 5090", (12, 0), "sm_120", 34_000_000_000, False, True)
CARD = Nvidia(cards=1, driver="580.65.06", has_device_files=True)
GB = 1_000_000_000
HEALTHY = Machine(
    torch=CPU, cores=4, memory_bytes=16 * GB, memory_free_bytes=12 * GB, shared_memory_bytes=8 * GB,
    folders=(Folder("--out", Path("/runs"), True, 50 * GB), Folder("TMPDIR", Path("/tmp"), True, 50 * GB)),
)  # fmt: skip
LAUNCH = Purpose(launch=True, processes=4)
OLD_WHEEL = "pip install --force-reinstall 'torch<2.15' --index-url https://download.pytorch.org/whl/cu126"
NEW_WHEEL = OLD_WHEEL.replace("cu126", "cu130")


def full(option: str, *, writable: bool = True, free: int = 1_000_000) -> dict[str, Any]:
    return {"folders": (Folder(option, Path("/x"), writable, free),)}


CASES: list[tuple[str, dict[str, Any], Purpose, bool, str]] = [
    # name, what differs from the healthy machine, purpose, whether it stops that, words of the line in order
    ("torch-import", {"torch": None, "torch_error": "OSError: libcudart.so.13"}, Purpose(), True,
     r"libcudart.so.13.*: pip install --force-reinstall 'torch<2.15'"),
    ("no-kernels", {"torch": CUDA13, "gpus": (GTX,)}, Purpose(), True,
     rf"GPU 0 \(NVIDIA GeForce GTX 1080 Ti, sm_61\): torch 2.14.1\+cu130 has kernels only for sm_75 .*: {OLD_WHEEL}"),
    ("no-kernels", {"torch": CUDA12, "gpus": (BLACKWELL,)}, Purpose("cuda"), True, f": {NEW_WHEEL}, or --device cpu"),
    ("no-kernels", {"torch": CUDA12, "gpus": (K80,)}, Purpose(), True, ": no wheel of torch has kernels for it, or"),
    ("no-kernels", {"torch": CUDA12, "gpus": (UNFIT_V100,), "processor": "aarch64"}, Purpose(), True,
     ": no wheel of torch"),
    ("no-kernels", {"torch": CUDA13, "gpus": (GTX,), "nvidia": replace(CARD, is_jetson=True)}, Purpose(), True,
     ": install NVIDIA's wheel for this JetPack"),
    ("no-kernels", {"torch": CUDA13, "gpus": (RTX, GTX, RTX)}, Purpose(), True,
     r"GPU 1 .*cu126, or --device cpu, or leave it out: export CUDA_VISIBLE_DEVICES=0,2"),
    ("no-driver", {"nvidia": Nvidia(cards=1)}, Purpose(), True, "driver is not loaded: sudo ubuntu-drivers install"),
    ("no-device-files", {"nvidia": replace(CARD, has_device_files=False)}, Purpose(), True,
     "this container got none: start it with docker run --gpus all"),
    ("cpu-build", {"nvidia": replace(CARD, capability=(6, 1))}, Purpose(), True, f"a build for CPUs: {OLD_WHEEL}, or"),
    ("cpu-build", {"nvidia": replace(CARD, capability=(8, 6))}, Purpose(), True, f"a build for CPUs: {NEW_WHEEL}, or"),
    ("cpu-build", {"nvidia": CARD}, Purpose(), True, r"cu130 \(RTX 20 and newer; GTX 900 and 10, P100, V100: cu126\)"),
    ("cpu-build", {"nvidia": Nvidia(is_jetson=True)}, Purpose(), True, "install NVIDIA's wheel for this JetPack"),
    ("old-driver", {"torch": CUDA13, "nvidia": replace(CARD, driver="535.183.01")}, Purpose(), True,
     rf"driver 535.183.01 is older than CUDA 13.0 .* needs \(580\): update .* to 580 or newer, or {OLD_WHEEL}$"),
    ("old-driver", {"torch": CUDA13, "nvidia": replace(CARD, driver="470.82.01")}, Purpose(), True, "580 or newer$"),
    ("old-driver", {"torch": CUDA13, "nvidia": replace(CARD, driver="570.1", capability=(12, 0))}, Purpose(), True,
     "580 or newer$"),
    ("gpu-unseen", {"torch": CUDA12, "nvidia": CARD}, Purpose(), True, "driver 580.65.06 is there: nvidia-smi says"),
    ("no-bf16", {"torch": CUDA12, "gpus": (OLD_GTX,)}, Purpose(autocast="bf16"), True, "--set train.autocast=none"),
    ("no-bf16", {"torch": CUDA12, "gpus": (V100,)}, Purpose(autocast="bf16"), True, "--set train.autocast=fp16"),
    ("slow-fp16", {"torch": CUDA12, "gpus": (OLD_GTX,)}, Purpose(autocast="fp16"), False, "slower in fp16.*=none"),
    ("slow-format", {"formats": frozenset({"bf16"})}, Purpose(autocast="fp16"), False, "no products in fp16.*=none"),
    ("windows", {"system": "Windows"}, LAUNCH, True, "not made for Windows .*: wsl --install"),
    ("no-distributed", {"torch": replace(CPU, has_distributed=False, backends=())}, LAUNCH, True,
     "built without torch.distributed, as wheels for Jetson often are: leave --launch away"),
    ("no-gloo", {"torch": replace(CPU, backends=("mpi",))}, LAUNCH, True, "has no gloo.*: pip install"),
    ("no-nccl", {"torch": replace(CUDA12, backends=("gloo",)), "gpus": (RTX, RTX)}, LAUNCH, True,
     "has no NCCL.*: leave --launch away, and export CUDA_VISIBLE_DEVICES=0, or --device cpu"),
    ("no-loopback", {"loopback_error": "Cannot assign requested address"}, LAUNCH, True, ": sudo ip link set lo up"),
    ("port-in-use", {"used_port": 29400}, LAUNCH, False, "port 29400.*in use: .*--join HOST:29401"),
    ("not-writable", full("TMPDIR", writable=False), Purpose(), True, "temporary files, .*: export TMPDIR=FOLDER"),
    ("not-writable", full("--out", writable=False), Purpose(), True, "/x, the place of runs.*: --out FOLDER/NAME"),
    ("disk-space", full("LTE_CACHE"), Purpose(), False, "/x, the place of prepared data, has 1 MB free: make room, or"),
    ("memory", {"memory_free_bytes": 100_000_000}, Purpose(), False, "100 MB of 16 GB.*230 MB in 1 process: end"),
    ("memory", {"memory_free_bytes": GB, "limits": Limits(2 * GB, GB)}, LAUNCH, False,
     "1 GB of this container's 2 GB are free.*1.15 GB in 5 processes: docker run --memory 8g.* lower --processes"),
    ("shared-memory", {"torch": CUDA12, "gpus": (RTX, RTX), "shared_memory_bytes": 67_108_864}, LAUNCH, False,
     "/dev/shm has 67.1 MB.*: docker run --shm-size=1g"),
    ("process-limit", {"limits": Limits(processes=64, processes_free=40)}, LAUNCH, False,
     "40 of 64 processes and threads are left, and a run takes about 61: docker run --pids-limit"),
    ("process-limit", {"user_limits": UserLimits(4096, 12, 1024)}, Purpose(), False,
     "12 of 4096 processes and threads of this user are left, and a run takes about 13: ulimit -u 4096, or Limit"),
    ("file-limit", {"user_limits": UserLimits(open_files=32)}, LAUNCH, False,
     "a process may open 32 files and sockets, and a launch takes about 36: ulimit -n 4096, or LimitNOFILE="),
    ("threads", {"limits": Limits(cpus=1.5), "cores": 2}, Purpose(), False,
     "4 threads, and this container has 1.5 cores: export OMP_NUM_THREADS=2"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "purpose", "is_stopped", "words"), CASES)
def test_a_finding_and_what_mends_it(
    name: str, changes: dict[str, Any], purpose: Purpose, is_stopped: bool, words: str
) -> None:
    findings = diagnose(replace(HEALTHY, **changes), purpose)
    assert [finding.name for finding in findings] == [name]
    line = str(findings[0])
    assert re.search(words, line), line
    assert "\n" not in line
    assert stops(findings[0], purpose) is is_stopped


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"torch": CUDA13, "gpus": (RTX,), "nvidia": CARD},
        {"torch": CUDA12, "gpus": (V100, OLD_GTX), "nvidia": replace(CARD, driver="535.183.01")},  # 525 will do
        {"nvidia": replace(CARD, is_hidden=True)},  # on purpose
        {"limits": Limits(8 * GB, 6 * GB, 4.0, 1000, 900)},
        {"shared_memory_bytes": None},
    ],
)
@pytest.mark.parametrize("purpose", [Purpose(), LAUNCH])
def test_nothing_is_found_where_all_is_well(changes: dict[str, Any], purpose: Purpose) -> None:
    assert not diagnose(replace(HEALTHY, **changes), purpose)


@pytest.mark.parametrize("changes", [{"torch": CUDA13, "gpus": (GTX,)}, {"nvidia": CARD}, {"nvidia": Nvidia(cards=1)}])
def test_a_run_on_the_cpu_needs_no_gpu(changes: dict[str, Any]) -> None:
    assert diagnose(replace(HEALTHY, **changes), Purpose())
    assert not diagnose(replace(HEALTHY, **changes), Purpose("cpu"))


def test_what_stops_comes_first_and_a_launch_is_stopped_alone() -> None:
    machine = replace(HEALTHY, system="Windows", used_port=29400, **full("TMPDIR", writable=False))
    assert [finding.name for finding in diagnose(machine, LAUNCH)] == ["windows", "not-writable", "port-in-use"]
    windows = next(finding for finding in diagnose(machine, Purpose()) if finding.name == "windows")
    assert not stops(windows, Purpose())


def test_each_finding_has_a_case_and_a_line_in_the_docs() -> None:
    source = Path(checks.__file__).read_text(encoding="utf-8")
    names = set(re.findall(r'Finding\(\s*"([\w-]+)"', source))
    assert len(names) > 15 and len(CHECKS) == 10
    assert names == {name for name, *_ in CASES}
    documented = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "docs/doctor.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(documented) == sorted(names)
