"""Does LTE learn images as well as dense training? A campaign whose results are kept line by line.

    python bench/studies/vision.py run --data digits
    python bench/studies/vision.py run --data cifar10 --path cifar10.zip --jobs 2
    python bench/studies/vision.py table

`run` does what is still missing and can be stopped at any time: every method at each learning rate on few samples, its
best rate with three seeds, and LTE with 1.4 times the samples. Then it writes the tables of docs/vision.md anew, as
`table` does without running anything. The paper trains image networks, so text alone would not test its claim.
"""

from __future__ import annotations

import argparse
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

from simulate.config.method_options import DEFAULT_SCALE

SEEDS = (0, 1, 2)
MUON_FACTOR = 3.0
"""Factor by which adapters learn faster with Muon where no rate is given (simulate.methods.lora.train)."""
MORE_SAMPLES = 1.4
"""Samples that LTE needs over dense training, as the paper has it (arXiv 2402.16828)."""
DEVICES, MICRO_BATCH, MERGE_EVERY = 8, 8, 10
DENSE, LTE, DENSE_MUON = "dense", "lte, frozen A, muon", "dense, muon"
METHODS: dict[str, dict[str, Any]] = {
    DENSE: {"name": "ddp"},
    LTE: {"name": "lte", "optimizer": "muon", "merge_every": MERGE_EVERY},
    DENSE_MUON: {"name": "ddp", "optimizer": "muon"},
}
"""LTE has one head on each of 8 devices, and the settings that trained best on text (docs/results.md)."""
ADAPTER_GAIN = 4.0
"""Multiple of the adapters' default rate: what a head learns in directions of its own is divided by 8 at a merge."""


@dataclass(frozen=True)
class Task:
    """A data set, its networks and how long one trains."""

    data: dict[str, Any]
    networks: dict[str, dict[str, Any]]
    ranks: dict[str, int]
    """Rank of a head, by network; no layer's smallest side may be smaller."""
    rates: dict[str, tuple[float, ...]]
    """Learning rates to choose from, by method."""
    tried_samples: int
    """Samples of the runs that choose a learning rate."""
    samples: int
    evaluated: int


