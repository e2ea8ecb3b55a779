"""Does LTE train as well as dense, and beside what? A campaign whose results are kept line by line.

    python bench/studies/convergence.py run --data tinyshakespeare.txt --results docs/convergence.jsonl --jobs 2
    python bench/studies/convergence.py table --results docs/convergence.jsonl
    python bench/studies/convergence.py noise --data tinyshakespeare.txt --results docs/convergence.jsonl

`run` does what is still missing, the most telling first, and can be stopped at any time: every method at each learning
rate with seed 0 (and beyond them, where the first or the last is the best), its best rate with two more seeds, and then
with more samples than dense training had, until its validation loss is as low as dense's. `table` prints what there is
as Markdown, `curves.py` draws it. `noise` trains dense and LTE once more, at their best rates, and prints the gradient
noise scale along the way.

Plans rank methods by time to equal loss, so they need each method's samples: samples.py fits its model to these
results, and docs/results.md shows them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from campaign import run_missing

SEEDS = (0, 1, 2)
FACTORS = (1.2, 1.4, 1.7, 2.0)
"""Multiples of dense's samples, tried in this order until its loss is reached."""
BATCHES: dict[str, dict[str, Any]] = {
    "small": {"micro_batch": 8, "steps": 400, "warmup": 0.05},
    "large": {"micro_batch": 32, "steps": 100, "warmup": 0.1},
}
"""Windows of 64 tokens for each of 4 devices: 2,048 and 8,192 tokens a step, 0.8 million in all."""
RATES = {"small": (3e-3, 4.5e-3, 6.5e-3, 9e-3), "large": (1e-3, 2e-3, 4e-3, 8e-3)}
LOW_RATES = {"small": (1e-4, 2e-4, 4e-4, 8e-4), "large": (2e-4, 4e-4, 8e-4, 1.6e-3)}
"""For signs, in which every element of a gradient is as large as any other."""
MOST_RATES = 8
"""Where the lowest or the highest rate is the best, its half or its double is tried too, until so many were."""
DEVICES, MERGE_EVERY, EVALUATED = 4, 10, 512
STAGES = ("rates", "seeds", "factors")
DENSE = "dense"
METHODS: dict[str, dict[str, Any]] = {
    DENSE: {"name": "ddp"},
    "lte, frozen A, muon": {"name": "lte", "draws": "own", "optimizer": "muon"},
    "lte": {"name": "lte", "draws": "own", "reset": "none"},
    "dense, muon": {"name": "ddp", "optimizer": "muon"},
    "lte, muon": {"name": "lte", "draws": "own", "reset": "none", "optimizer": "muon"},
    "local-sgd": {"name": "local-sgd"},
    "diloco": {"name": "diloco"},
    "sparseloco": {"name": "sparseloco"},
    "lte, rank 64, frozen A, muon": {"name": "lte", "draws": "own", "optimizer": "muon", "rank": 64},
    "lte, frozen joint A, muon": {"name": "lte", "draws": "joint", "optimizer": "muon"},
    "lte, frozen joint A": {"name": "lte", "draws": "joint"},
    "lte, reset b": {"name": "lte", "draws": "own", "frozen_a": False},
    "lte, frozen A": {"name": "lte", "draws": "own"},
    "mhlora": {"name": "mhlora"},
    "powersgd": {"name": "powersgd"},
    "topk": {"name": "topk", "density": 0.01},
    "signsgd": {"name": "signsgd"},
    "dense, int8": {"name": "ddp", "wire": "int8"},
    "lte, int8, frozen A, muon": {"name": "lte", "draws": "own", "optimizer": "muon", "wire": "int8"},
    "lte, int8, frozen joint A, muon": {"name": "lte", "draws": "joint", "optimizer": "muon", "wire": "int8"},
    "lte, int8, rank 64, frozen joint A, muon": {
        "name": "lte", "draws": "joint", "optimizer": "muon", "wire": "int8", "rank": 64,
    },
    "lte, int8, frozen joint A": {"name": "lte", "draws": "joint", "wire": "int8"},
    "local-sgd, int8, muon": {"name": "local-sgd", "optimizer": "muon", "wire": "int8"},
    "local-sgd, moments": {"name": "local-sgd", "merge_optimizer": "average"},
    "lora, rank 128": {"name": "lora", "rank": 128},
    "relora, rank 128": {"name": "relora", "rank": 128, "merge_every": 50},
    "adamix, rank 128": {"name": "adamix", "rank": 128},
    "sapipe": {"name": "sapipe"},
    "daso": {"name": "daso"},
    "lte, rank 8": {"name": "lte", "draws": "own", "reset": "none", "rank": 8},
    "lte, rank 16": {"name": "lte", "draws": "own", "reset": "none", "rank": 16},
    "lte, rank 64": {"name": "lte", "draws": "own", "reset": "none", "rank": 64},
}  # fmt: skip
"""Rank 32 x 4 heads is the network's width; T = 10 unless a method has its own."""


