"""A worker's own GPU. No GPU is needed: stand-ins answer."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist

from simulate.common.errors import InputError
from simulate.config.run import build_run
from simulate.launch.worker import RankInfo, check_start, choose_gpu, join_processes
from simulate.methods.build_network import start_figures
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
    run = build_run({"cluster": {"backend": backend}})
    join_processes(run, torch.device(device), PLACE.process, PLACE.processes, "group/1", dist.HashStore(), 600.0)
    assert (seen["backend"], seen["device_id"]) == (used, torch.device(device) if bound else None)


class OtherProcess:
    """Communicator beside a process whose start weights are a little or far from this one's."""

    def __init__(self, name: str, change: float) -> None:
        self.name, self.change = name, change

    def share_texts(self, text: str) -> list[str]:
        title, figures = json.loads(text)
        figures[self.name][0] += self.change * figures[self.name][1]
        return [text, json.dumps([f"{title} too", figures])]


def test_processes_start_from_the_same_weights_but_for_rounding() -> None:
    run, name = (
        build_run({"model": {"name": "tests.zoo:Net", "parts": "linear", "context": 4}, "method": {"name": "ddp"}}),
        "inner.weight",
    )
    check_start(run, OtherProcess(name, 1e-6), PLACE.title)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"process 5 on node 1 too starts with other weights of inner\.weight"):
        check_start(run, OtherProcess(name, 1e-2), PLACE.title)  # type: ignore[arg-type]
    assert start_figures(build_run({"model": {"name": "gpt"}})) == {}  # the seed alone decides