def _networks(width: int, layers: int, **images: int) -> dict[str, dict[str, Any]]:
    transformer = {"name": "vit", "layers": layers, "width": width, "attention_heads": width // 32, **images}
    mixer = {"name": "mixer_s16", "layers": layers, "width": width, "tokens_width": width // 2, **images}
    return {"vit": transformer, "mixer": {**mixer, "channels_width": 4 * width}}


TASKS = {
    "digits": Task(
        data={"name": "digits"},
        networks=_networks(64, 2, image=8, patch=2, colours=1, classes=10),
        ranks={"vit": 32, "mixer": 16},
        rates={DENSE: (1.5e-3, 3e-3, 6e-3), LTE: (1.25e-3, 2.5e-3, 5e-3), DENSE_MUON: (2.5e-3, 5e-3, 1e-2)},
        tried_samples=8_000,
        samples=8_000,
        evaluated=180,
    ),
    "cifar10": Task(
        data={},
        networks=_networks(128, 6, image=32, patch=4, colours=3, classes=10),
        ranks={"vit": 32, "mixer": 32},
        rates={
            DENSE: (2.5e-4, 5e-4, 1e-3, 2e-3),
            LTE: (3e-4, 6e-4, 1.25e-3, 2.5e-3),
            DENSE_MUON: (1.25e-3, 2.5e-3, 5e-3, 1e-2),
        },
        tried_samples=12_800,
        samples=48_000,
        evaluated=5_000,
    ),
}


@dataclass(frozen=True)
class Job:
    """One training run; all fields make its identity."""

    data: str
    network: str
    method: str
    rate: float
    samples: int
    seed: int = 0


def run_of(job: Job, path: str | None) -> dict[str, Any]:
    """Return the run's table."""
    task, method = TASKS[job.data], dict(METHODS[job.method])
    optimizer = method.pop("optimizer", "adamw")
    if method["name"] == "lte":
        rank = task.ranks[job.network]
        method |= {"rank": rank, "adapter_learning_rate": job.rate / DEFAULT_SCALE * MUON_FACTOR * ADAPTER_GAIN}
    steps = MERGE_EVERY * round(job.samples / (DEVICES * MICRO_BATCH * MERGE_EVERY))
    return {
        "model": task.networks[job.network],
        "data": {**task.data, **({} if path is None else {"path": path})},
        "method": method,
        "train": {
            "optimizer": optimizer,
            "steps": steps,
            "micro_batch": MICRO_BATCH,
            "learning_rate": job.rate,
            "warmup_steps": steps // 20,
            "evaluate_every": steps,
            "evaluate_samples": task.evaluated,
            "checkpoint_every": steps,
            "log_every": steps,
            "seed": job.seed,
        },
        "cluster": {"devices": DEVICES},
    }


def result_of(job: Job, path: str | None) -> dict[str, Any]:
    """Train, and return the job with its scores, None for a run that diverged, and processor seconds."""
    import torch
    from training import train_table

    torch.set_num_threads(1)
    started_s = time.process_time()
    trained = train_table(run_of(job, path))
    scores = {"val_accuracy": trained.val_accuracy, "val_loss": trained.val_loss}
    sent = {"sent_bytes": trained.sent_bytes_per_device}
    return {**asdict(job), **scores, **sent, "processor_s": round(time.process_time() - started_s, 1)}


class Results:
    """Everything that was measured so far, by job."""

    def __init__(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines if line]
        self.by_job = {Job(**{key: row[key] for key in Job.__dataclass_fields__}): row for row in rows}

    def accuracy(self, job: Job) -> float | None:
        """Return a job's accuracy; 0 where it diverged, None where it was not run."""
        row = self.by_job.get(job)
        return None if row is None else row["val_accuracy"] or 0.0

    def tried(self, data: str, network: str, method: str) -> dict[float, float]:
        """Return the accuracies on few samples, by learning rate."""
        jobs = {rate: Job(data, network, method, rate, TASKS[data].tried_samples) for rate in TASKS[data].rates[method]}
        known = {rate: self.accuracy(job) for rate, job in jobs.items()}
        return {rate: accuracy for rate, accuracy in known.items() if accuracy is not None}

    def best_rate(self, data: str, network: str, method: str) -> float | None:
        """Return the learning rate of the highest accuracy, once all were tried."""
        tried = self.tried(data, network, method)
        return max(tried, key=lambda rate: tried[rate]) if len(tried) == len(TASKS[data].rates[method]) else None

    def seeds(self, data: str, network: str, method: str, samples: int) -> list[dict[str, Any]]:
        """Return the rows at the best rate, one a seed."""
        rate = self.best_rate(data, network, method)
        jobs = [Job(data, network, method, rate, samples, seed) for seed in SEEDS] if rate else []
        return [self.by_job[job] for job in jobs if job in self.by_job]


def lengths(data: str, method: str) -> tuple[int, ...]:
    """Return the samples that a method is trained on: dense training's, and for LTE more."""
    samples = TASKS[data].samples
    return (samples, round(samples * MORE_SAMPLES)) if method == LTE else (samples,)


def missing(
    results: Results, data: str, networks: Sequence[str], methods: Sequence[str], rates: Sequence[float] | None
) -> Iterator[Job]:
    """Yield the jobs to do next; what depends on others appears when these are known. With `rates`, only those."""
    task = TASKS[data]
    pairs = [(network, method) for network in networks for method in methods]
    tries = [
        Job(data, n, m, rate, task.tried_samples)
        for n, m in pairs
        for rate in task.rates[m]
        if rates is None or rate in rates
    ]
    yield from (job for job in tries if results.accuracy(job) is None)
    # Seeds are the outer loop: every method is run once before one is run twice.
    for seed in SEEDS if rates is None else ():
        for network, method in pairs:
            rate = results.best_rate(data, network, method)
            for samples in lengths(data, method) if rate is not None else ():
                job = Job(data, network, method, rate, samples, seed)  # type: ignore[arg-type]
                if results.accuracy(job) is None:
                    yield job


def table(results: Results) -> Iterator[str]:
    """Yield Markdown lines, a table for each network that has results; unfinished rows say what they are."""
    for data, task in TASKS.items():
        for network in task.networks:
            rows = [row for method in METHODS for row in _rows(results, data, network, method)]
            if rows:
                yield f"\n{data}, {network}:\n"
                yield "| method | samples | rate | accuracy | seeds | sent a device | processor time |"
                yield "|---|---|---|---|---|---|---|"
                yield from rows


def _rows(results: Results, data: str, network: str, method: str) -> Iterator[str]:
    rate = results.best_rate(data, network, method)
    if rate is None:
        for tried_rate in results.tried(data, network, method):
            job = Job(data, network, method, tried_rate, TASKS[data].tried_samples)
            yield _row(method, job.samples, tried_rate, [results.by_job[job]])
    for samples in lengths(data, method):
        rows = results.seeds(data, network, method, samples)
        if rows and rate is not None:
            yield _row(method, samples, rate, rows)


def _row(method: str, samples: int, rate: float, rows: Sequence[dict[str, Any]]) -> str:
    accuracies = [100 * (row["val_accuracy"] or 0.0) for row in rows]
    spread = f" ± {statistics.stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
    seconds = statistics.mean(row["processor_s"] for row in rows)
    return (
        f"| {method} | {samples:,} | {rate:g} | {statistics.mean(accuracies):.1f}{spread} % | {len(rows)} | "
        f"{rows[0]['sent_bytes'] / 1e6:,.1f} MB | {seconds:.0f} s |"
    )


BEGIN, END = "<!-- tables of bench/studies/vision.py -->", "<!-- end of the tables -->"


def write_document(path: Path, lines: Sequence[str]) -> None:
    """Put the tables between their marks."""
    # The text around the marks is written by hand and stays.
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(before + "\n".join([BEGIN, *lines, "", END]) + after, encoding="utf-8")


def main() -> None:
    """Parse the options, run what is missing, and print the tables."""
    docs = Path(__file__).parents[2] / "docs"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "table"))
    parser.add_argument("--data", default="digits", choices=list(TASKS))
    parser.add_argument("--path", help="where CIFAR-10 lies: a zip of class folders, or batches for Python")
    parser.add_argument("--results", type=Path, default=docs / "vision.jsonl", help="JSON lines, appended to")
    parser.add_argument("--document", type=Path, help="file to write tables into; docs/vision.md with its own results")
    parser.add_argument("--networks", nargs="+", default=["vit", "mixer"], choices=["vit", "mixer"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, help="only try these of a method's rates, on few samples")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start nothing new after that")
    arguments = parser.parse_args()
    if arguments.data == "cifar10" and arguments.path is None and arguments.verb == "run":
        parser.error("--data cifar10 needs --path")
    if arguments.verb == "run":
        chosen = (arguments.data, arguments.networks, arguments.methods, arguments.rates)
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        run_missing(
            lambda: missing(Results(arguments.results), *chosen),
            partial(result_of, path=arguments.path),
            arguments.results,
            arguments.jobs,
            arguments.minutes,
        )
    lines = list(table(Results(arguments.results)))
    print("\n".join(lines))
    published = arguments.results == docs / "vision.jsonl"
    if arguments.document or published:
        write_document(arguments.document or docs / "vision.md", lines)


if __name__ == "__main__":
    main()
