"""Devices of unequal speed: against slow twins, by hand, by clocks that the tests turn, and replayed from counts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from simulate.comm.virtual import VirtualCommunicator
from simulate.common.errors import InputError
from simulate.common.events import Event
from simulate.config.profiles import load_profile
from simulate.config.run import Run
from simulate.costs.step_time import device_step_s, round_time
from simulate.methods.local_sgd.options import LocalSgdOptions
from simulate.methods.paced import Paced
from simulate.methods.registry import build_method
from simulate.rules.pace import round_compute_s, round_counts
from simulate.training.loop import Session, train
from simulate.training.simulated_clock import SimulatedClock
from tests import tiny
from tests.processes import DEVICES, paced_by_turned_clocks
from tests.reference.paced import PacedDilocoTwin, PacedLocalSgdTwin, PacedLteFrozenATwin, PacedLteTwin
from tests.selection import others_slow
from tests.simulate.methods import adapter_parity, parity
from tests.simulate.methods.parity import hand_run, of_linear, set_copies

MIXED = "mixed_gtx1080ti_rtx2060_rtx3090"
FIVE = {"merge_every": 5, "steps_taken": ((5, 2, 1), (3, 1, 3), (5, 5, 5))}
FOUR = {"merge_every": 4, "devices": 4, "steps_taken": ((4, 2, 1, 3), (2, 1, 1, 2))}
DENSE: dict[str, tuple[Any, Run]] = {
    "local sgd": (PacedLocalSgdTwin, parity.parity_run("local-sgd, paced", **FIVE)),
    "shards": (PacedLocalSgdTwin, parity.parity_run("local-sgd, paced", shards=(1.0, 2.0, 3.0), **FIVE)),
    "served": (PacedLocalSgdTwin, parity.parity_run("local-sgd, paced, served", **FIVE)),
    "int8": (PacedLocalSgdTwin, parity.parity_run("local-sgd, paced int8", **FIVE)),
    "moments": (PacedLocalSgdTwin, parity.parity_run("local-sgd, paced", merge_optimizer="average", **FIVE)),
    "diloco": (PacedDilocoTwin, parity.parity_run("diloco, paced", **FIVE)),
}
LTE: dict[str, tuple[Any, Run]] = {
    "gathered": (PacedLteTwin, adapter_parity.parity_run("lte, paced", **FOUR)),
    "two heads, redrawn": (PacedLteTwin, adapter_parity.parity_run("lte, paced, redrawn", norms="average", **FOUR)),
    "reduced": (PacedLteTwin, adapter_parity.parity_run("lte, paced, reduced", **FOUR)),
    "frozen a, served": (
        PacedLteFrozenATwin,
        adapter_parity.parity_run("lte, paced", frozen_a=True, merge_transport="server", **FOUR),
    ),
}


@pytest.mark.parametrize("name", others_slow(DENSE, ["served", "int8", "diloco"]))
def test_every_dense_method_trains_like_the_twin(name: str) -> None:
    parity.assert_trains_like(*DENSE[name])


@pytest.mark.parametrize("name", others_slow(LTE, ["two heads, redrawn", "frozen a, served"]))
def test_lte_trains_like_the_twin(name: str) -> None:
    adapter_parity.assert_trains_like(*LTE[name])


def keep_what_went_on(method: Paced, tensors: object) -> None:
    """Merge what a device did after it had stopped."""


@pytest.mark.parametrize(
    ("attribute", "broken"),
    [
        pytest.param("_put_back", keep_what_went_on, id="who has stopped goes on"),
        pytest.param("shares", lambda method, sizes=None: None, id="all count alike"),
    ],
)
@pytest.mark.parametrize("case", [DENSE["local sgd"], LTE["gathered"]], ids=["local sgd", "lte"])
def test_parity_detects_a_broken_engine(
    monkeypatch: pytest.MonkeyPatch, attribute: str, broken: Any, case: tuple[Any, Run]
) -> None:
    monkeypatch.setattr(Paced, attribute, broken)
    module = adapter_parity if case[0] is PacedLteTwin else parity
    with pytest.raises(AssertionError):
        module.assert_trains_like(*case)  # type: ignore[attr-defined]


def forget_skipped(method: Paced, step: int) -> None:
    """Let Adam count the steps that a device took itself."""
    method.skipped.zero_()
    ORIGINAL_CLOSE(method, step)


ORIGINAL_CLOSE = Paced.close_round


def test_parity_detects_an_adam_that_counts_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    # All stop at once, so that the engine skips.
    run = parity.parity_run("local-sgd, paced", merge_every=5, steps_taken=((3, 3, 3),))
    parity.assert_trains_like(PacedLocalSgdTwin, run)
    monkeypatch.setattr(Paced, "close_round", forget_skipped)
    with pytest.raises(AssertionError):
        parity.assert_trains_like(PacedLocalSgdTwin, run)


def test_a_merge_weighs_by_steps_by_hand() -> None:
    method, weight = of_linear(hand_run("local-sgd, paced", devices=2, steps_taken=((4, 1),)))
    assert isinstance(method, Paced)
    inputs, targets = torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    for step in range(4):
        method.step(inputs, targets, step)  # moves nothing: one class has no loss
        set_copies(
            weight, 1.0, 5.0 if step == 0 else 99.0
        )  # what the second does after its only step counts for nothing
    method.merge(3)
    # (4·1 + 1·5)/5
    torch.testing.assert_close(weight.flatten(), torch.tensor([1.8, 1.8], dtype=torch.float64), rtol=1e-14, atol=0)


def test_who_is_left_out_has_no_weight_and_the_others_shares_add_up() -> None:
    method, weight = of_linear(hand_run("local-sgd, paced", devices=3, steps_taken=((4, 2, 1),)))
    assert isinstance(method, Paced)
    inputs, targets = torch.zeros(3, 1, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    for step in range(4):
        method.step(inputs, targets, step)
        if step == 0:
            set_copies(weight, 1.0, 4.0, torch.nan)
    method.close_round(3)
    healthy_N = method.healthy()
    assert healthy_N.tolist() == [True, True, False]
    method.exclude_devices(healthy_N)
    method.merge(3)
    # (4·1 + 2·4)/6
    torch.testing.assert_close(weight.flatten(), torch.full((3,), 2.0, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("method", "counts", "round_s", "steps"),
    [
        # Steps of 1, 2 and 5 s, T = 10.
        ({}, (10, 10, 10), 50.0, 30),
        ({"pace": "deadline"}, (10, 5, 2), 10.0, 17),
        ({"pace": "deadline", "round_deadline_s": 24.0}, (10, 10, 4), 20.0, 24),
        ({"pace": "deadline", "round_deadline_s": 3.0}, (3, 1, 1), 5.0, 5),
        ({"pace": "deadline", "steps_taken": ((10, 1, 1), (2, 2, 2))}, (10, 1, 1), 10.0, 9),
    ],
)
def test_counts_and_seconds_of_a_round_by_hand(
    method: dict[str, Any], counts: tuple[int, ...], round_s: float, steps: float
) -> None:
    options = LocalSgdOptions(merge_every=10, **method)
    assert round_counts(options, (1.0, 2.0, 5.0)) == counts
    assert round_compute_s(options, (1.0, 2.0, 5.0)) == (pytest.approx(round_s), steps)


def mixed_run(**method: Any) -> Run:
    return tiny._run(3, None, {"steps": 24, "evaluate_every": 8}, {"name": "local-sgd", "merge_every": 8, **method})


def session_of(run: Run, tmp_path: Path, events: list[Event]) -> Session:
    profile = load_profile(MIXED)
    clock = SimulatedClock(run, profile.devices(3), profile.link)
    communicator = VirtualCommunicator(3, clock.charge_transfer, clock.wait)
    method, data = build_method(run, communicator, tiny.CPU), tiny.batches(run)
    return Session(run, method, data, communicator, clock, events.append, tmp_path, tiny.CPU)


def test_a_simulated_round_takes_what_the_fastest_needs_and_counts_what_was_trained_on(tmp_path: Path) -> None:
    run, events = mixed_run(pace="deadline"), []
    session = session_of(run, tmp_path, events)
    train(session)
    step_s = device_step_s(run, run.model.shape(), load_profile(MIXED).devices(3))
    counts = [max(1, math.floor(8 * min(step_s) / seconds + 1e-9)) for seconds in step_s]
    assert len(set(counts)) > 1
    rounds = [event for event in events if event["kind"] == "round"]
    assert [(event["step"], event["steps_done"]) for event in rounds] == [(8, counts), (16, counts), (24, counts)]
    steps = [event for event in events if event["kind"] == "step"]
    assert steps[-1]["samples"] == 3 * sum(counts) * 2
    assert steps[-1]["tokens"] == steps[-1]["samples"] * 8
    first = steps[: min(counts) + 1]
    assert [event["samples"] for event in first[:-1]] == [(i + 1) * 3 * 2 for i in range(min(counts))]
    stopped = counts.index(min(counts))
    assert first[-1]["device_losses"][stopped] is None and first[-2]["device_losses"][stopped] is not None
    planned = round_time(run, run.model.shape(), load_profile(MIXED).devices(3), load_profile(MIXED).link)
    assert planned.steps * planned.compute_s == pytest.approx(8 * min(step_s))
    assert session.clock.compute_s == pytest.approx(3 * (8 * min(step_s) + planned.merge_s))
    assert planned.device_steps == sum(counts)


def test_lockstep_waits_for_the_slowest_and_says_nothing_of_rounds(tmp_path: Path) -> None:
    run, events = mixed_run(), []
    train(session_of(run, tmp_path, events))
    assert not [event for event in events if event["kind"] == "round"]
    assert [event["samples"] for event in events if event["kind"] == "step"] == [6 * step for step in range(1, 25)]


@pytest.mark.parametrize(
    ("name", "method", "said"),
    [
        ("lte", {"pace": "deadline"}, "reset-less"),
        ("diloco", {"pace": "deadline", "fragments": 2}, "fragments"),
        ("diloco", {"pace": "deadline", "merge_delay": 2}, "merge_delay"),
        ("diloco", {"round_deadline_s": 2.0}, "pace = 'deadline'"),
        ("local-sgd", {"pace": "deadline", "steps_taken": [[1, 11]]}, "11"),
        ("local-sgd", {"pace": "deadline", "steps_taken": [[1, 0]]}, "0"),
        ("local-sgd", {"pace": "deadline", "steps_taken": [[1, 1, 1]]}, "3 devices"),
        (
            "local-sgd",
            {"pace": "deadline", "participation": 0.5, "merge_transport": "server", "merge_optimizer": "reset"},
            "participation",
        ),
    ],
)
def test_what_does_not_go_with_a_deadline_is_refused(name: str, method: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        tiny._run(2, None, None, {"name": name, **method})


class TurnedClock:
    """A clock that only the test turns."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_device_stops_when_the_deadline_has_passed_and_takes_one_step_at_least() -> None:
    run = tiny._run(
        1, None, {"steps": 12}, {"name": "local-sgd", "merge_every": 6, "pace": "deadline", "round_deadline_s": 3.0}
    )
    method, data = tiny.build(run), tiny.batches(run)
    assert isinstance(method, Paced)
    method.goes_by_clock, method.now_s = True, (clock := TurnedClock())
    for step, seconds in enumerate((1.0, 1.0, 0.9, 0.2, 1.0, 1.0, 7.0, 1.0, 1.0, 1.0, 1.0, 1.0)):
        method.step(*data.batch(step, range(1)), step)
        clock.now += seconds
        if method.merge_due(step):
            method.merge(step)
            assert method.steps_done() == [4 if step == 5 else 1]  # 3.1 s after four steps; 7 s after one
    (state, *_) = method.stepper.state.values()
    assert int(state["step"]) == 12


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local-sgd, paced", "lte, paced"])
def test_a_launched_run_is_replayed_from_its_counts(name: str, tmp_path: Path) -> None:
    run = tiny.variant_run(name, DEVICES)
    options = {**run.method.model_dump(), "steps_taken": None}
    table = {key: value for key, value in options.items() if value is not None}
    (tmp_path / "method.json").write_text(json.dumps(table))
    launched, counts = paced_by_turned_clocks(tmp_path, table)
    assert any(len(set(row)) > 1 for row in counts) and all(1 <= c <= 4 for row in counts for c in row)
    replay = tiny._run(DEVICES, None, {"steps": 20}, {**table, "steps_taken": counts})
    tiny.assert_parity(launched, tiny.train(tiny.build(replay)))
