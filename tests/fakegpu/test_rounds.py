"""Whole runs on a device that is no CPU, without a GPU: every method and option in every world.

A tensor of the CPU that meets one of the device, or that is given to NCCL, is a red test. `make test` takes a sample in
which each method and every option is there, and each world and each choice of a run meets every other at least once;
`make test-all` takes all variants in all worlds.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations, product

import pytest

from simulate.common.errors import InputError
from tests import harness
from tests.fakegpu.device import NEEDS, can_register
from tests.selection import others_slow
from tests.tiny import VARIANTS, train_keys, variant_run

pytestmark = pytest.mark.skipif(not can_register(), reason=NEEDS)

FACTORS = (
    (("simulated",), ("first", "last")),
    (("",), ("llama", "vit")),
    (("",), ("bf16", "overflow")),
    (("",), ("8bit",)),
    (("",), ("recompute",)),
    (("",), ("diagnosed",)),
)
"""The world of a run, its model, autocast, moments, activations and diagnostics: by default, or in a turn of others."""
ALONE = ["streams/lte/", "probe/lte/", *(f"memory/{name}/" for name in ("ddp", "lte, late", "lte, nf4"))]
OTHERS = ["first/lte/sick", "last/local-sgd, late/sick", "last/local-sgd, paced/clock", "simulated/lte/fp16"]
BROKEN = {
    "simulated/lte/adrift": "Expected all tensors to be on the same device",
    "first/lte, int8/astray": "a group of nccl was given a tensor of cpu",
    "first/lte, served bf16/hasty": "a message was not waited for",
}
"""Cases with a fault that is put in on purpose, and what tells of it."""


Pair = tuple[int, str | bool, int, str | bool]
METHOD, WORLD = -1, 0
"""The method's place in a pair, and that of its world, which is its only partner."""


def pairs_of(method: str, choice: Sequence[bool]) -> set[Pair]:
    """Return what meets in a run of a method: two of its choices, or the method and its world."""
    factors = {(i, choice[i], j, choice[j]) for i, j in combinations(range(len(choice)), 2)}
    return {*factors, (METHOD, method, WORLD, choice[WORLD])}


def options_of(variant: str) -> set[tuple[str, str]]:
    """Return a variant's method and options; of numbers only that they are set: no device depends on how many."""
    settings = {**VARIANTS[variant], **train_keys(variant)}
    return {(key, str(value) if isinstance(value, str | bool) else "a number") for key, value in settings.items()}


@cache
def covering() -> list[str]:
    """Return variants with all methods and options: those first that bring most, without the ones not needed then."""
    missing, taken = set[tuple[str, str]]().union(*map(options_of, VARIANTS)), []
    while missing:
        taken.append(max(VARIANTS, key=lambda name: len(options_of(name) & missing)))
        missing -= options_of(taken[-1])
    return [name for name in VARIANTS if name in taken]


def chosen() -> Iterator[tuple[str, tuple[bool, ...]]]:
    """Yield variants, each with the fewest choices that bring most pairs that none has brought, in turns of worlds."""
    choices = list(product((False, True), repeat=len(FACTORS)))
    missing = {
        pair for choice in choices for variant in covering() for pair in pairs_of(variant_method(variant), choice)
    }
    launched = True
    for variant in covering():
        new = {
            choice: len(pairs_of(variant_method(variant), choice) & missing)
            for choice in choices
            if fits(variant, "+".join(("8bit",) * choice[3] + ("diagnosed",) * choice[5]))
        }
        choice = max(new, key=lambda c: (new[c], -sum(c[1:]), c[WORLD] != launched))
        launched = choice[WORLD]
        missing -= pairs_of(variant_method(variant), choice)
        yield variant, choice


def variant_method(variant: str) -> str:
    """Return the name of a variant's method."""
    return str(VARIANTS[variant]["name"])


@cache
def fits(variant: str, options: str) -> bool:
    """Whether a variant can be run so: some have no use for moments of 8 bits, or no lone devices to compare."""
    keys = {"optimizer_state": "8bit" if "8bit" in options else "fp32"}
    diagnosed = {"diagnostics_every": 4} if "diagnosed" in options else {}
    try:
        variant_run(variant, train={"dtype": "fp32", **keys, **diagnosed})
    except InputError:
        return False
    return True


def sample() -> Iterator[str]:
    """Yield the cases of what is chosen; where a factor is no default, the others take turns."""
    counts = Counter[int]()
    for variant, choice in chosen():
        taken = []
        for i, (is_other, (default, others)) in enumerate(zip(choice, FACTORS, strict=True)):
            taken.append(others[counts[i] % len(others)] if is_other else default[0])
            counts[i] += is_other
        yield f"{taken[0]}/{variant}/{'+'.join(filter(None, taken[1:]))}"


QUICK = [*sample(), *ALONE, *OTHERS]
TURNS = ("", "diagnosed+sick", "bf16+8bit+llama+recompute")
GRID = [
    f"{world}/{variant}/{TURNS[(i + j) % len(TURNS)]}"
    for i, variant in enumerate(VARIANTS)
    for j, world in enumerate(("simulated", "first", "last"))
    if fits(variant, TURNS[(i + j) % len(TURNS)])
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


def test_in_the_sample_each_choice_meets_every_other() -> None:
    seen = set[Pair]().union(*(pairs_of(variant_method(variant), choice) for variant, choice in chosen()))
    factors = len(FACTORS)
    assert len([pair for pair in seen if pair[0] != METHOD]) == 4 * factors * (factors - 1) // 2
    assert {pair[1] for pair in seen if pair[0] == METHOD} == {variant_method(variant) for variant in VARIANTS}
    assert set().union(*map(options_of, covering())) == set().union(*map(options_of, VARIANTS))
    cases = list(sample())
    assert all(any(value in case for case in cases) for factor in FACTORS for kind in factor for value in kind)
