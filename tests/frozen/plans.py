"""Part `plans`: all figures of `lte plan --json` for hardware and networks of different kinds.

The choice and its dense twin are recorded in full. Of thousands of candidates there is a digest for each figure (over
all candidates) and a short one for each candidate (over all figures): together they name both. Sentences (notes,
warnings, reasons) are counted only, since words may change.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from typing import Any

from tests.frozen.command import lte, scratch_folder
from tests.frozen.compare import ABSENT, differences, flat

Row = dict[str, Any]
PROFILES = (
    "h200", "raspberry_x8", "rtx3060_x4_home", "mixed_gtx1080ti_rtx2060_rtx3090", "v100_x8", "jetson_orin_nano_x8_wifi",
)  # fmt: skip
MODELS = ("gpt2", "vit_s16", "mixer_b16", "llama_1b")
PLANS: dict[str, tuple[str, ...]] = {
    **{f"{profile} {model}": ("-p", profile, "-m", model) for model in MODELS for profile in PROFILES},
    "fewest bytes": ("-p", "rtx3060_x4_home", "-m", "gpt", "--objective", "bytes"),
    "diloco": ("-p", "t4_x4", "-m", "vit", "--method", "diloco", "--samples", "1000000"),
    "autocast": ("-p", "a100_x8_nvlink", "-m", "llama_60m", "--set", "train.autocast=bf16", "--set", "train.seed=3"),
}
LISTS = ("candidates", "rejected", "rivals")
FULL = ("chosen", "dense")
SENTENCES = ("notes", "warnings", "reason", "description")
NAMING = ("method", "rank", "heads_per_device", "quantize", "merge_every", "micro_batch", "merge_transport", "wire")
ROW_BYTES = 2
"""Of a candidate's digest: enough to find it, once a figure's own digest has shown that something differs."""
NOTHING_FEASIBLE = 3
SHOWN = 4


def record(pool: Executor) -> dict[str, Any]:
    """Plan everything, and return what is kept of it."""
    return {name: summary(plan) for name, plan in zip(PLANS, pool.map(make_plan, PLANS.values()), strict=True)}


def check(recorded: dict[str, Any], pool: Executor) -> list[str]:
    """Plan everything again, and return the differences."""
    plans = pool.map(compared, PLANS.values(), (recorded.get(name) for name in PLANS))
    return [f"{name}: {line}" for name, lines in zip(PLANS, plans, strict=True) for line in lines]


def compared(arguments: Sequence[str], recorded: dict[str, Any] | None) -> list[str]:
    """Make one plan, in a worker, and return its differences."""
    return ["is not recorded"] if recorded is None else list(plan_differences(recorded, make_plan(arguments)))


def make_plan(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the JSON of one plan; that nothing fits is a plan, too."""
    with scratch_folder():
        outcome = lte("plan", *arguments, "--json", expected=(0, NOTHING_FEASIBLE))
    return {**outcome.json(), "exit_code": outcome.code}


def without_sentences(value: Any) -> Any:
    """Return a document in which sentences are only counted."""
    if isinstance(value, dict):
        return {k: _count(inner) if k in SENTENCES else without_sentences(inner) for k, inner in value.items()}
    return [without_sentences(inner) for inner in value] if isinstance(value, list) else value


def _count(sentences: Any) -> int:
    return len(sentences) if isinstance(sentences, list) else int(sentences is not None)


def summary(plan: dict[str, Any]) -> dict[str, Any]:
    """Return what is recorded of a plan."""
    plan = without_sentences(plan)
    return {
        "full": {key: value for key, value in plan.items() if key not in LISTS},
        "lists": {name: digests(rows_of(plan[name])) for name in LISTS},
    }


def rows_of(entries: Sequence[dict[str, Any]]) -> list[Row]:
    """Return candidates as rows of figures by their dotted keys."""
    return [dict(flat(entry)) for entry in entries]


def digests(rows: Sequence[Row], columns: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the digests of rows, over the given columns, or else over all that any of them has."""
    if columns is None:
        columns = sorted({key for row in rows for key in row})
    packed = b"".join(_digest([row.get(key, ABSENT) for key in columns])[:ROW_BYTES] for row in rows)
    return {
        "columns": {key: _digest([row.get(key, ABSENT) for row in rows]).hex()[:12] for key in columns},
        "rows": base64.b64encode(packed).decode(),
    }


def _digest(values: Any) -> bytes:
    return hashlib.sha256(json.dumps(values).encode()).digest()


def plan_differences(recorded: dict[str, Any], plan: dict[str, Any]) -> Iterator[str]:
    """Yield where a plan differs from what was recorded: the choice figure by figure, the others by key and row."""
    plan = without_sentences(plan)
    yield from differences(recorded["full"], plan)
    for name in LISTS:
        yield from _list_differences(name, recorded["lists"][name], rows_of(plan.get(name) or []))


def _list_differences(name: str, recorded: dict[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    now = digests(rows, list(recorded["columns"]))
    before_rows, now_rows = (_split(base64.b64decode(each["rows"])) for each in (recorded, now))
    if len(before_rows) != len(now_rows):
        yield f"{name}: {len(before_rows)} were recorded, now {len(now_rows)}"
        return
    keys = [key for key, digest in recorded["columns"].items() if now["columns"][key] != digest]
    others = [i for i, (ours, theirs) in enumerate(zip(before_rows, now_rows, strict=True)) if ours != theirs]
    if keys:
        more = f" and {len(keys) - SHOWN} more keys" if len(keys) > SHOWN else ""
        first = f", first in {name}[{others[0]}] ({_name(rows[others[0]], keys[0])})" if others else ""
        yield f"{name}: {', '.join(keys[:SHOWN])}{more} differ in {len(others)} of {len(rows)}{first}"


def _split(packed: bytes) -> list[bytes]:
    return [packed[start : start + ROW_BYTES] for start in range(0, len(packed), ROW_BYTES)]


def _name(row: Row, key: str) -> str:
    """Return what a candidate is, and its figure now: a rejected one has its keys one table deeper."""
    prefix = "candidate." if "candidate.method" in row else ""
    words = [f"{name} {row[prefix + name]}" for name in NAMING if row.get(prefix + name) is not None]
    return f"{', '.join(words)}; {key} now {row.get(key, ABSENT)!r}"
