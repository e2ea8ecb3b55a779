"""`lte train` on a machine that is too small for all devices in one process, and `--tiny`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ltecli.commands import simulation_fits
from ltecli.commands.simulation_fits import check_simulation_fits, tiny_run
from simulate.common.errors import InputError
from simulate.config.profiles import detect_local
from simulate.config.run import Run, build_run, load_run
from simulate.costs.simulated_memory import simulated_memory
from tests.ltecli.command import Lte, Refused, write_run

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MODELS = ("gpt2", "llama_1b", "vit_b16", "mixer_b16")


def give(monkeypatch: pytest.MonkeyPatch, **rooms: int) -> None:
    """Let this machine have so many bytes free, in the host's memory and in the GPU's."""
    monkeypatch.setattr(simulation_fits, "_rooms", lambda device: rooms)


def run_of(model: str = "gpt2", method: str = "lte", devices: int = 8, **train: object) -> Run:
    keys = {"steps": 500, "warmup_steps": 50, **train}
    return build_run(
        {"model": {"name": model}, "method": {"name": method}, "train": keys, "cluster": {"devices": devices}}
    )


def needed_bytes(run: Run) -> int:
    return simulated_memory(run, run.model.shape(), detect_local().device[0]).process


def test_a_run_that_does_not_fit_is_refused_before_anything_is_written(
    refused: Refused, run_toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, host=500_000_000)
    words = ("cluster.devices = 5000", "500 MB are free", "--tiny", "--ignore-memory")
    line = refused("train", run_toml, "--set", "cluster.devices=5000", "--device", "cpu", words=words)
    found = re.search(r"--set cluster.devices=(\d+) fits", line)
    assert found
    run, most = load_run(run_toml), int(found.group(1))
    fitting, more = (simulation_fits._with_devices(run, devices) for devices in (most, most + 1))
    assert needed_bytes(fitting) <= 500_000_000 < needed_bytes(more)


def test_the_free_memory_of_this_machine_counts(
    lte: Lte, refused: Refused, run_toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulation_fits, "usable_memory", lambda: (10**12, -(10**12)))
    line = refused("train", run_toml, "--device", "cpu", words=("cluster.devices = 2", "--tiny"))
    assert "--set cluster.devices" not in line  # not even one fits
    assert lte("train", run_toml, "--device", "cpu", "--ignore-memory", "--quiet").code == 0


def test_a_gpus_memory_and_its_hosts_both_count(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of()
    give(monkeypatch, host=10**12, GPU=10**12)
    check_simulation_fits(run, GPU, False)
    give(monkeypatch, host=10**12, GPU=10**9)
    with pytest.raises(InputError, match=r"of GPU memory, and 1 GB are free .* --device cpu"):
        check_simulation_fits(run, GPU, False)
    give(monkeypatch, host=10**7, GPU=10**12)
    with pytest.raises(InputError, match="of host memory, and 10 MB are free"):
        check_simulation_fits(run, GPU, True)


PEAK = (
    "import resource, sys; from ltecli.app import main; code = main(sys.argv[1:]); "
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024); sys.exit(code)"
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is counted in other units, and by another heap")
def test_a_whole_process_holds_what_is_asked_for(here: Path) -> None:
    sizes = {"layers": 4, "width": 256, "attention_heads": 8, "context": 128}
    train = {"steps": 4, "micro_batch": 8, "evaluate_samples": 8}
    path = write_run(here / "run.toml", model=sizes, train=train, cluster={"devices": 4})
    command = [sys.executable, "-c", PEAK, "train", str(path), "--out", "a", "--device", "cpu", "--quiet"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    share = needed_bytes(load_run(path)) / int(done.stdout.split()[-1])
    assert 0.95 <= share <= 1.25


def test_only_numbers_of_devices_that_the_method_allows_are_suggested(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(method="daso", devices=16)
    table = run.model_dump(exclude_none=True)
    run = build_run({**table, "method": {"name": "daso", "devices_per_node": 4}})
    give(monkeypatch, host=needed_bytes(run) - 1)
    with pytest.raises(InputError, match=r"--set cluster.devices=12 fits"):
        check_simulation_fits(run, CPU, False)


@pytest.mark.parametrize("model", MODELS)
def test_a_tiny_run_keeps_everything_but_sizes(model: str) -> None:
    run = run_of(model)
    tiny, replaced = tiny_run(run)
    assert tiny.model.family == run.model.family
    assert tiny.model.shape().parameters < run.model.shape().parameters / 20
    assert (tiny.cluster, tiny.data) == (run.cluster, run.data)
    assert {key for key, value in tiny.method if value != getattr(run.method, key)} <= {"rank", "alpha"}
    assert tiny.train.steps < run.train.steps
    assert any(text.startswith("model.width = 64 (was ") for text in replaced)
    assert not [text for text in replaced if text.startswith(("method.merge", "cluster", "data"))]


def test_a_tiny_run_has_few_devices_and_keeps_what_was_asked_for_beside_it() -> None:
    run = build_run({"cluster": {"devices": 5000}, "train": {"steps": 300, "warmup_share": 0.1}})
    tiny, replaced = tiny_run(run)
    assert tiny.cluster.devices == 8 and "cluster.devices = 8 (was 5000)" in replaced
    kept, _ = tiny_run(run, ["train.steps", "cluster.devices"])
    assert (kept.train.steps, kept.train.num_warmup_steps, kept.cluster.devices) == (300, 30, 5000)


def test_tiny_says_what_it_replaced_and_trains(lte: Lte, here: Path) -> None:
    write_run(here / "mine.toml", model={"layers": 6, "width": 96, "attention_heads": 3, "context": 8})
    outcome = lte("train", "mine.toml", "--tiny", "--device", "cpu")
    assert outcome.code == 0
    assert "--tiny: model.layers = 2 (was 6), model.width = 64 (was 96)" in outcome.stderr.replace(
        "model.name = gpt, ", ""
    )
    assert load_run(Path("runs/mine-tiny/run.toml")).method.merge_every == 3


def test_a_resumed_run_is_not_made_tiny(refused: Refused, trained: Path) -> None:
    refused("train", trained, "--resume", "--tiny", words=("--tiny",))
