"""Part `runs`: losses, counted bytes and simulated seconds of all methods over 24 steps, by `lte train`.

On the processor that recorded, losses are held to the bit. On others, runs in fp64 are held to FP64; to DRAWS where the
processor draws other numbers (without AVX2), so that start weights differ in fp32's last bits, and for signsgd, which
sends signs of gradients that are nothing but rounding. Runs in fp32 depend on the order of sums: on other processors
they are held to FP32, under autocast to AUTOCAST.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import tomli_w

from tests.frozen.command import PROSE, lte, scratch_folder
from tests.frozen.compare import differences, processor

Table = dict[str, Any]
STEPS = 24
FP64, DRAWS, FP32, AUTOCAST, SPECTRA = 1e-12, 1e-4, 1e-3, 5e-2, 1e-6
"""Relative tolerances on other processors; SPECTRA: of diagnostics, which divide by small numbers."""
GPT = {"name": "gpt", "layers": 2, "width": 16, "attention_heads": 2, "context": 8, "vocab": 256}
LLAMA = {**GPT, "name": "llama", "mlp_width": 24}
IMAGES = {"image": 8, "colours": 1, "classes": 10}
VIT = {"name": "vit", "layers": 2, "width": 16, "attention_heads": 2, "patch": 4, **IMAGES}
MIXER = {"name": "mixer_s16", "layers": 2, "width": 16, "tokens_width": 8, "channels_width": 32, "patch": 4, **IMAGES}
CONVOLUTIONAL = {"name": "tests.frozen.networks:Convolutional", **IMAGES}
LINEAR_TOO = {"name": "tests.frozen.networks:ConvolutionalAndLinear", **IMAGES}
WIDE = {**GPT, "layers": 1, "width": 64}
"""Of quantised runs: all sides of frozen matrices are multiples of 64."""
LTE = {"name": "lte", "rank": 2, "alpha": 4.0, "merge_every": 4}
PAPER = {**LTE, "reset": "none", "frozen_a": False}
LORA = {"name": "lora", "rank": 2, "alpha": 4.0}
RELORA = {"name": "relora", "rank": 2, "alpha": 4.0, "merge_every": 7, "rewarm_steps": 3, "prune_share": 0.5}
MHLORA = {"name": "mhlora", "rank": 2, "alpha": 4.0, "heads_per_device": 2}
LOCAL = {"name": "local-sgd", "merge_every": 4}
DILOCO = {"name": "diloco", "merge_every": 4}
MOVED = {"name": "local-sgd", "merge_every": 4, "merge_transport": "server", "merge_optimizer": "reset"}
PACED = {"pace": "deadline", "steps_taken": [[4, 2, 1, 3], [2, 1, 3, 1]]}
SINGLE = {"dtype": "fp32"}


def run(method: Table, model: Table = GPT, train: Table | None = None, data: Table | None = None) -> Table:
    """Return a tiny run of four devices as run.toml has it."""
    sees = {"name": "digits"} if "image" in model else {"path": PROSE}
    sizes = {"steps": STEPS, "micro_batch": 2, "evaluate_every": 8, "evaluate_samples": 4, "checkpoint_every": 100}
    return {
        "model": model,
        "data": data or sees,
        "method": method,
        "train": {"dtype": "fp64", "warmup_steps": 2, "weight_decay": 0.1, **sizes, **(train or {})},
        "cluster": {"profile": "rtx3060_x4_home", "devices": 4},
    }


RUNS: dict[str, Table] = {
    "lte": run(LTE),
    "lte paper": run(PAPER),
    "lte reset ab": run({**PAPER, "reset": "ab", "heads_per_device": 2, "merge_optimizer": "prune"}),
    "lte nf4": run({**PAPER, "quantize": "nf4", "reset": "ab"}, WIDE),
    "lte nf4-double reduce": run({**LTE, "quantize": "nf4-double", "merge_transport": "reduce"}, WIDE),
    "lte int8 master server": run({**LTE, "quantize": "int8", "merge_transport": "server", "master": "server"}, WIDE),
    "lte bf16 no master": run({**LTE, "quantize": "bf16", "master": "none"}, WIDE),
    "lte wire int8": run({**PAPER, "wire": "int8"}),
    "lte wire int4 reduce": run({**PAPER, "wire": "int4", "merge_transport": "reduce"}),
    "lte wire bf16 server": run({**LTE, "wire": "bf16", "merge_transport": "server"}),
    "lte auto": run({**PAPER, "merge_transport": "auto"}),
    "lte joint draws": run({**LTE, "draws": "joint", "reset": "ab", "rank": 6}),
    "lte fragments delay": run({**LTE, "fragments": 2, "merge_delay": 1, "wire": "int8"}),
    "lte paper delay": run({**PAPER, "merge_delay": 2}),
    "lte paced": run({**LTE, **PACED}),
    "lte muon": run({**LTE, "frozen_a": False}, train={"optimizer": "muon"}),
    "lte vector norms": run({**LTE, "norms": "vector-lora", "biases": "frozen"}),
    "lte norms one": run({**PAPER, "norms": "one"}),
    "lte vit": run(LTE, VIT),
    "lte mixer": run({**PAPER, "heads_per_device": 2}, MIXER),
    "lte llama": run(LTE, LLAMA, {"activation_checkpointing": True}),
    "lte convolutions": run(PAPER, CONVOLUTIONAL),
    "lte convolutions averaged": run({**LTE, "convolutions": "average"}, LINEAR_TOO),
    "lte diagnostics": run({**LTE, "frozen_a": False}, train={"diagnostics_every": 8}),
    "lte fp32": run(LTE, train=SINGLE),
    "lte 8 bit": run(LTE, WIDE, {**SINGLE, "optimizer_state": "8bit"}),
    "lte fp16": run(LTE, train={**SINGLE, "autocast": "fp16"}),
    "lte bf16": run(LTE, train={**SINGLE, "autocast": "bf16"}),
    "ddp": run({"name": "ddp"}),
    "ddp int8": run({"name": "ddp", "wire": "int8"}),
    "ddp muon": run({"name": "ddp"}, train={"optimizer": "muon"}),
    "ddp fp16 8 bit": run({"name": "ddp"}, WIDE, {**SINGLE, "autocast": "fp16", "optimizer_state": "8bit"}),
    "ddp vit augmented": run(
        {"name": "ddp"}, VIT, data={"name": "digits", "augment": ["crop", "flip"], "mixup": 0.2, "skew": 0.5}
    ),
    "ddp shards bpe": run({"name": "ddp"}, {**GPT, "vocab": 300}, data={
        "path": PROSE, "tokenizer": "bpe:280", "shards": [1.0, 2.0, 3.0, 4.0],
    }),
    "lora": run(LORA),
    "relora": run(RELORA),
    "relora warm start int8": run({**RELORA, "warm_start_steps": 5, "quantize": "int8"}, WIDE),
    "mhlora": run(MHLORA),
    "local-sgd": run(LOCAL),
    "local-sgd moments": run({**LOCAL, "merge_optimizer": "average"}),
    "local-sgd int4": run({**LOCAL, "wire": "int4"}),
    "local-sgd delay": run({**LOCAL, "merge_delay": 2}),
    "local-sgd paced": run({**LOCAL, **PACED}),
    "fedavg": run({**MOVED, "participation": 0.5}),
    "diloco": run(DILOCO),
    "diloco fragments delay": run({**DILOCO, "fragments": 2, "merge_delay": 1, "wire": "int8"}),
    "sparseloco": run({"name": "sparseloco", "merge_every": 4, "density": 0.1}),
    "daso": run({"name": "daso", "merge_every": 4, "delay_steps": 2}),
    "sapipe": run({"name": "sapipe"}),
    "sapipe delay": run({"name": "sapipe", "compensation": "delay"}),
    "adamix": run({"name": "adamix", "rank": 2, "alpha": 4.0, "experts": 3}),
    "powersgd": run({"name": "powersgd", "rank": 2}),
    "topk": run({"name": "topk", "density": 0.1}),
    "signsgd": run({"name": "signsgd"}),
}  # fmt: skip
COUNTED = ("step", "samples", "tokens", "sent_bytes", "received_bytes")
CLOCKED = ("learning_rate", "simulated_s", "simulated_exchange_s")
REPORTED = ("memory_bytes", "sent_bytes_per_device", "wall_s", "step_s", "dense")
MEASURED = ("measured", "wire")
"""Figures of a report that differ from one training to the next, or are of launched runs only."""


def record(pool: Executor) -> dict[str, Any]:
    """Train everything, and return what is kept of it."""
    runs = dict(zip(RUNS, pool.map(train, RUNS.values()), strict=True))
    return {"processor": processor(), "runs": runs}


def check(recorded: dict[str, Any], pool: Executor) -> list[str]:
    """Train everything again, and return the differences."""
    here, there = processor(), recorded["processor"]
    found = []
    for name, now in zip(RUNS, pool.map(train, RUNS.values()), strict=True):
        if name not in recorded["runs"]:
            found.append(f"{name}: is not recorded")
            continue
        tolerance = 0.0 if here == there else tolerance_of(RUNS[name], here["draws"] == there["draws"])
        then = recorded["runs"][name]
        if tolerance and RUNS[name]["model"] in (CONVOLUTIONAL, LINEAR_TOO):
            then, now = _without_memory(then), _without_memory(now)
        found += [f"{name}: {line}" for line in run_differences(then, now, tolerance)]
    return found


def tolerance_of(table: Table, same_draws: bool) -> float:
    """Return how far a run's losses may be from the recorded ones on another processor."""
    if table["train"].get("autocast", "none") != "none":
        return AUTOCAST
    if table["train"]["dtype"] == "fp32":
        return FP32
    return FP64 if same_draws and table["method"]["name"] != "signsgd" else DRAWS


