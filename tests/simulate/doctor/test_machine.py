"""What the doctor finds out about a machine: from made-up /proc, /sys and /dev, and from stand-ins for GPUs."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch

from simulate.common.disk import temporary_folder
from simulate.doctor import machine
from simulate.doctor.machine import Nvidia, examine
from tests.gpus import CURRENT, LEGACY, DeviceModule, Properties, no_gpu, stand_in
from tests.harness import ROOT, run_python

DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\nGCC version: 12\n"
OPEN_DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def card(slot: str, vendor: str = "0x10de", kind: str = "0x030000") -> dict[str, str]:
    return {f"sys/bus/pci/devices/{slot}/{name}": text + "\n" for name, text in (("vendor", vendor), ("class", kind))}


def nvidia(root: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> Nvidia:
    no_gpu(monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return examine({}, root=write(root, files)).nvidia


def test_cards_driver_and_device_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card's audio part and other vendors' cards are none of NVIDIA's GPUs."""
    monkeypatch.setenv("PATH", str(tmp_path))  # without nvidia-smi
    files = card("01:00.0") | card("01:00.1", kind="0x040300")
    files |= card("02:00.0", kind="0x030200") | card("03:00.0", "0x1002")
    assert nvidia(tmp_path / "a", monkeypatch, files) == Nvidia(cards=2)
    files |= {"proc/driver/nvidia/version": DRIVER}
    assert nvidia(tmp_path / "b", monkeypatch, files) == Nvidia(2, "535.183.01")
    files |= {"proc/driver/nvidia/version": OPEN_DRIVER, "dev/nvidiactl": ""}
    assert nvidia(tmp_path / "c", monkeypatch, files) == Nvidia(2, "580.65.06", has_device_files=True)
    files = {"proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0"}
    assert nvidia(tmp_path / "d", monkeypatch, files) == Nvidia(is_jetson=True)
    assert nvidia(tmp_path / "e", monkeypatch, {}) == Nvidia()


@pytest.mark.parametrize(
    ("script", "capability"),
    [("echo 6.1; echo 8.6", (6, 1)), ("echo No devices were found", None), ("exit 9", None)],
)
def test_the_capability_of_a_gpu_that_torch_does_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, capability: tuple[int, int] | None
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\n{script}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert nvidia(tmp_path, monkeypatch, {"dev/nvidiactl": ""}).capability == capability
    stand_in(monkeypatch)
    assert examine({}, root=tmp_path).nvidia.capability is None, "torch tells it itself"


def test_a_hidden_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, is_hidden in (("", True), ("-1", True), ("0", False)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert examine({}, root=tmp_path).nvidia.is_hidden is is_hidden


def test_gpus_that_torch_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, DeviceModule(gpus=2, compiled=CURRENT))
    found = examine({}, root=tmp_path).gpus
    assert [(gpu.name, gpu.capability, gpu.has_kernels, gpu.has_bf16) for gpu in found] == [
        ("NVIDIA GeForce GTX 1080 Ti", (6, 1), False, False)
    ] * 2
    stand_in(monkeypatch, DeviceModule(properties=Properties("NVIDIA GeForce RTX 3060", 8, 6), compiled=LEGACY))
    found = examine({}, root=tmp_path).gpus
    assert [(gpu.architecture, gpu.has_kernels, gpu.has_bf16) for gpu in found] == [("sm_86", True, True)]


def test_this_build_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch)
    found = examine({}, root=tmp_path)
    assert found.torch is not None
    assert found.torch.version == torch.__version__
    assert found.torch.cuda_version == torch.version.cuda
    assert found.torch.has_distributed and "gloo" in found.torch.backends
    assert found.torch.threads == torch.get_num_threads()
    assert 0 < found.memory_free_bytes <= found.memory_bytes
    assert found.gpus == () and found.shared_memory_bytes is None and found.loopback_error == ""


def test_a_torch_without_its_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    code = "from simulate.doctor.machine import examine; m = examine({}); print(m.torch, m.torch_error)"
    said = run_python(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}", cwd=ROOT)
    assert said == "None OSError: libcudart.so.13: cannot open shared object file\n"


def test_a_torch_without_its_distributed_package() -> None:
    code = "from simulate.doctor.machine import examine; t = examine({}).torch; print(t.has_distributed, t.backends)"
    assert run_python(f"import tests.without_distributed; {code}", cwd=ROOT) == "False ()\n"


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder that is not there yet, the nearest one that is; root may write anywhere but below /proc."""
    found = examine({"--out": tmp_path / "runs/a", "TMPDIR": Path("/proc/self")}).folders
    assert [(f.option, f.path, f.is_writable) for f in found] == [
        ("--out", tmp_path, True), ("TMPDIR", Path("/proc/self"), False)
    ]  # fmt: skip
    assert found[0].free_bytes > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.tempfile, "TemporaryFile", lambda dir: open("/dev/full", "wb"))  # noqa: SIM115, PTH123
    assert not examine({"TMPDIR": tmp_path}).folders[0].is_writable


def test_the_folder_of_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert temporary_folder() == tmp_path

    def none_usable() -> str:
        raise FileNotFoundError

    monkeypatch.setenv("TMPDIR", "/full")
    monkeypatch.setattr("tempfile.gettempdir", none_usable)
    assert temporary_folder() == Path("/full")


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        holder.listen()
        assert examine({}, port, tmp_path).used_port == port
    assert examine({}, port, tmp_path).used_port is None


def test_without_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LOOPBACK", "192.0.2.1")  # an address of nobody's
    assert "assign" in examine({}, root=tmp_path).loopback_error
