"""Whole simulations beside their floor, in turns: `lte train` in one process and as it picks, plain loops, EXO Gym.

    python bench/simulations.py [--steps 300] [--rounds 3] [--gym CHECKOUT]

Four devices train the GPT of 834,304 parameters with local SGD (FedAvg), T = 10. The floor is a loop of plain PyTorch
over a core's share of the devices, one process and one thread a core, without merges, evaluations or a report. EXO Gym
(https://github.com/exo-explore/gym, a process a device) runs where a checkout of it is given; on Linux, with lo in the
place of macOS's lo0 in its exogym/utils.py, and with einops and datasets, which it imports. Each line has seconds by
the clock and of the processor, of the whole command with all that it started, and ratios to the floor of its round.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from simulate.common.limits import usable_cores
from simulate.config.run import Run, build_run
from simulate.data.batches import build_batches
from simulate.data.load import load_data
from simulate.methods.build_network import build_model

DEVICES, CONTEXT, BATCH = 4, 64, 8
RUN = f"""
[model]
name = "gpt"
layers = 4
width = 128
attention_heads = 4
context = {CONTEXT}
[method]
name = "local-sgd"
merge_every = 10
[train]
steps = STEPS
micro_batch = {BATCH}
evaluate_every = STEPS
checkpoint_every = STEPS
[cluster]
devices = {DEVICES}
"""


class Loss(nn.Module):
    """A network with its loss, as EXO Gym wants it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return functional.cross_entropy(self.network(inputs).flatten(0, -2), targets.flatten())


def run_of(steps: int) -> Run:
    """Return the run that all of them train."""
    import tomllib

    return build_run(tomllib.loads(RUN.replace("STEPS", str(steps))))


def plain_loop(steps: int, devices: range) -> None:
    """Train each of a core's devices by itself, with nothing but PyTorch."""
    torch.set_num_threads(1)
    run = run_of(steps)
    batches, cpu = build_batches(run, load_data(run), torch.device("cpu")), torch.device("cpu")
    networks = [Loss(build_model(run).to(cpu)) for _ in devices]
    optimizers = [torch.optim.AdamW(network.parameters(), lr=1e-3) for network in networks]
    for step in range(steps):
        inputs, targets = batches.batch(step, devices)
        parts = zip(inputs.split(BATCH), targets.split(BATCH), networks, optimizers, strict=True)
        for *batch, network, optimizer in parts:
            optimizer.zero_grad()
            network((batch[0], batch[1])).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()


def gym(steps: int) -> None:
    """Train the same with EXO Gym's own trainer, a process a device."""
    from exogym.strategy import FedAvgStrategy, OptimSpec  # type: ignore[import-not-found]
    from exogym.trainer import Trainer  # type: ignore[import-not-found]

    run = run_of(steps)
    batches = build_batches(run, load_data(run), torch.device("cpu"))
    pairs = [batches.batch(step, range(1)) for step in range(64)]
    data = torch.utils.data.TensorDataset(*(torch.cat([pair[i] for pair in pairs]) for i in (0, 1)))
    strategy = FedAvgStrategy(optim_spec=OptimSpec(torch.optim.AdamW, lr=1e-3), H=10, max_norm=1.0)
    Trainer(Loss(build_model(run)), data, data).fit(
        num_epochs=10**6, max_steps=steps, strategy=strategy, num_nodes=DEVICES, device="cpu", batch_size=BATCH,
        minibatch_size=BATCH, val_size=BATCH, val_interval=steps, run_name="bench",
    )  # fmt: skip


def timed(commands: list[list[str]], **environment: str) -> tuple[float, float]:
    """Run commands beside each other; returns seconds by the clock, and of the processor."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    variables = {**os.environ, "LTE_CALIBRATE": "0", **environment}
    with tempfile.TemporaryFile() as said, tempfile.TemporaryDirectory() as logs:  # EXO Gym logs where it is started
        running = [subprocess.Popen(c, env=variables, cwd=logs, stdout=said, stderr=said) for c in commands]
        codes = [process.wait() for process in running]
        if any(codes):
            said.seek(0)
            sys.exit(said.read().decode(errors="replace"))
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Run all in turns, and print each time with its ratio to the round's floor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gym", type=Path, help="folder of a checkout of exo-explore/gym")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part == "gym":
        gym(arguments.steps)
    elif arguments.part:
        first, last = map(int, arguments.part.split("-"))
        plain_loop(arguments.steps, range(first, last))
    else:
        in_turns(arguments.steps, arguments.rounds, arguments.gym)


def in_turns(steps: int, rounds: int, checkout: Path | None) -> None:
    """Run all commands in turns, and print each one's seconds and the medians of the ratios."""
    own = [sys.executable, str(Path(__file__).resolve()), "--steps", str(steps), "--part"]
    cores = min(DEVICES, usable_cores())
    shares = [f"{a}-{b}" for a, b in pairwise(DEVICES * core // cores for core in range(cores + 1))]
    path = os.pathsep.join([*([str(checkout.resolve())] if checkout else []), os.environ.get("PYTHONPATH", "")])
    ratios: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "run.toml").write_text(RUN.replace("STEPS", str(steps)))
        for number in range(rounds):
            train = [sys.executable, "-m", "ltecli", "train", str(folder / "run.toml"), "--device", "cpu", "--out"]
            commands = {
                "plain loops": [[*own, share] for share in shares],
                "lte train --processes 1": [[*train, str(folder / f"one{number}"), "--processes", "1"]],
                "lte train": [[*train, str(folder / f"picked{number}")]],
                **({"EXO Gym": [[*own, "gym"]]} if checkout else {}),
            }
            floor = None
            for title, command in commands.items():
                # A thread a process for EXO Gym, whose processes would each take all cores.
                threads = {"OMP_NUM_THREADS": "1"} if title == "EXO Gym" else {}
                wall, processor = timed(command, PYTHONPATH=path, **threads)
                floor = floor or (wall, processor)
                over = wall / floor[0], processor / floor[1]
                ratios.setdefault(title, []).append(over)
                print(f"{title:24} {wall:7.1f} s, processor {processor:7.1f} s, over the floor {over[0]:.2f} and "
                      f"{over[1]:.2f}", flush=True)  # fmt: skip
    for title, both in ratios.items():
        wall, processor = (statistics.median(values) for values in zip(*both, strict=True))
        print(f"median {title:24} {wall:.2f} by the clock, {processor:.2f} of the processor")


if __name__ == "__main__":
    main()
