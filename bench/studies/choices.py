"""Which settings should be LTE's defaults? Runs named by what they set, whose results are kept line by line.

    python bench/studies/choices.py run --studies bits --text tinyshakespeare.txt --results runs/choices.jsonl
    python bench/studies/choices.py table --studies bits --results docs/choices.jsonl

A study is a list of settings, each with a data set and seeds; `run` does what of it is missing and can be stopped at
any time. Text is convergence.py's small batch, images are vision.py's networks, "demo" is the run of `make demo`. A
setting is the method's name and its keys, as `lte optimizer=muon rank=64 wire=int4 learning_rate=0.0065`; keys that no
method has belong to [train].
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import convergence
import vision
from campaign import run_missing

from simulate.config.method_options import DEFAULT_SCALE

THREE = (0, 1, 2)
EIGHT = tuple(range(8))
TRAIN_KEYS = (
    "optimizer", "learning_rate", "schedule", "final_share", "decay_share", "adam_beta1", "adam_beta2", "steps",
    "micro_batch", "weight_decay", "muon_momentum", "warmup_share",
    "apollo_rank", "apollo_scale", "apollo_refresh_every",
)  # fmt: skip
LTE, LTE_MUON = "lte learning_rate=0.0065", "lte optimizer=muon learning_rate=0.0065"
LOCAL, LOCAL_MUON = "local-sgd learning_rate=0.0045", "local-sgd optimizer=muon learning_rate=0.009"
DENSE, DENSE_MUON = "ddp learning_rate=0.0045", "ddp optimizer=muon learning_rate=0.009"
"""Best rates of convergence.py's small batch."""


@dataclass(frozen=True)
class Job:
    """One training run; all fields make its identity."""

    data: str
    setting: str
    seed: int = 0


def _jobs(data: str, settings: Sequence[str], seeds: Sequence[int] = (0,)) -> list[Job]:
    # Every setting runs once before one runs twice.
    return [Job(data, setting, seed) for seed in seeds for setting in settings]


def _bits() -> list[Job]:
    """Fewer bits and more rank, or fewer merges, at one data set."""
    lte = LTE_MUON + " draws=joint"
    return _jobs(
        "text",
        [
            f"{lte} rank=128 wire=int2",
            f"{LOCAL_MUON} wire=int2",
            f"{lte} rank=64 wire=int2",
            f"{lte} rank=128 wire=int2 merge_every=20",
            f"{lte} rank=128 wire=int4",
            f"{LOCAL_MUON} wire=int2 merge_every=20",
            f"{lte} rank=64 wire=int4",
            f"{LOCAL_MUON} wire=int4",
            f"{lte} rank=128 wire=int4 merge_every=20",
            f"{LOCAL_MUON} wire=int4 merge_every=20",
            f"{lte} rank=64 wire=int4 merge_every=20",
        ],
    )


def _schedules() -> list[Job]:
    """Where the cosine ends, of LTE, local SGD and dense training."""
    bases = (f"{LTE_MUON} draws=joint wire=int8", LTE, DENSE_MUON, DENSE, f"{LOCAL_MUON} wire=int4")
    return _jobs("text", [f"{base} final_share={share}" for base in bases for share in (0.3, 0.1, 0.0)], THREE)


def _draws() -> list[Job]:
    """How A is drawn, of both optimizers."""
    bases = (f"{LTE_MUON} wire=int8", LTE)
    drawn = ("slices", "own", "joint", "columns")
    return _jobs("text", [f"{base} draws={draws}" for base in bases for draws in drawn], THREE)


def _digits(network: str) -> list[Job]:
    """Ends of the cosine and formats on images, with eight seeds, since they are quick and differ much."""
    muon = "lte optimizer=muon learning_rate=0.0025"
    adamw = "lte learning_rate=0.005"
    ends = [f"{base} draws=joint final_share={share}" for base in (muon, adamw) for share in (0.0, 0.3, 0.6)]
    dense = [
        f"{base} final_share={share}"
        for base in ("ddp optimizer=muon learning_rate=0.01", "ddp learning_rate=0.003")
        for share in (0.0, 0.1, 0.3)
    ]
    wires = [f"{muon} draws=joint wire={wire}" for wire in ("int8", "int4", "int2")]
    return _jobs(network, [*ends, *dense, *wires], EIGHT)


def _digits_draws(network: str) -> list[Job]:
    """How A is drawn, of both optimizers, on images."""
    bases = ("lte optimizer=muon learning_rate=0.0025", "lte learning_rate=0.0025")
    drawn = ("own", "slices", "columns", "joint")
    return _jobs(network, [f"{base} draws={draws}" for base in bases for draws in drawn], EIGHT)


