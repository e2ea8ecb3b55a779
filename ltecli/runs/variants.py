"""Turn lists of values into runs: every combination of the lists, with every seed, each a run with a readable name.

Keys of run.toml may hold commas themselves (arrays, tables, paths), so how a list is split must be one rule, told in
docs/sweeps.md. Combinations that run.toml's rules refuse are found before anything starts. `lte sweep` expands the
lists of its --set, and `lte compare` those of each method. Torch-free.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from simulate.common import toml_io
from simulate.common.errors import InputError
from simulate.config.run import Run

Build = Callable[[Sequence[str]], Run]
"""Function that makes a run of assignments, table.key=value each; it raises InputError."""
SEED = "train.seed"
CLOSING = {"[": "]", "{": "}"}
NAME_CHARACTERS = 100
"""Longest name of a run folder; file systems allow 255 bytes."""
REFUSALS_TOLD = 5
"""Refused combinations that an error names; the rest is counted."""


@dataclass(frozen=True)
class Variant:
    """One run among several."""

    name: str
    """Name of its folder."""
    settings: Mapping[str, str]
    """Values that differ between the runs, by key; without the seed."""
    run: Run


@dataclass(frozen=True)
class Refusal:
    """A combination that cannot be trained, and why."""

    name: str
    reason: str


def split_list(assignment: str) -> tuple[str, list[str]]:
    """Return the key of table.key=a,b,c and its values.

    Commas separate values, except within brackets, braces and quotes. Raises InputError for an empty value, a value
    given twice, and brackets or quotes that are not closed.
    """
    key, _, text = assignment.partition("=")
    values = list(_split(text, assignment))
    if len(values) > 1 and "" in values:
        raise InputError(f"--set {assignment}: a value between two commas is empty; remove a comma")
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise InputError(f"--set {assignment}: {twice} is given {values.count(twice)} times; keep one")
    return key.strip(), values


def _split(text: str, assignment: str) -> Iterator[str]:
    value, quote = "", ""
    closing: list[str] = []
    for index, character in enumerate(text):
        if quote:
            # In a basic string of TOML a backslash escapes the quote; in a literal one it is itself.
            escaped = quote == '"' and (index - len(text[:index].rstrip("\\"))) % 2 == 1
            if character == quote and not escaped:
                quote = ""
        elif character in "\"'" and (closing or not value.strip()):  # an apostrophe within a word opens nothing
            quote = character
        elif character in CLOSING and (closing or not value.strip()):
            closing.append(CLOSING[character])
        elif closing and character == closing[-1]:
            closing.pop()
        elif character == "," and not closing:
            yield value.strip()
            value = ""
            continue
        value += character
    if quote or closing:
        raise InputError(f"--set {assignment}: {quote or closing[-1]} is missing at the end; add it")
    yield value.strip()


def read_lists(assignments: Sequence[str]) -> dict[str, list[str]]:
    """Return the values of each key, in the order given; raises InputError for a key that is given twice."""
    lists: dict[str, list[str]] = {}
    for assignment in assignments:
        if "=" not in assignment:
            toml_io.set_key({}, assignment)  # which raises
        key, values = split_list(assignment)
        if key in lists:
            both = ",".join([*lists[key], *values])
            raise InputError(f"--set {key} is given twice; keep one, or try both values: --set {key}={both}")
        lists[key] = values
    return lists


def expand(
    build: Build, lists: Mapping[str, Sequence[str]], seeds: int, check: Callable[[Run], None],
    also: Mapping[str, str] | None = None,
) -> tuple[list[Variant], list[Refusal]]:  # fmt: skip
    """Return a run for each combination and seed, and the combinations that are refused.

    Values are taken in their order, the first key's change last. `seeds` counts up from the seed of the run. `also` are
    settings that tell these runs from others, as their method. Raises InputError for two lists of seeds.
    """
    varied = [key for key, values in lists.items() if len(values) > 1]
    if SEED in varied and seeds > 1:
        raise InputError(f"--seeds {seeds} and --set {SEED} both say which seeds; keep one")
    combinations = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    told = short_keys([*(also or {}), *varied])
    variants, refused = [], []
    for values in combinations:
        settings = {**(also or {}), **{key: values[key] for key in varied if key != SEED}}
        assignments = [f"{key}={value}" for key, value in values.items()]
        try:
            first = build(assignments)
            check(first)
        except InputError as error:
            refused.append(Refusal(_text(settings, told) or "the run", error.lines[0]))
            continue
        for seed in range(first.train.seed, first.train.seed + seeds):
            run = first if seed == first.train.seed else build([*assignments, f"{SEED}={seed}"])
            variants.append(Variant(_name(settings, told, seed), settings, run))
    return _with_own_names(variants), refused


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Return what keys are called in names and tables: their last part, or all of it where two keys share that.

    `model.name` and `method.name` are called by their table.
    """
    short = {key: key.removesuffix(".name").rpartition(".")[2] for key in keys}
    names = list(short.values())
    return {key: name if names.count(name) == 1 else key for key, name in short.items()}


def refuse(refused: Sequence[Refusal], has_others: bool) -> None:
    """Raise InputError that names the refused combinations, if there are any."""
    if not refused:
        return
    reasons = {refusal.reason for refusal in refused}
    # A mistake that all combinations share is none of theirs.
    if not has_others and len(reasons) == 1:
        raise InputError(*reasons)
    lines = [f"{refusal.name}: {refusal.reason}" for refusal in refused[:REFUSALS_TOLD]]
    more = len(refused) - len(lines)
    rest = f" (and {more} more combinations)" if more else ""
    move = f"; --skip-refused leaves {'it' if len(refused) == 1 else 'them'} out" if has_others else ""
    raise InputError(*lines[:-1], lines[-1] + rest + move)


def _text(settings: Mapping[str, str], told: Mapping[str, str]) -> str:
    return ",".join(f"{told[key]}={value}" for key, value in settings.items())


def _name(settings: Mapping[str, str], told: Mapping[str, str], seed: int) -> str:
    """Return the name of a run's folder, of characters that every file system has."""
    name = _text({key: re.sub(r"[^\w.+-]+", "-", value).strip("-") for key, value in settings.items()}, told)
    name = f"{name},seed={seed}" if name else f"seed={seed}"
    if len(name) <= NAME_CHARACTERS:
        return name
    end = f"-{hashlib.sha256(name.encode()).hexdigest()[:8]},seed={seed}"
    return name[: NAME_CHARACTERS - len(end)] + end


def _with_own_names(variants: Sequence[Variant]) -> list[Variant]:
    """Return the variants with names that differ, also on file systems that fold upper and lower case."""
    taken: dict[str, int] = {}
    named = []
    for variant in variants:
        folded = variant.name.casefold()
        taken[folded] = count = taken.get(folded, 0) + 1
        name = variant.name if count == 1 else f"{variant.name}-{count}"
        named.append(Variant(name, variant.settings, variant.run))
    return named
