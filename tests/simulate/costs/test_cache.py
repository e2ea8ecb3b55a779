"""What is remembered of one run is not taken for another's, whatever of method, formats, devices or hosts differs."""

from __future__ import annotations

from typing import Any

import pytest

from simulate.config.run import Run
from simulate.costs import cache as remember
from simulate.costs import memory
from simulate.costs.message_schedule import schedule
from tests import tiny

BASE = tiny.lte_run(train={"dtype": "fp32"})


def with_train(**keys: Any) -> Run:
    return tiny.lte_run(train={"dtype": "fp32", **keys})


OTHERS = {
    "method": tiny.lte_run(train={"dtype": "fp32"}, reset="b"),
    "model": tiny.lte_run(model={"width": 32}, train={"dtype": "fp32"}),
    "dtype": with_train(dtype="fp64"),
    "optimizer": with_train(optimizer="muon"),
    "apollo_rank": tiny.variant_run("ddp, apollo", train={"dtype": "fp32", "apollo_rank": 3}),
    "diagnostics_every": with_train(diagnostics_every=5),
    "optimizer_state": tiny.lte_run(model={"width": 128}, train={"dtype": "fp32", "optimizer_state": "8bit"}, rank=64),
}


def lasting(run: Run, shared_memory: bool = False) -> object:
    return memory._lasting(run, run.model.shape(), shared_memory)


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_worked_out_anew(name: str) -> None:
    other = OTHERS[name]
    if name == "apollo_rank":
        base = other.model_copy(update={"train": other.train.model_copy(update={"apollo_rank": None})})
    elif name == "optimizer_state":
        base = other.model_copy(update={"train": other.train.model_copy(update={"optimizer_state": "fp32"})})
    elif name in ("method", "model"):
        base = BASE
    else:  # the same method, as a plan's candidates share it
        base, other = BASE, other.model_copy(update={"method": BASE.method})
    before = lasting(base)
    direct = memory._lasting.__wrapped__(other, other.model.shape(), False)  # type: ignore[attr-defined]
    assert lasting(other) == direct != before


def test_the_same_method_on_more_devices_is_worked_out_anew() -> None:
    more = tiny.lte_run(devices=3, train={"dtype": "fp32"}).model_copy(update={"method": BASE.method})
    before = schedule(BASE, BASE.model.shape())
    direct = schedule.__wrapped__(more, more.model.shape())  # type: ignore[attr-defined]
    assert schedule(more, more.model.shape()) == direct != before


def test_a_host_without_memory_of_its_own_is_worked_out_anew() -> None:
    assert lasting(BASE, shared_memory=False) != lasting(BASE, shared_memory=True)


def test_a_figure_is_worked_out_once_until_it_is_forgotten() -> None:
    asked = []
    figure = remember.by_method(lambda run, shape: asked.append(run))
    for _ in range(3):
        figure(BASE, BASE.model.shape())
    assert len(asked) == 1
    remember.forget()
    figure(BASE, BASE.model.shape())
    assert len(asked) == 2


def test_named_arguments_count_as_well() -> None:
    shape = BASE.model.shape()
    apart, together = (memory._lasting(BASE, shape, shared_memory=shared) for shared in (False, True))
    assert apart == lasting(BASE) != together
