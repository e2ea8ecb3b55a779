"""Processes that are killed while they save, and devices whose saved weights are not finite."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from simulate.config.run import load_run
from simulate.training.checkpoints import list_checkpoints, load_checkpoint
from tests.harness import Child
from tests.launch.runs import LOSS_TOLERANCE, interrupt, launched_run, simulated_loss, start_node, tiny_run

SAVER = """
import sys
from pathlib import Path
import torch
from simulate.training.checkpoints import Progress, State, begin_checkpoint, prune
from simulate.training.saving import Saving
from simulate.config.run import load_run
import os
folder, run = Path(sys.argv[1]), load_run(Path(sys.argv[2]))
torch.set_num_threads(1)
for line in sys.stdin:  # a child for each kill: torch is imported once
    step, child = int(line), os.fork()
    if child == 0:
        break
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
while child == 0:
    step += 1
    own = {device: {"a": torch.full((20_000,), float(step))} for device in range(4)}
    state = State({"w": torch.full((50_000,), float(step))}, own)
    begun = begin_checkpoint(folder, run, "data", Progress(step, 0.0, 0.0, 0, 0, 0, 0.0, None), state)
    saving = Saving(begun, {}, 0.0)
    for tensor in (state.shared["w"], *(d["a"] for d in own.values())):
        tensor.zero_()  # as training does meanwhile
    saving.wait()
    prune(folder, range(4))
"""


@pytest.mark.slow
def test_a_save_that_is_killed_a_hundred_times_always_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    run_file, folder, draws = tiny_run(tmp_path), tmp_path / "checkpoints", random.Random(0)
    folder.mkdir()
    run, step, unfinished = load_run(run_file), 0, 0
    command = [sys.executable, "-c", SAVER, str(folder), str(run_file)]
    saver = Child(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1)
    assert saver.stdin is not None and saver.stdout is not None
    for _ in range(100):
        print(step, file=saver.stdin, flush=True)
        child = int(saver.stdout.readline())
        while not list_checkpoints(folder, 4):
            time.sleep(0.01)
        time.sleep(draws.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        assert saver.stdout.readline() == "gone\n"
        newest = list_checkpoints(folder, 4)[-1]
        progress, state = load_checkpoint(newest, run, "data", range(4))
        assert progress is not None and progress.step >= step
        step = progress.step
        assert all(
            bool((tensor == step).all()) for tensor in (state.shared["w"], *(d["a"] for d in state.of_devices.values()))
        )
        unfinished += len(list(folder.glob("step-*"))) > len(list_checkpoints(folder, 4))
    assert saver.outcome().code == 0
    assert unfinished, "no kill hit a save"


def poison(folder: Path, devices: range) -> None:
    """Make the adapters of devices not finite in every checkpoint below a run folder, digests included."""
    for part in folder.glob("checkpoints/step-*/devices-*.safetensors"):
        tensors = load(part.read_bytes())
        for name, tensor in tensors.items():
            if int(name.partition("/")[0]) in devices and name.endswith(".b"):
                tensors[name] = torch.full_like(tensor, float("nan"))
        content, about = save(tensors), part.with_suffix(".json")
        digest = {"tensors_bytes": len(content), "tensors_sha256": hashlib.sha256(content).hexdigest()}
        part.write_bytes(content)
        about.write_text(json.dumps({**json.loads(about.read_text()), **digest}))


@pytest.mark.slow
@pytest.mark.parametrize(("sick", "code"), [(range(3, 4), 0), (range(4), 1)])
def test_weights_that_are_not_finite_are_left_out_and_all_of_them_end_the_run(
    tmp_path: Path, sick: range, code: int
) -> None:
    run = tiny_run(tmp_path, steps=1000)
    with launched_run(tmp_path / "run", run) as launched:
        launched.wait_for_step(20)
        interrupt(launched.agents[0])
        assert launched.end() == [130], launched.all_said()
        poison(launched.node_folder(), sick)
        start_node(launched, run, resume=True)
        assert launched.end() == [code], launched.all_said()
        if code == 0:
            (left_out,) = launched.events("left-out")
            assert left_out["devices"] == [3]
            assert "device 3: weights not finite, left out of the merge" in launched.said()
            expected = simulated_loss(run, tmp_path / "alone")
            assert launched.val_loss() == pytest.approx(expected, rel=LOSS_TOLERANCE)
        else:
            assert "try a lower train.learning_rate" in launched.said()
