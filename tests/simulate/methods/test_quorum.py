"""Merges without some devices: against slow twins, by hand, and as they were where nobody is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from simulate.common.errors import InputError
from simulate.common.events import Event
from simulate.config.run import Run, build_run
from simulate.methods.quorum import Quorum
from simulate.methods.registry import build_method
from tests import tiny
from tests.reference.quorum import (
    QuorumDilocoTwin,
    QuorumLocalSgdTwin,
    QuorumLteFrozenATwin,
    QuorumLteTwin,
)
from tests.selection import others_slow
from tests.simulate.methods import adapter_parity, parity
from tests.simulate.methods.parity import hand_run, of_linear, set_copies

# Late by one merge and by two, lost and back, late at the end; the third never has a whole round.
ROWS = ((5, 5, 2), (5, 0, 1), (3, 4, 0), (5, 5, 0), (5, -1, 3), (4, -1, 5), (5, 5, 0))
NINE = ((9, 9, 4, 2), (9, 0, 5, -1), (9, 7, 0, 3), (9, 0, 0, 9), (9, 0, 6, 9), (0, 8, 9, 0))


def with_merges(run: Run, rows: Any, **cluster: Any) -> Run:
    """Return the run with given merges."""
    table = run.model_dump(exclude_none=True)
    table["cluster"].update(merges_given=rows, **cluster)
    return build_run(table)


def dense(name: str, shards: tuple[float, ...] | None = None, p: float = 0.5, **method: Any) -> Run:
    return with_merges(parity.parity_run(name, shards=shards, merge_every=5, **method), ROWS, age_exponent=p)


def lte(**method: Any) -> Run:
    method = {"merge_every": 9, "reset": "b", "norms": "average", **method}
    return with_merges(adapter_parity.parity_run("lte, paced", devices=4, **plain(method)), NINE)


def plain(method: dict[str, Any]) -> dict[str, Any]:
    return {"pace": "lockstep", "steps_taken": None, **method}


DENSE: dict[str, tuple[Any, Run]] = {
    "local sgd": (QuorumLocalSgdTwin, dense("local-sgd")),
    "shards, no discount": (QuorumLocalSgdTwin, dense("local-sgd", shards=(1.0, 2.0, 3.0), p=0.0)),
    "served": (QuorumLocalSgdTwin, dense("local-sgd", merge_transport="server")),
    "reset": (QuorumLocalSgdTwin, dense("local-sgd, reset")),
    "diloco": (QuorumDilocoTwin, dense("diloco", fragments=1)),
}
LTE: dict[str, tuple[Any, Run]] = {
    "gathered": (QuorumLteTwin, lte()),
    "two heads, redrawn": (QuorumLteTwin, lte(reset="ab", heads_per_device=2)),
    "reduced": (QuorumLteTwin, lte(merge_transport="reduce")),
    "frozen a, served": (QuorumLteFrozenATwin, lte(frozen_a=True, merge_transport="server")),
    "frozen a, gathered": (QuorumLteFrozenATwin, lte(frozen_a=True)),
}


@pytest.mark.parametrize("name", others_slow(DENSE, ["served", "diloco"]))
def test_every_dense_method_trains_like_the_twin(name: str) -> None:
    parity.assert_trains_like(*DENSE[name])


@pytest.mark.parametrize("name", others_slow(LTE, ["two heads, redrawn", "frozen a, served"]))
def test_lte_trains_like_the_twin(name: str) -> None:
    adapter_parity.assert_trains_like(*LTE[name])
