"""Which variants a property is tested on in `make test`: a covering selection; `make test-all` tests all of them.

A property takes the variants whose turn it is, and others until every method and every setting of an option was seen.
So each property sees all that is to be seen, each variant is seen by one property or more, and what is selected
changes with nothing but the list of variants.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from tests.tiny import VARIANTS, train_keys

TURNING = ("sent bytes", "checkpoint bytes", "autocast")
TURNS = 1
"""Of these properties, so many test a variant whatever its settings."""
DEAR = ("memory", "resume", "processes", "accumulate", "alike classes")
"""A variant takes them half a second and more: nobody has a turn."""
PROPERTIES = TURNING + DEAR


def settings_of(name: str) -> set[tuple[str, str]]:
    """Return a variant's method and options, each with its value."""
    return {(key, str(value)) for key, value in {**VARIANTS[name], **train_keys(name)}.items()}


def selected(property_: str, names: Iterable[str] = VARIANTS) -> list[str]:
    """Return the variants among `names` on which a property is tested in `make test`, in their order."""
    names, chosen = list(names), set[str]()
    if property_ in TURNING:
        its_turn = {(TURNING.index(property_) + later) % len(TURNING) for later in range(TURNS)}
        chosen = {name for index, name in enumerate(names) if index % len(TURNING) in its_turn}
    missing = set().union(*map(settings_of, names)) - set().union(*map(settings_of, chosen))
    while missing:  # the first of those that bring most
        best = max(names, key=lambda name: len(settings_of(name) & missing))
        chosen.add(best)
        missing -= settings_of(best)
    return [name for name in names if name in chosen]


def variants(property_: str, names: Iterable[str] = VARIANTS) -> list[Any]:
    """Return variants as parameters of a test; those that are not selected are slow."""
    names = list(names)
    return others_slow(names, selected(property_, names))


def others_slow(values: Iterable[Any], quick: Sequence[Any]) -> list[Any]:
    """Return values (tuples of them for several arguments) as parameters of a test; all but the quick ones are slow."""
    values = list(values)
    assert all(value in values for value in quick), quick
    return [value if value in quick else _slow(value) for value in values]


def _slow(value: Any) -> Any:
    arguments = value if isinstance(value, tuple) else (value,)
    return pytest.param(*arguments, marks=pytest.mark.slow)