def _without_memory(figures: Table) -> Table:
    """Leave out the planned memory of convolutions, whose buffers are those of the processor that traced them."""
    dense = {key: value for key, value in figures["report"]["dense"].items() if key != "memory_bytes"}
    report = {key: value for key, value in figures["report"].items() if key != "memory_bytes"}
    return {**figures, "report": {**report, "dense": dense}}


def run_differences(recorded: Table, now: Table, tolerance: float) -> Iterator[str]:
    """Yield where a run differs: counts not at all, clocks in the last bits, losses by the tolerance."""
    spectra = max(tolerance, SPECTRA) if tolerance else 0.0
    tolerances = {"counted": 0.0, "clocked": FP64, "report": FP64, "losses": tolerance, "diagnostics": spectra}
    for part, allowed in tolerances.items():
        yield from differences(recorded[part], now[part], allowed, part)


def train(table: Table) -> Table:
    """Train one run by the command line, and return its figures."""
    with scratch_folder() as folder:
        write_run(folder / "run.toml", table)
        lte("train", "run.toml", "--out", "out", "--device", "cpu", "--quiet")
        return {**figures(read_events(folder / "out")), "report": reported("out")}


def write_run(path: Path, table: Table) -> None:
    """Write run.toml."""
    path.write_text(tomli_w.dumps(table), encoding="utf-8")


def read_events(folder: Path) -> list[Table]:
    """Return everything that a run told."""
    return [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]


def figures(events: Sequence[Table]) -> Table:
    """Return everything that a repetition must give again, and no measured time."""
    steps, evaluations, rounds, diagnosed = (
        [event for event in events if event["kind"] == kind] for kind in ("step", "evaluate", "round", "diagnostics")
    )
    scores = [{key: e[key] for key in ("step", "val_loss", "val_accuracy") if key in e} for e in evaluations]
    return {
        "counted": {**{key: [e[key] for e in steps] for key in COUNTED}, "rounds": [e["steps_done"] for e in rounds]},
        "clocked": {key: [e[key] for e in steps] for key in CLOCKED},
        "losses": {
            "evaluate": scores,
            "train_loss": [e["train_loss"] for e in steps],
            "device_losses": [e["device_losses"] for e in steps],
        },
        "diagnostics": diagnosed,
    }


def reported(folder: str) -> Table:
    """Return the figures of `lte report` that were planned, counted or simulated."""
    report = lte("report", folder, "--json").json()
    kept = {key: report[key] for key in REPORTED}
    return {k: {n: v for n, v in f.items() if n not in MEASURED} if f else f for k, f in kept.items()}
