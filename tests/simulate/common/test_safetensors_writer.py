"""Tests of the safetensors writer: the library reads its files, and tensors are never twice in memory."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save
from torch import Tensor

from simulate.common.safetensors_writer import DTYPES, file_parts, write_tensors
from simulate.layers.lazy_weight import LazyWeight
from simulate.methods.state import State
from simulate.training.checkpoints import Progress, load_checkpoint, save_checkpoint
from tests import tiny
from tests.harness import run_python

PROGRESS = Progress(3, 0.0, 0.0, 0, 0, 0, 0.0, None)


def tensors_of_every_kind() -> dict[str, Tensor]:
    kinds = {name: torch.arange(12).remainder(2).to(getattr(torch, name)).view(3, 4) for name in DTYPES}
    odd = {"number": torch.tensor(7), "empty": torch.empty(0, 3), "tränsposed": torch.arange(6.0).view(2, 3).t()}
    return {**kinds, **odd, "row": torch.arange(8.0).view(2, 4)[1], "ones": torch.ones(3, dtype=torch.uint8)}


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors, path = tensors_of_every_kind(), tmp_path / "x.safetensors"
    with path.open("wb") as file:
        write_tensors(file, tensors, {"format": "pt", "step": "3"})
    for read in (load_file(path), load(path.read_bytes())):
        assert read.keys() == tensors.keys()
        assert all(read[n].dtype == t.dtype and torch.equal(read[n], t) for n, t in tensors.items())
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "step": "3"}


def test_a_file_is_as_the_library_writes_it() -> None:
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(2), "c": torch.arange(3), "d": torch.ones(7, dtype=torch.uint8)}
    assert b"".join(file_parts(tensors)) == save(tensors)


def test_tensors_are_made_one_after_the_other() -> None:
    made: list[str] = []

    def lazy(name: str) -> LazyWeight:
        def make() -> Tensor:
            made.append(name)
            return torch.full((4,), float(len(made)))

        return LazyWeight(make, torch.empty(4, device="meta"), torch.device("cpu"))

    parts = file_parts({"a": lazy("a"), "b": lazy("b")})
    next(parts)
    assert made == []
    assert bytes(next(parts)) == bytes(torch.full((4,), 1.0).numpy().data)
    assert made == ["a"]


SAVER = """
import resource, sys
from pathlib import Path
import torch
from simulate.training.checkpoints import Progress, State, load_checkpoint, save_checkpoint
from simulate.config.run import load_run
folder, run = Path(sys.argv[1]), load_run(Path(sys.argv[2]))
state = State({str(i): torch.full((2**20,), float(i)) for i in range(48)}, {})
save_checkpoint(folder, run, "data", Progress(1, 0.0, 0.0, 0, 0, 0, 0.0, None), State({"a": torch.ones(9)}, {}))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
save_checkpoint(folder, run, "data", Progress(2, 0.0, 0.0, 0, 0, 0, 0.0, None), state)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_save_takes_far_less_memory_than_what_it_saves(tmp_path: Path) -> None:
    """Save 192 MiB of tensors: the process's peak grows by less than an eighth of that."""
    from simulate.config.run import dump_run

    (tmp_path / "run.toml").write_text(dump_run(tiny.lte_run()), encoding="utf-8")
    assert int(run_python(SAVER, tmp_path / "checkpoints", tmp_path / "run.toml")) < 192 * 1024 // 8


def test_a_full_disk_raises_and_leaves_no_file(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk."""
    run, folder = tiny.lte_run(), tmp_path / "checkpoints"
    state = State({"small": torch.ones(9), "large": torch.ones(2**18)}, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(folder, run, "data", PROGRESS, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(folder.rglob("*.*"))
    path = save_checkpoint(folder, run, "data", PROGRESS, state)
    _, read = load_checkpoint(path, run, "data", [])
    assert all(torch.equal(read.shared[name], tensor) for name, tensor in state.shared.items())