def _digits_rates(network: str) -> list[Job]:
    """Rates of LTE on images, by optimizer and draws."""
    rates = {" optimizer=muon": (1.25e-3, 2.5e-3, 5e-3, 1e-2), "": (1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2)}
    settings = [f"lte{optimizer} learning_rate={rate} draws=joint" for optimizer in rates for rate in rates[optimizer]]
    return _jobs(network, settings, THREE)


def _apollo() -> list[Job]:
    """Dense training on images with the small state of APOLLO, and with AdamW, each at several rates."""
    adamw = [f"ddp learning_rate={rate}" for rate in (0.0015, 0.003, 0.006)]
    rates = (0.0015, 0.003, 0.006, 0.012)
    apollo = [f"ddp optimizer=apollo learning_rate={rate}{rank}" for rank in ("", " apollo_rank=1") for rate in rates]
    return _jobs("digits-vit", [*adamw, *apollo], THREE)


def _gap() -> list[Job]:
    """Dense training, heads that meet at every step, and LTE that merges at each and each tenth: rank, noise, drift."""
    heads = [f"{name} {keys}" for keys in ("rank=32", "rank=64", "rank=128") for name in ("T=1", "T=10", "mhlora")]
    settings = [DENSE_MUON, DENSE]
    for optimizer in (" optimizer=muon", ""):
        for head in heads:
            method, rank = head.split()
            name = "mhlora" if method == "mhlora" else "lte"
            merged = "" if method == "mhlora" else f" draws=joint merge_every={method.removeprefix('T=')}"
            settings.append(f"{name}{optimizer} learning_rate=0.0065 {rank}{merged}")
    return _jobs("text", settings)


def _demo() -> list[Job]:
    """Settings that could be the demo's: equal tokens, and time that is near today's."""
    muon = "lte optimizer=muon wire=int8"
    return _jobs(
        "demo",
        [
            "lte learning_rate=0.003",
            f"{muon} draws=joint learning_rate=0.0045",
            f"{muon} draws=joint learning_rate=0.0045 rank=64",
            f"{muon} draws=joint learning_rate=0.0065 rank=64 micro_batch=2 steps=390",
            f"{muon} draws=joint learning_rate=0.0045 rank=48",
            f"{muon} draws=joint learning_rate=0.006 rank=64 steps=600",
            f"{muon} draws=columns learning_rate=0.0065 rank=64 micro_batch=2 steps=391",
            f"{muon} draws=columns learning_rate=0.0045 rank=64",
            f"{muon} draws=joint learning_rate=0.003 rank=64",
            f"{muon} draws=joint learning_rate=0.0045 rank=64 final_share=0.3",
            f"{muon} draws=joint learning_rate=0.0045 rank=64 wire=int4",
            f"{muon} draws=joint learning_rate=0.0065 rank=64",
            f"{muon} draws=joint learning_rate=0.0045 rank=128",
            "ddp optimizer=muon learning_rate=0.0045",
        ],
    )


def _plans() -> list[Job]:
    """Runs behind what plans propose: dense training in int8, and LTE on images at its own rates."""
    muon = [
        f"lte optimizer=muon draws=own learning_rate={rate} "
        f"adapter_learning_rate={rate / DEFAULT_SCALE * vision.MUON_FACTOR}"
        for rate in (2.5e-3, 4.5e-3, 1e-2)
    ]
    ends = [f"{muon[0]}{keys}" for keys in (" wire=int8", " wire=int8 final_share=0.3", " final_share=0.3")]
    adamw = f"lte draws=own learning_rate=0.003 adapter_learning_rate={3e-3 / DEFAULT_SCALE}"
    dense_muon = [f"ddp optimizer=muon learning_rate={keys}" for keys in ("0.0045", "0.009", "0.009 wire=int8")]
    images = _jobs("digits-vit", [*muon, adamw, *dense_muon, "ddp learning_rate=0.003", *ends], THREE)
    return [*_jobs("text", [f"{DENSE_MUON} wire=int8"]), *images]


STUDIES: dict[str, Callable[[], list[Job]]] = {
    "demo": _demo,
    "bits": _bits,
    "schedules": _schedules,
    "draws": _draws,
    "digits-vit-draws": partial(_digits_draws, "digits-vit"),
    "digits-mixer-draws": partial(_digits_draws, "digits-mixer"),
    "digits-vit": partial(_digits, "digits-vit"),
    "digits-mixer": partial(_digits, "digits-mixer"),
    "digits-vit-rates": partial(_digits_rates, "digits-vit"),
    "digits-mixer-rates": partial(_digits_rates, "digits-mixer"),
    "apollo": _apollo,
    "gap": _gap,
    "plans": _plans,
}


