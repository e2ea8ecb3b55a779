"""What a plan proposes where the user leaves it open: pins win, and its figures are those that were measured."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ltecli.plan_request import PlanArgs, plan_request
from simulate.config.run import Run, build_run
from simulate.config.tables import Train
from simulate.costs.samples import samples_factor, shipped
from simulate.planning.best_known import FINAL_SHARE, KNOWN, OPTIMIZER, learning_rate, rate_of
from simulate.planning.candidate import candidate_of
from simulate.planning.explain import explain
from simulate.planning.planner import Plan
from tests.harness import ROOT

FEW = ("model.layers=2", "train.micro_batch=4")


def planned(*assignments: str, objective: str = "time", **pins: Any) -> Plan:
    given = {
        "rank": 8,
        "merge_every": 10,
        "merge_transport": "gather",
        "heads_per_device": 1,
        "quantize": "none",
        **pins,
    }
    pins = {key: value for key, value in given.items() if value is not None}
    request = PlanArgs("rtx3060_x4_home", "gpt", assignments=(*FEW, *assignments), pins=pins, objective=objective)
    return plan_request(request, to_train=False)


def chosen(*assignments: str, objective: str = "time", **pins: Any) -> Run:
    plan = planned(*assignments, objective=objective, **pins)
    assert plan.chosen is not None
    return plan.chosen.run


def keys(run: Run) -> tuple[str, str, float, float]:
    return run.train.optimizer, getattr(run.method, "wire", "-"), run.train.final_share, run.train.learning_rate


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ((), ("muon", "int8", 0.3, 4.5e-3)),
        (("train.optimizer=adamw",), ("adamw", "int8", 0.3, 3e-3)),
        (("train.optimizer=muon", "method.wire=full"), ("muon", "full", 0.3, 4.5e-3)),
        (("train.learning_rate=0.001", "train.final_share=0.1"), ("muon", "int8", 0.1, 1e-3)),
        (("train.optimizer_state=8bit", "train.schedule=wsd"), ("adamw", "int8", 0.1, 3e-3)),
        (("method.reset=ab",), ("adamw", "int8", 0.3, 3e-3)),
        (("cluster.quorum=3",), ("muon", "int8", 0.3, 4.5e-3)),
    ],
)
def test_what_is_left_open_is_taken_and_what_is_given_stays(given: tuple[str, ...], taken: tuple[Any, ...]) -> None:
    run = chosen(*given)
    assert keys(run) == taken
    # Asked for, or since homes are far apart; A drawn anew takes every device at each merge.
    quorum = None if "method.reset=ab" in given else 3
    assert build_run(run.model_dump(exclude_none=True)).cluster.quorum == quorum


def test_messages_stay_full_where_memory_is_minimised() -> None:
    assert keys(chosen(objective="memory"))[:2] == ("muon", "full")


def test_rivals_have_the_same_optimizer_where_they_can() -> None:
    names = dict.fromkeys(("rank", "merge_every", "merge_transport", "heads_per_device", "quantize"))
    for given, theirs in (((), "muon"), (("train.optimizer=adamw",), "adamw")):
        plan = planned(*given, **names)
        optimizers = {
            candidate_of(rival).run.method.name: candidate_of(rival).run.train.optimizer for rival in plan.rivals
        }
        assert optimizers.pop("sapipe") == "adamw"  # it reads Adam's moments
        assert len(optimizers) > 8 and set(optimizers.values()) == {theirs}
        assert plan.dense is not None and candidate_of(plan.dense).run.train.optimizer == theirs


def test_a_run_without_the_keys_means_what_it_meant() -> None:
    run = build_run({})
    assert keys(run) == ("adamw", "full", 0.1, Train().learning_rate)


def test_why_says_what_each_choice_is_worth() -> None:
    plan = planned("train.final_share=0.1")
    assert plan.chosen is not None
    lines = [str(choice) for choice in explain(plan, plan.chosen).choices]
    assert lines[0].startswith("train.optimizer = muon: 2.03 against 2.18 nats")
    assert lines[1].startswith("method.wire = int8: ") and "26 % of the bytes" in lines[1]
    assert lines[2].startswith("train.learning_rate = 0.0045: ") and len(lines) == 4
    assert lines[3].startswith("cluster.quorum = 3: links have 20 ms of latency")


def losses(method: str, **wanted: Any) -> dict[float, float]:
    """Return the validation loss by rate, of seed 0 at the small batch, as docs/convergence.jsonl has them."""
    rows = map(json.loads, (ROOT / "docs/convergence.jsonl").read_text(encoding="utf-8").splitlines())
    found = [
        row for row in rows if (row["batch"], row["method"], row["seed"], row["factor"]) == ("small", method, 0, 1)
    ]
    return {row["rate"]: row["val_loss"] for row in found}


@pytest.mark.parametrize(("name", "measured"), [("lte", "lte, frozen A, muon"), ("ddp", "dense, muon")])
def test_rates_are_the_best_that_were_tried_or_near_them(name: str, measured: str) -> None:
    tried, rate = losses(measured), rate_of(name, "muon", "tokens")
    assert tried[rate.value] < min(tried.values()) + 0.01
    assert f"{tried[rate.value]:.3f} with {1000 * rate.value:g}e-3" in rate.figures
    assert learning_rate(name, "muon", "tokens", 64) == rate.value == 4 * learning_rate(name, "muon", "tokens", 512)


def test_samples_are_those_of_the_optimizer() -> None:
    model = shipped()
    run = chosen()
    adamw = run.model_copy(update={"train": run.train.model_copy(update={"optimizer": "adamw"})})
    ratio = samples_factor(run, run.shape(), 1e9) / samples_factor(adamw, run.shape(), 1e9)
    assert ratio == pytest.approx(model.muon["lte"].value / model.methods["lte"].value)
    # LTE gains less of Muon than dense training does.
    assert model.muon["lte"].value / model.muon["ddp"].value > model.methods["lte"].value
    assert model.of("sapipe", "muon") == model.methods["sapipe"]


def test_the_table_names_keys_that_runs_have() -> None:
    assert [known.key for known in KNOWN] == ["train.optimizer", "method.wire", "train.final_share"]
    assert OPTIMIZER.value == "muon" and 0 < float(FINAL_SHARE.value) < 1
