"""Part e: what torch's collectives do between two ranks on one GPU, and launched runs beside their simulation.

NCCL refuses two ranks on one GPU, and gloo some collectives of GPU tensors: a refusal is a result here, not a failure.

    python -m bench.gpu.launched RANK FILE BACKEND DEVICE    one rank of the first kind of row
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from simulate.common.errors import first_line

Table = dict[str, Any]
RANKS, NUMBERS = 2, 1000
PAIR_LIMIT_S = 100
STEPS = 20
BOUND = 1e-3
"""Relative difference of a step's loss from the simulation's, in fp32; as in bench/gpu/losses.py."""
OPERATIONS: dict[str, Callable[[torch.Tensor], object]] = {
    "all_reduce": lambda x: dist.all_reduce(x),
    "all_gather": lambda x: dist.all_gather([torch.empty_like(x) for _ in range(RANKS)], x),
    "broadcast": lambda x: dist.broadcast(x, 0),
    "all_to_all": lambda x: dist.all_to_all_single(torch.empty_like(x), x),
    "send and receive": lambda x: dist.send(x, 1) if dist.get_rank() == 0 else dist.recv(x, 0),
}


def measure(given: Table, device: torch.device, folder: Path) -> Table:
    """Return what each collective did, or how a launched run's losses differ from its simulation's."""
    if given.get("alone"):
        return _pair(given["backend"], device)
    return _launch(given, device, folder)


def _pair(backend: str, device: torch.device) -> Table:
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "bench.gpu.launched"]
        ranks = [
            subprocess.Popen(
                [*words, str(rank), f"{folder}/store", backend, device.type], stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True,
            )
            for rank in range(RANKS)
        ]  # fmt: skip
        try:
            said = [rank.communicate(timeout=PAIR_LIMIT_S) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    lines = [line for line in said[0][0].splitlines() if line.startswith("{")]
    if not lines:
        words = said[0][1].strip().splitlines()
        raise RuntimeError(f"rank 0 ended with {ranks[0].returncode}: {words[-1] if words else 'it said nothing'}")
    return {"outcome": "; ".join(f"{name} {what}" for name, what in json.loads(lines[-1]).items())}


def main() -> None:
    """Try the collectives as one rank, and print what each one did."""
    rank, file, backend, device = int(sys.argv[1]), *sys.argv[2:]
    found: Table = {}
    dist.init_process_group(
        backend, init_method=f"file://{file}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=20)
    )
    for name, operation in OPERATIONS.items():
        try:
            x = torch.ones(NUMBERS, device=device)
            operation(x)
            found[name] = f"ok, {float(x.sum()):g}"  # a GPU's errors come when its work is waited for
        except Exception as error:
            found[name] = f"refused: {first_line(error)}"
        print(json.dumps(found), flush=True)
        if found[name].startswith("refused") and backend == "nccl":
            break  # NCCL's communicator is lost with the first error
    # No farewell: a group that refused may hang in it.


def _launch(given: Table, device: torch.device, folder: Path) -> Table:
    """Return the worst difference of a step's loss between a launched run and its simulation on the same device."""
    from simulate.common.events import read_events

    where = folder / f"launch-{given['backend']}-{given['processes']}"
    where.mkdir(exist_ok=True)
    path = where / "run.toml"
    path.write_text(_run_toml(given), encoding="utf-8")
    losses = {}
    # The simulation first: where it fails, the launched run says nothing.
    for kind, words in {"simulated": [], "launched": ["--launch", "--processes", given["processes"]]}.items():
        out = where / kind
        with tempfile.TemporaryDirectory() as fresh:
            if out.exists():
                out.rename(Path(fresh) / kind)
        asked = subprocess.run(
            [sys.executable, "-m", "ltecli", "train", path, "--out", out, "--device", device.type, "--quiet",
             *map(str, words)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if asked.returncode != 0:
            lines = asked.stderr.strip().splitlines()
            refusal = f"exit {asked.returncode}: {lines[-1] if lines else 'it said nothing'}"
            if kind == "simulated":
                raise RuntimeError(refusal)
            return {"outcome": f"refused, {refusal}"}
        events = read_events(out / "events.jsonl")
        losses[kind] = [event["train_loss"] for event in events if event["kind"] == "step"]
    error = max(abs(a / b - 1) for a, b in zip(losses["launched"], losses["simulated"], strict=True))
    return {"outcome": "trained", "worst_error": error, "bound": BOUND, "within": error <= BOUND}


def _run_toml(given: Table) -> str:
    from simulate.common import toml_io

    return toml_io.dump(
        {
            "model": {"name": "gpt", **given["model"]}, "method": {"name": "lte", "rank": 4, "merge_every": 5},
            "train": {"steps": STEPS, "micro_batch": 2, "evaluate_every": 10, "evaluate_samples": 4},
            "cluster": {"devices": RANKS, "backend": given["backend"]},
        }
    )  # fmt: skip


if __name__ == "__main__":
    main()