def run_of(job: Job, text: str | None) -> dict[str, Any]:
    """Return the run's table."""
    name, *pairs = job.setting.split()
    given = {key: _value(value) for key, value in (pair.split("=", 1) for pair in pairs)}
    train = {key: value for key, value in given.items() if key in TRAIN_KEYS}
    method = {"name": name} | {key: value for key, value in given.items() if key not in TRAIN_KEYS}
    base = _base(job, text, train["learning_rate"])
    if job.data.startswith("digits") and name == "lte":
        method = _image_adapters(job, method, train)
    merged = {**base["train"], **train, "seed": job.seed}
    # Where fewer steps are asked for, what counts in steps comes at the same shares of them.
    for key in ("evaluate_every", "warmup_steps", "checkpoint_every", "log_every"):
        merged[key] = max(round(base["train"][key] * merged["steps"] / base["train"]["steps"]), 1)
    return {**base, "method": method, "train": merged}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _base(job: Job, text: str | None, rate: float) -> dict[str, Any]:
    """Return the table that a setting changes."""
    if job.data == "text":
        if text is None:
            raise SystemExit("text needs --text")
        return convergence.run_of(convergence.Job("small", convergence.DENSE, rate), text)
    if job.data == "demo":
        sizes = {"steps": 782, "micro_batch": 1, "warmup_steps": 39, "evaluate_every": 78, "evaluate_samples": 64}
        train = {**sizes, "checkpoint_every": 782, "log_every": 782}
        return {"data": {}, "model": {"context": 128}, "train": train, "cluster": {"devices": 4}}
    network = job.data.removeprefix("digits-")
    samples = vision.TASKS["digits"].samples
    return vision.run_of(vision.Job("digits", network, vision.DENSE, rate, samples), None)


def _image_adapters(job: Job, method: dict[str, Any], train: dict[str, Any]) -> dict[str, Any]:
    """Return LTE's keys with vision.py's rank and its factor of the adapters' rate, where they are not given."""
    factor = vision.ADAPTER_GAIN * (vision.MUON_FACTOR if train.get("optimizer") == "muon" else 1.0)
    rank = vision.TASKS["digits"].ranks[job.data.removeprefix("digits-")]
    return {"rank": rank, "adapter_learning_rate": train["learning_rate"] / DEFAULT_SCALE * factor, **method}


def result_of(job: Job, text: str | None) -> dict[str, Any]:
    """Train, and return the job with its losses, None for a run that diverged, and its processor seconds."""
    import torch
    from training import train_table

    torch.set_num_threads(1)
    started_s = time.process_time()
    trained = train_table(run_of(job, text))
    return {
        **asdict(job),
        "val_loss": trained.val_loss,
        "val_accuracy": trained.val_accuracy,
        "sent_bytes": trained.sent_bytes_per_device,
        "curve": trained.curve,
        "processor_s": round(time.process_time() - started_s, 1),
    }


def read(results: Path) -> dict[Job, dict[str, Any]]:
    """Return the rows that are there, by job."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    rows = [json.loads(line) for line in lines if line]
    return {Job(row["data"], row["setting"], row["seed"]): row for row in rows}


def jobs_of(studies: Sequence[str]) -> list[Job]:
    """Return the studies' jobs, each once, in their order."""
    return list(dict.fromkeys(job for study in studies for job in STUDIES[study]()))


def table(rows: dict[Job, dict[str, Any]], studies: Sequence[str]) -> Iterator[str]:
    """Yield Markdown lines, a setting each."""
    by_setting: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for job in jobs_of(studies):
        if job in rows:
            by_setting.setdefault((job.data, job.setting), []).append(rows[job])
    yield "| data | setting | validation loss by seed | mean | sent a device | processor time |"
    yield "|---|---|---|---|---|---|"
    for (data, setting), found in by_setting.items():
        losses = [row["val_loss"] if row["val_loss"] is not None else math.inf for row in found]
        deviation = f" ± {statistics.stdev(losses) / math.sqrt(len(losses)):.4f}" if len(losses) > 1 else ""
        seconds = statistics.mean(row["processor_s"] for row in found)
        yield (
            f"| {data} | `{setting}` | {', '.join(f'{loss:.4f}' for loss in losses)} | "
            f"{statistics.mean(losses):.4f}{deviation} | {found[0]['sent_bytes'] / 1e6:,.1f} MB | {seconds:.0f} s |"
        )


def main() -> None:
    """Parse the options, then run what is missing or print what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "table"))
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--text", help="UTF-8 text file, for the studies on text")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start nothing new after that")
    arguments = parser.parse_args()
    if arguments.verb == "table":
        print("\n".join(table(read(arguments.results), arguments.studies)))
        return

    def waiting() -> Iterator[Job]:
        done = read(arguments.results)
        return (job for job in jobs_of(arguments.studies) if job not in done)

    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    work = partial(result_of, text=arguments.text)
    run_missing(waiting, work, arguments.results, arguments.jobs, arguments.minutes)


if __name__ == "__main__":
    main()
