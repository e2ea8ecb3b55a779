"""Refusals of a launch: one line that names the mistake, before anything is written."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from ltecli.commands.launch import LaunchArgs, check_launch, default_processes
from simulate.config.run import build_run
from tests.gpus import DeviceModule, stand_in
from tests.ltecli.command import Lte, Refused, assert_one_line, write_run

DASO = {"name": "daso", "devices_per_node": 2}


@pytest.mark.parametrize(
    ("tables", "options", "words"),
    [
        ({}, ["--processes", "3"], ("--processes 3", "cluster.devices = 2", "lower --processes")),
        ({"cluster": {"backend": "nccl"}}, [], ("cluster.backend = 'nccl'", "CUDA", "gloo")),
        ({"cluster": {"timeout_s": 0.5}}, [], ("cluster.timeout_s = 0.5", "1 s", "raise it")),
        ({"cluster": {"join_timeout_s": 0.1}}, [], ("cluster.join_timeout_s = 0.1",)),
        ({"cluster": {"devices": 4}, "method": DASO}, ["--processes", "3"], ("devices_per_node = 2", "--processes 3")),
        ({}, ["--nodes", "2", "--node", "1"], ("--node 1", "--join HOST:PORT")),
        ({}, ["--nodes", "2", "--node", "2", "--join", "127.0.0.1:1"], ("--node 2", "--nodes 2")),
    ],
)  # fmt: skip
def test_a_launch_that_cannot_work(
    refused: Refused, here: Path, tables: dict[str, Any], options: list[str], words: tuple[str, ...]
) -> None:
    run = write_run(here / "tiny.toml", **tables)
    refused("train", run, "--out", "new", "--quiet", "--launch", "--device", "cpu", *options, words=words)


@pytest.mark.parametrize(
    ("tables", "options", "words"),
    [
        ({}, ["--processes", "2"], ("--processes 2", "the GPUs of this node, 1", "lower it")),
        ({"cluster": {"backend": "gloo"}}, [], ("cluster.backend = 'gloo'", "cuda", "--device cpu")),
    ],
)
def test_a_launch_that_cannot_work_on_gpus(
    refused: Refused, here: Path, monkeypatch: pytest.MonkeyPatch, tables: dict[str, Any], options: list[str],
    words: tuple[str, ...],
) -> None:  # fmt: skip
    stand_in(monkeypatch)
    run = write_run(here / "tiny.toml", **tables)
    refused("train", run, "--out", "new", "--quiet", "--launch", "--device", "cuda", *options, words=words)


def test_a_node_starts_a_process_for_each_of_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, DeviceModule(gpus=3))
    run = build_run({"cluster": {"devices": 8}})
    assert default_processes(run, torch.device("cuda"), nodes=1) == 3
    assert default_processes(run, torch.device("cuda"), nodes=4) == 2
    check_launch(run, torch.device("cuda"), LaunchArgs())


def test_a_port_in_use(lte: Lte, here: Path) -> None:
    run = write_run(here / "tiny.toml")
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        join = f"127.0.0.1:{holder.getsockname()[1]}"
        outcome = lte("train", run, "--out", "new", "--quiet", "--launch", "--nodes", 2, "--node", 0, "--join", join)
    assert_one_line(outcome, 2, ("cannot listen", join.rpartition(":")[2]))
    assert not (here / "new").exists()


def test_nobody_joins(lte: Lte, here: Path) -> None:
    run = write_run(here / "tiny.toml", cluster={"join_timeout_s": 1})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        join = f"127.0.0.1:{free.getsockname()[1]}"
    outcome = lte("train", run, "--out", "new", "--quiet", "--launch", "--nodes", 2, "--node", 0, "--join", join)
    assert_one_line(outcome, 1, ("node 1 did not join", "nothing was started; give the same line again"))
    assert not (here / "new").exists()
