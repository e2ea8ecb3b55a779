"""What plans remember from candidate to candidate changes no figure, and saves the work that it is for."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import signature
from types import FrameType
from typing import Any

import pytest

from ltecli.plan_request import PlanArgs, plan_request
from simulate.config.run import Run
from simulate.costs import cache as remember
from simulate.costs import step_time as time
from simulate.models.shapes import ModelShape
from simulate.planning.candidate import candidate_of
from simulate.planning.plan_json import candidate_json
from simulate.planning.planner import Plan, evaluate

FEW = ("model.layers=2", "train.micro_batch=4")
REQUESTS = {
    "text, all methods": PlanArgs(profile="rtx3060_x4_home", model="gpt", assignments=FEW),
    "images, one memory": PlanArgs(profile="raspberry_x8", model="vit", assignments=FEW, pins={"rank": 8}),
    "unequal devices, momentum in 8 bits": PlanArgs(
        profile="mixed_gtx1080ti_rtx2060_rtx3090", model="gpt", pins={"merge_every": 10},
        assignments=("model.layers=2", "train.optimizer_state=8bit", "method.merge_transport=server"),
    ),
    "muon and autocast": PlanArgs(
        profile="a100_x8_nvlink", model="gpt", pins={"quantize": "int8", "heads_per_device": 2},
        assignments=("model.layers=2", "train.optimizer=muon", "train.autocast=bf16"),
    ),
}  # fmt: skip


def planned(request: PlanArgs) -> Plan:
    return plan_request(request, to_train=False)


def caches_of_costs() -> list[Any]:
    """Return the functions of costs that remember what they returned for some arguments; files stay read."""
    modules = [module for name, module in sys.modules.items() if name.startswith("simulate.costs")]
    caches = [value for module in modules for value in vars(module).values() if hasattr(value, "cache_clear")]
    return [function for function in caches if signature(function).parameters]


def forget(caches: Sequence[Any]) -> None:
    """Forget all that costs remember, these caches and those by method."""
    remember.forget()
    for function in caches:
        function.cache_clear()


def first_that_differs(plan: Plan) -> Run | None:
    """Work every candidate out on its own, from nothing; return the first run whose figures are others than planned."""
    caches = caches_of_costs()
    assert caches
    for result in (*plan.candidates, *plan.rejected, *plan.rivals):
        planned = candidate_of(result)
        forget(caches)
        if candidate_json(candidate_of(evaluate(planned.run, plan.profile, plan.tokens))) != candidate_json(planned):
            return planned.run
    return None


@pytest.mark.parametrize("name", REQUESTS)
def test_every_candidate_is_planned_as_if_it_were_the_only_one(name: str) -> None:
    plan = planned(REQUESTS[name])
    assert len(plan.candidates) + len(plan.rejected) > 20
    assert first_that_differs(plan) is None


def test_remembering_what_depends_on_the_batch_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    direct = time._moved.__wrapped__  # type: ignore[attr-defined]

    def with_batch(run: Run, shape: ModelShape) -> Any:
        moved = direct(run, shape)
        return replace(moved, optimizer=moved.optimizer + run.train.micro_batch)

    monkeypatch.setattr(time, "_moved", remember.by_method(with_batch))
    request = PlanArgs(profile="rtx3060_x4_home", model="gpt", assignments=("model.layers=2",), pins={"rank": 8})
    assert first_that_differs(planned(request)) is not None


def calls_of(action: Callable[[], Any]) -> Counter[tuple[str, str]]:
    """Count the Python functions that are called, by module and name."""
    calls: Counter[tuple[str, str]] = Counter()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            calls[frame.f_globals.get("__name__", ""), frame.f_code.co_name] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(before)
    return calls


@pytest.mark.parametrize(("quorum", "most_calls"), [(4, 220), (3, 270)])
def test_a_plan_of_thousands_takes_about_two_hundred_calls_a_candidate(quorum: int, most_calls: int) -> None:
    request = PlanArgs(profile="rtx3060_x4_home", model="gpt2", assignments=(f"cluster.quorum={quorum}",))
    forget(caches_of_costs())
    plans: list[Plan] = []
    calls = calls_of(lambda: plans.append(planned(request)))
    results = [*plans[0].candidates, *plans[0].rejected]
    methods = {candidate_of(result).run.method for result in results}
    evaluated = calls["simulate.planning.planner", "_evaluate"]
    assert evaluated >= len(results) >= 2000
    assert calls["simulate.costs.memory", "peak_profile"] == evaluated
    # Once for each method, and for those that are only shown beside.
    assert calls["simulate.costs.memory", "_lasting"] <= 1.5 * len(methods)
    assert calls["simulate.costs.activations", "step_phases"] <= len(results) / 4
    # Classes of devices, a quorum and checkpoints beside training each ask a question or two of every candidate.
    assert calls.total() <= most_calls * evaluated
