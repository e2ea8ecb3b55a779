"""A worker's own GPU. No GPU is needed: stand-ins answer."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from simulate.common.errors import InputError
from simulate.config.run import build_run
from simulate.launch.worker import RankInfo, choose_gpu, join_processes
from tests.gpus import CURRENT, DeviceModule, no_gpu, stand_in

PLACE = RankInfo(process=5, processes=8, local_process=1, local_processes=4, node=1)


def test_processes_of_a_node_take_its_gpus_and_make_them_current(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = stand_in(monkeypatch, DeviceModule(gpus=4))
    assert choose_gpu("cuda", PLACE) == torch.device("cuda", 1)
    assert gpus.calls == [("set_device", 1)]
    assert choose_gpu("cpu", PLACE) == torch.device("cpu")


def test_a_node_without_a_gpu_that_can_train_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch)
    with pytest.raises(InputError, match=r"process 5 on node 1: this PyTorch .* sees no cuda device"):
        choose_gpu("cuda", PLACE)
    stand_in(monkeypatch, DeviceModule(compiled=CURRENT))
    with pytest.raises(InputError, match=r"process 5 on node 1: this PyTorch .* has no kernels for"):
        choose_gpu("cuda", PLACE)


@pytest.mark.parametrize(
    ("backend", "device", "used", "bound"),
    [
        ("auto", "cuda:1", "nccl", True),
        ("nccl", "cuda:1", "nccl", True),
        ("auto", "xpu:1", "xccl", False),
        ("auto", "cpu", "gloo", False),
        ("gloo", "cpu", "gloo", False),
    ],
)
def test_nccl_is_bound_to_the_gpu_of_the_process(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: str, used: str, bound: bool
) -> None:
    seen: dict[str, object] = {}
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(dist, "init_process_group", lambda name, **keys: seen.update(keys, backend=name))
    join_processes(build_run({"cluster": {"backend": backend}}), torch.device(device), PLACE, dist.HashStore())
    assert (seen["backend"], seen["device_id"]) == (used, torch.device(device) if bound else None)
