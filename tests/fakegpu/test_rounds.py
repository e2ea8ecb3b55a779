"""Whole runs on a device that is no CPU, without a GPU: every method and option in every world.

A tensor of the CPU that meets one of the device, or that is given to NCCL, is a red test. `make test` takes a sample in
which each method, each world and each choice of a run meets every other at least once, and every setting of a method's
options is there; `make test-all` takes all variants in all worlds.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import combinations, product

import pytest

from tests import harness
from tests.fakegpu.device import NEEDS, can_register
from tests.selection import others_slow, selected
from tests.tiny import VARIANTS

pytestmark = pytest.mark.skipif(not can_register(), reason=NEEDS)

FACTORS = (
    ("simulated", "first", "last"),
    ("", "llama", "vit"),
    ("", "bf16", "overflow"),
    ("", "8bit"),
    ("", "recompute"),
    ("", "diagnosed"),
)
"""The world of a run, its model, autocast, moments, activations and diagnostics."""
Choice = tuple[str, ...]
ALONE = ["streams/lte/", "probe/lte/", *(f"memory/{name}/" for name in ("ddp", "lte, late", "lte, nf4"))]
OTHERS = ["first/lte/sick", "last/local-sgd, late/sick", "last/local-sgd, paced/clock", "simulated/lte/fp16"]
BROKEN = {
    "simulated/lte/adrift": "Expected all tensors to be on the same device",
    "first/lte, int8/astray": "a group of nccl was given a tensor of cpu",
    "first/lte, served bf16/hasty": "a message was not waited for",
}
"""Cases with a fault that is put in on purpose, and what tells of it."""


def pairs_of(choice: Choice) -> set[tuple[int, str, int, str]]:
    return {(i, choice[i], j, choice[j]) for i, j in combinations(range(len(choice)), 2)}


def sample() -> Iterator[str]:
    """Yield variants, each with the choices that bring the most pairs that none has brought, until all are there."""
    methods = {name: VARIANTS[name]["name"] for name in selected("processes")}
    all_choices = list(product(*FACTORS))
    missing = {pair for name in methods.values() for choice in all_choices for pair in pairs_of((name, *choice))}
    turns, used = list(methods), Counter[str]()
    while turns or missing:
        variant = turns.pop(0) if turns else _variant_of(methods, min(missing))
        new = {choice: len(pairs_of((methods[variant], *choice)) & missing) for choice in all_choices}
        choice = max(all_choices, key=lambda c: (new[c], -sum(used[x] for x in c)))
        missing -= pairs_of((methods[variant], *choice))
        used.update(choice)
        yield f"{choice[0]}/{variant}/{'+'.join(filter(None, choice[1:]))}"


def _variant_of(methods: dict[str, str], pair: tuple[int, str, int, str]) -> str:
    return next(variant for variant, name in methods.items() if name == pair[1] or pair[0] > 0)


QUICK = [*sample(), *ALONE, *OTHERS]
GRID = [
    f"{world}/{variant}/{options}"
    for world in FACTORS[0]
    for variant in VARIANTS
    for options in ("", "diagnosed+sick", "bf16+8bit+llama+recompute")
]
ALL = list(dict.fromkeys([*QUICK, *GRID, *(f"memory/{variant}/" for variant in VARIANTS), "machine/lte/"]))


@cache
def results(are_quick: bool) -> dict[str, str | None]:
    """Return what each case left, None or a traceback; all run in one process, once a test asks for one of them."""
    cases = [*QUICK, *BROKEN] if are_quick else [case for case in ALL if case not in QUICK]
    outcome = harness.run([sys.executable, "-m", "tests.fakegpu.rounds", *cases], 7200, cwd=harness.ROOT)
    assert outcome.code == 0, outcome.stderr
    lines = [json.loads(line) for line in outcome.stdout.splitlines()]
    return {line["case"]: line["error"] for line in lines}


@pytest.mark.parametrize("case", others_slow(ALL, QUICK))
def test_a_run_keeps_to_its_device(case: str) -> None:
    error = results(case in QUICK)[case]
    assert error is None, error


@pytest.mark.parametrize("case", BROKEN)
def test_a_fault_is_noticed(case: str) -> None:
    assert BROKEN[case] in (results(True)[case] or "")


def test_the_sample_has_every_pair_of_choices() -> None:
    seen: set[tuple[int, str, int, str]] = set()
    for case in sample():
        world, variant, options = case.split("/")
        choice = [next((o for o in options.split("+") if o in factor and o), "") for factor in FACTORS[1:]]
        seen |= pairs_of((VARIANTS[variant]["name"], world, *choice))
    assert len(seen) == sum(
        len(one) * len(other) for one, other in combinations(({v["name"] for v in VARIANTS.values()}, *FACTORS), 2)
    )