@dataclass(frozen=True)
class Job:
    """One training run; all fields make its identity."""

    batch: str
    method: str
    rate: float
    seed: int = 0
    factor: float = 1.0
    """Samples over those of dense training."""


def run_of(job: Job, data: str) -> dict[str, Any]:
    """Return the run's table."""
    method = dict(METHODS[job.method])
    train = {"optimizer": method.pop("optimizer", "adamw")}
    sizes = BATCHES[job.batch]
    steps = MERGE_EVERY * round(sizes["steps"] * job.factor / MERGE_EVERY)
    train.update(
        steps=steps,
        micro_batch=sizes["micro_batch"],
        learning_rate=job.rate,
        warmup_steps=round(steps * sizes["warmup"]),
        evaluate_every=max(MERGE_EVERY, steps // 10),
        evaluate_samples=EVALUATED,
        checkpoint_every=steps,
        log_every=steps,
        seed=job.seed,
    )
    return {
        "model": {"context": 64},
        "data": {"path": data},
        "method": method,
        "train": train,
        "cluster": {"devices": DEVICES},
    }


def result_of(job: Job, data: str) -> dict[str, Any]:
    """Train, and return the job with its losses; val_loss is None for a run that diverged."""
    import torch
    from training import train_table

    torch.set_num_threads(1)
    started = time.monotonic()
    trained = train_table(run_of(job, data))
    return {
        **asdict(job),
        "val_loss": trained.val_loss,
        "sent_bytes": trained.sent_bytes_per_device,
        "curve": trained.curve,
        "s": time.monotonic() - started,
    }


class Results:
    """Everything that was measured so far, by job."""

    def __init__(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.rows = [json.loads(line) for line in lines if line]
        fields = Job.__dataclass_fields__
        self.by_job = {Job(**{key: row[key] for key in fields}): row for row in self.rows}

    def loss(self, job: Job) -> float | None:
        """Return a job's loss; infinite where it diverged, None where it was not run."""
        row = self.by_job.get(job)
        # A diverged run is worse than any other, so its rate is never the best.
        return None if row is None else math.inf if row["val_loss"] is None else row["val_loss"]

    def rates(self, batch: str, method: str) -> tuple[dict[float, float], float | None]:
        """Return the losses by learning rate, and the rate to try next, None once the best lies between others."""
        rates_to_try = (LOW_RATES if method == "signsgd" else RATES)[batch]
        known: dict[float, float] = {}
        while True:
            for rate in rates_to_try:
                loss = self.loss(Job(batch, method, rate))
                if loss is None:
                    return known, rate
                known[rate] = loss
            best = min(known, key=lambda rate: known[rate])
            # The best rate must lie between two others, or a better one may lie outside.
            outside = best / 2 if best == min(known) else best * 2 if best == max(known) else None
            if outside is None or len(known) >= MOST_RATES:
                return known, None
            rates_to_try = (outside,)

    def best_rate(self, batch: str, method: str) -> float | None:
        """Return the learning rate of the lowest loss, once all were tried."""
        known, untried = self.rates(batch, method)
        return min(known, key=lambda rate: known[rate]) if untried is None else None

    def seeds(self, batch: str, method: str, factor: float = 1.0) -> list[float]:
        """Return the losses at the best rate, one a seed."""
        rate = self.best_rate(batch, method)
        losses = [self.loss(Job(batch, method, rate, seed, factor)) for seed in SEEDS] if rate else []
        return [loss for loss in losses if loss is not None]

    def samples_ratio(self, batch: str, method: str) -> float | None:
        """Return the multiple of dense's samples at which a method has dense's mean loss, between runs linearly."""
        goal, points = self.seeds(batch, DENSE), []
        for factor in (1.0, *FACTORS):
            losses = self.seeds(batch, method, factor)
            if losses:
                points.append((factor, statistics.mean(losses)))
        if not goal or not points:
            return None
        target = statistics.mean(goal)
        for index, (factor, loss) in enumerate(points):
            if loss <= target:
                if index == 0:
                    return factor
                before, above = points[index - 1]
                return before + (factor - before) * (above - target) / (above - loss)
        return None


def missing(results: Results, methods: list[str], batches: list[str], stages: Sequence[str] = STAGES) -> Iterator[Job]:
    """Yield the jobs to do next, the most telling first; what depends on others appears when these are known."""
    for stage in stages:
        for method in methods:
            for batch in batches:
                yield from (job for job in _stage(stage, results, batch, method) if results.loss(job) is None)


def _stage(stage: str, results: Results, batch: str, method: str) -> Iterator[Job]:
    rate = results.best_rate(batch, method)
    if stage == "rates":
        _, untried = results.rates(batch, method)
        if untried is not None:
            yield Job(batch, method, untried)
    elif rate is None:
        return
    elif stage == "seeds":
        yield from (Job(batch, method, rate, seed) for seed in SEEDS)
    else:
        goal = results.seeds(batch, DENSE)
        for factor, before in zip(FACTORS, (1.0, *FACTORS), strict=False):
            loss = results.loss(Job(batch, method, rate, 0, before))
            # More samples are tried only while fewer do not suffice.
            if not goal or loss is None or loss <= goal[0]:
                return
            yield Job(batch, method, rate, 0, factor)


def campaign(arguments: argparse.Namespace) -> None:
    """Run what is missing, `jobs` at a time, and append each result as it comes."""

    def waiting() -> Iterator[Job]:
        return missing(Results(arguments.results), arguments.methods, arguments.batches, arguments.stages)

    run_missing(waiting, partial(result_of, data=arguments.data), arguments.results, arguments.jobs, arguments.minutes)


def table(results: Results) -> Iterator[str]:
    """Yield Markdown lines: a table a batch, and the curves' points are in the results themselves."""
    for batch, sizes in BATCHES.items():
        tokens = sizes["micro_batch"] * DEVICES * 64
        yield f"\n{batch} batch: {tokens:,} tokens a step, {sizes['steps']} steps\n"
        yield "| method | best rate | validation loss | seeds | samples to dense's loss | sent a device |"
        yield "|---|---|---|---|---|---|"
        for method in METHODS:
            losses, rate = results.seeds(batch, method), results.best_rate(batch, method)
            if not losses or rate is None:
                continue
            spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
            ratio = results.samples_ratio(batch, method)
            tried = max(f for f in (1.0, *FACTORS) if results.seeds(batch, method, f))
            samples = f"above {tried:g}x" if ratio is None else "at most 1x" if ratio == 1 else f"{ratio:.2f}x"
            sent = results.by_job[Job(batch, method, rate)]["sent_bytes"]
            yield (
                f"| {method} | {rate:g} | {statistics.mean(losses):.4f}{spread} | {len(losses)} | {samples} | "
                f"{sent / 1e6:,.0f} MB |"
            )


def noise(arguments: argparse.Namespace) -> None:
    """Print the gradient noise scale at tenths of training, beside the tokens of a step."""
    import torch
    from training import train_table

    torch.set_num_threads(1)
    results, rows = Results(arguments.results), {}
    for batch, method in itertools.product(arguments.batches, arguments.methods):
        rate = results.best_rate(batch, method)
        if rate is None:
            raise SystemExit(f"{method}, {batch} batch: not all rates are run; `run` first")
        table = run_of(Job(batch, method, rate), arguments.data)
        table["train"]["diagnostics_every"] = table["train"]["evaluate_every"]
        rows[batch, method] = [point.get("noise_scale_tokens") for point in train_table(table).diagnostics]
    shares = range(1, max(map(len, rows.values())) + 1)
    print("| batch | method | tokens a step | " + " | ".join(f"{share}/{len(shares)}" for share in shares) + " |")
    print("|---|---|---|" + "---|" * len(shares))
    for (batch, method), scales in rows.items():
        cells = " | ".join("unknown" if scale is None else f"{scale:,.0f}" for scale in scales)
        print(f"| {batch} | {method} | {BATCHES[batch]['micro_batch'] * DEVICES * 64:,} | {cells} |")


def main() -> None:
    """Parse, then run or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "table", "noise"))
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--data", help="UTF-8 text file, for run and noise")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--batches", nargs="+", default=list(BATCHES), choices=list(BATCHES))
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES, help="of what is missing")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start nothing new after that")
    arguments = parser.parse_args()
    if arguments.verb == "run":
        campaign(arguments)
    elif arguments.verb == "noise":
        noise(arguments)
    else:
        for line in table(Results(arguments.results)):
            print(line)


if __name__ == "__main__":
    main()
