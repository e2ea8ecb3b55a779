"""Costs of classes of unequal devices: each class as a run of its own, and what they share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from simulate.comm.transfers import Transfer
from simulate.config.profiles import load_profile
from simulate.config.run import Run, build_run
from simulate.costs.eval_and_save_time import evaluation_s
from simulate.costs.memory import checkpoint_bytes, peak_memory
from simulate.costs.message_time import transfer_s
from simulate.costs.simulated_memory import simulated_memory
from simulate.costs.step_time import device_step_s, round_time
from simulate.measure.one_device import measure_memory_bytes
from simulate.planning.candidate import Candidate, describe
from simulate.planning.plan_json import candidate_json
from simulate.planning.planner import evaluate
from tests import tiny

TOLERANCE = 0.01
WIDE = {**tiny.SIZES, "layers": 2, "width": 96, "attention_heads": 4, "context": 24, "vocab": 300}
CLASSES: list[tiny.Table] = [
    {"devices": 2, "micro_batch": 4, "heads_per_device": 2},
    {"devices": 1, "rank": 40, "accumulate": 2},
    {"devices": 1, "micro_batch": 1, "rank": 3},
]
MIXED = load_profile("mixed_gtx1080ti_rtx2060_rtx3090")
ONE_MEMORY = load_profile("raspberry_x8").device[0]


def run_of(classes: list[tiny.Table] = CLASSES, **method: Any) -> Run:
    return build_run(
        {
            "model": WIDE,
            "data": {"path": "made-up"},
            "method": {"name": "lte", "rank": 12, "merge_every": 4, **method},
            "train": {"steps": 12, "micro_batch": 2},
            "cluster": {"devices": sum(one["devices"] for one in classes), "class": classes},
        }
    )


MEMORY: dict[str, tiny.Table] = {
    "gathered": {},
    "gathered, joint": {"draws": "joint"},
    "gathered, columns": {"draws": "columns"},
    "gathered int8": {"wire": "int8"},
    "reduced, reset-less": {"merge_transport": "reduce", "reset": "none"},
    "served": {"merge_transport": "server"},
    "nf4": {"quantize": "nf4"},
}


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("name", MEMORY)
def test_memory_of_each_class_is_what_the_allocator_gives(name: str, index: int) -> None:
    one = run_of(**MEMORY[name]).of_class(index)
    planned = peak_memory(one, one.shape(), ONE_MEMORY).tensors
    assert planned == pytest.approx(measure_memory_bytes(one, torch.device("cpu")), rel=TOLERANCE)


def test_a_device_takes_its_own_classs_time_on_its_own_hardware() -> None:
    run = run_of([{"devices": 1}, {"devices": 2, "micro_batch": 6, "rank": 5}])
    devices, shape = MIXED.devices(3), run.shape()
    first, second = run.classes
    seconds = device_step_s(run, shape, devices)
    assert seconds[:1] == device_step_s(first, shape, devices)[:1]
    assert seconds[1:] == device_step_s(second, shape, devices)[1:]
    assert round_time(run, shape, devices, MIXED.link).compute_s == max(seconds)


def test_a_round_waits_less_where_classes_suit_the_hardware() -> None:
    devices = MIXED.devices(3)
    fastest = min(devices, key=lambda device: device.flop_per_s.fp32 or 0)
    slow = devices.index(fastest)
    alike, suited = ([{"devices": 1, "micro_batch": 16} for _ in devices] for _ in range(2))
    suited[slow]["micro_batch"] = 8
    times = [round_time(run, run.shape(), devices, MIXED.link) for run in (run_of(alike), run_of(suited))]
    assert times[1].compute_s < times[0].compute_s


def test_a_simulation_holds_a_program_for_each_class() -> None:
    run = run_of()
    whole = simulated_memory(run, run.shape(), ONE_MEMORY)
    alone = simulated_memory(run_of([{"devices": 2, "micro_batch": 4, "heads_per_device": 2}]), run.shape(), ONE_MEMORY)
    assert whole.state > alone.state and whole.tensors > alone.tensors


def test_a_checkpoint_has_each_devices_own_state_once() -> None:
    run = run_of([{"devices": 1}, {"devices": 3}])
    equal = build_run({**{k: v for k, v in run.model_dump(exclude_none=True).items() if k != "cluster"}, "cluster": {}})
    shape = run.shape()
    assert checkpoint_bytes(run, shape, 4) == checkpoint_bytes(equal, shape, 4)
    assert checkpoint_bytes(run, shape, 1) == checkpoint_bytes(equal, shape, 1)
    more = run_of([{"devices": 1, "rank": 24}, {"devices": 3}])
    own = checkpoint_bytes(more.of_class(0), shape, 2) - checkpoint_bytes(more.of_class(0), shape, 1)
    assert own > checkpoint_bytes(equal, shape, 2) - checkpoint_bytes(equal, shape, 1)
    assert checkpoint_bytes(more, shape, 4) > checkpoint_bytes(run, shape, 4)


def test_all_classes_evaluate_batches_of_one_size() -> None:
    run = run_of([{"devices": 1, "micro_batch": 4}, {"devices": 1, "micro_batch": 2}])
    shape, device = run.shape(), MIXED.device[0]
    assert evaluation_s(run.of_class(0), shape, device, 2) == evaluation_s(run, shape, device)


def test_unequal_parts_by_hand() -> None:
    parts = Transfer.of_parts("all_gather", [(2, 100), (1, 40)])
    assert (parts.devices, parts.payload_bytes) == (3, 100)
    assert parts.sent_bytes == parts.received_bytes == 2 * 240  # each part crosses two links
    pushed = Transfer.of_parts("push", [(2, 100), (1, 40)])
    assert (pushed.sent_bytes, pushed.received_bytes) == (240, 0)
    assert Transfer.of_parts("push", [(2, 100), (1, 100)]) == Transfer("push", 100, 3)


def test_a_push_of_unequal_parts_takes_less_than_one_of_the_largest() -> None:
    link = MIXED.link.model_copy(update={"topology": "star"})
    uneven, even = Transfer.of_parts("push", [(9, 10**6), (1, 10**8)]), Transfer("push", 10**8, 10)
    assert transfer_s(uneven, link) < transfer_s(even, link)


def test_a_plan_of_a_run_with_classes_names_them() -> None:
    run = run_of([{"devices": 1, "micro_batch": 4}, {"devices": 2, "rank": 5}])
    candidate = evaluate(run, MIXED, 12 * run.tokens_per_step)
    assert isinstance(candidate, Candidate)
    classes = candidate_json(candidate)["classes"]
    assert [(one["devices"], one["micro_batch"], one["rank"]) for one in classes] == [(1, 4, 12), (2, 2, 5)]
    seconds = device_step_s(run, run.shape(), MIXED.devices(3))
    assert [one["step_s"] for one in classes] == [seconds[0], max(seconds[1:])]
    assert describe(run) == "lte T 4, gather, devices: 1 of batch 4, rank 12; 2 of batch 2, rank 5"
