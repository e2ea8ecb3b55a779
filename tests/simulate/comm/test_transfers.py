"""Tests that planned bytes, from shapes, equal the bytes that communicators count, from tensors."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simulate.comm.base import ByteCounter
from simulate.comm.transfers import Transfer, bucket
from simulate.comm.virtual import VirtualCommunicator
from simulate.config.run import Run
from simulate.costs.message_schedule import num_rounds, received_bytes, schedule, sent_bytes
from simulate.layers.formats import ELEMENT_BYTES, quantized_bytes
from simulate.methods.registry import build_method
from tests import tiny
from tests.selection import others_slow, variants

TRANSPORTS = ("gather", "reduce", "server")


def transfers_of_step(run: Run, step: int) -> tuple[Transfer, ...]:
    """Return the planned messages of one step, counted from 1, in the order in which they are sent."""
    parts = (part for part in schedule(run, run.model.shape()) if part.happens(step, run.train.steps))
    return tuple(transfer for part in parts for transfer in part.exchange.transfers)


def assert_planned_is_counted(run: Run, steps: int | None = None) -> None:
    """Compare every step's messages, and their sums, with the plan's."""
    told: list[Transfer] = []
    shape, steps = run.model.shape(), steps or run.train.steps
    communicator = VirtualCommunicator(run.cluster.devices, lambda transfer, background: told.append(transfer))
    method, batches = build_method(run, communicator, tiny.CPU), tiny.batches(run)
    planned: list[Transfer] = []
    for step in range(steps):
        method.step(*batches.batch(step, communicator.local_devices), step)
        if method.merge_due(step):
            method.merge(step)
        planned += transfers_of_step(run, step + 1)
        assert told == planned, f"step {step + 1}"
    counter = communicator.counter
    assert counter.messages == len(planned)
    assert counter.sent_bytes == sent_bytes(run, shape, steps)
    assert counter.received_bytes == received_bytes(run, shape, steps)


@pytest.mark.parametrize("name", variants("sent bytes"))
def test_every_method_sends_what_was_planned(name: str) -> None:
    assert_planned_is_counted(tiny.variant_run(name, train={"steps": 10, "dtype": "fp32"}))


@pytest.mark.parametrize("devices", others_slow([1, 2, 3, 7], [1, 3]))
@pytest.mark.parametrize("heads_per_device", [1, 2])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_lte_sends_what_was_planned(transport: str, heads_per_device: int, devices: int) -> None:
    method = {"merge_transport": transport, "heads_per_device": heads_per_device, "merge_every": 3}
    assert_planned_is_counted(tiny.lte_run(devices=devices, train={"steps": 4}, **method))


@pytest.mark.parametrize("devices", [1, 2, 3, 7])
def test_ddp_sends_what_was_planned(devices: int) -> None:
    assert_planned_is_counted(tiny.ddp_run(devices=devices, train={"steps": 3}))


@given(data=st.data())
def test_any_shape_sends_what_was_planned(data: st.DataObject) -> None:
    attention_heads = data.draw(st.integers(1, 3))
    width = attention_heads * data.draw(st.integers(1, 5))
    model = {
        "layers": data.draw(st.integers(1, 3)),
        "width": width,
        "attention_heads": attention_heads,
        "context": data.draw(st.integers(1, 9)),
        "vocab": data.draw(st.integers(128, 300)),
    }
    devices, dtype = data.draw(st.integers(1, 6)), data.draw(st.sampled_from(["fp32", "fp64"]))
    assert_planned_is_counted(tiny.ddp_run(devices, model, {"dtype": dtype, "steps": 2}))
    method = {
        "rank": data.draw(st.integers(1, width)),
        "heads_per_device": data.draw(st.integers(1, 3)),
        "merge_transport": data.draw(st.sampled_from(TRANSPORTS)),
        "reset": data.draw(st.sampled_from(["none", "b", "ab"])),
    }
    assert_planned_is_counted(tiny.lte_run(devices, model, {"dtype": dtype, "micro_batch": 6, "steps": 2}, **method))


# Adapted weights of 42 MB: several messages of at most 16 MiB.
LARGE = {"layers": 6, "width": 384, "attention_heads": 6}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_merge_larger_than_a_message_is_split_as_planned(transport: str) -> None:
    run = tiny.lte_run(3, LARGE, {"dtype": "fp32", "steps": 1}, rank=64, alpha=64.0, merge_transport=transport)
    assert len(transfers_of_step(run, 1)) > 2
    assert_planned_is_counted(run)


def test_a_ddp_step_larger_than_a_message_is_split_as_planned() -> None:
    run = tiny.ddp_run(3, LARGE, {"dtype": "fp32", "steps": 1})
    assert len(transfers_of_step(run, 1)) > 2
    assert_planned_is_counted(run)


def test_counted_bytes_detect_a_wrong_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ELEMENT_BYTES, "fp64", 4)
    with pytest.raises(AssertionError):
        assert_planned_is_counted(tiny.lte_run(devices=3, train={"steps": 10}, merge_transport="reduce"))


@pytest.mark.parametrize(
    ("operation", "sent", "received"),
    [
        ("all_reduce", 400, 400),  # ring: 2·(3−1)/3 of 100 bytes, for 3 devices
        ("all_gather", 600, 600),  # each of 3 devices passes on 2 contributions of 100 bytes
        ("push", 300, 0),  # each sends its 100 bytes; the server's link is not a device's
        ("pull", 0, 300),
        ("all_to_all", 200, 200),  # two of the three parts of 100 bytes leave each device: 3 · 2/3 · 100
        ("broadcast", 200, 200),
    ],
)
def test_bytes_of_one_message_of_three_devices(operation: str, sent: int, received: int) -> None:
    transfer = Transfer(operation, payload_bytes=100, devices=3)  # type: ignore[arg-type]
    assert (transfer.sent_bytes, transfer.received_bytes) == (sent, received)


def test_bytes_of_one_merge_by_hand() -> None:
    run = tiny.lte_run(devices=3, model={"layers": 1}, train={"dtype": "fp32"})
    # F: rank 2 · (out + in) of qkv, project, up, down = 2·(64 + 32 + 80 + 80) elements of 4 bytes.
    factors_bytes = 2 * 256 * 4
    # 256·16 tokens, 8·16 positions, biases 48 + 16 + 64 + 16, three norms of 2·16.
    replicated_bytes = (4096 + 128 + 144 + 96) * 4
    sent = sent_bytes(run, run.model.shape(), run.method.round_steps)
    assert sent / 3 == pytest.approx(2 * factors_bytes + 4 / 3 * replicated_bytes)


@pytest.mark.parametrize(("steps", "merge_every", "rounds"), [(20, 10, 2), (21, 10, 3), (5, 10, 1)])
def test_the_last_round_may_be_shorter(steps: int, merge_every: int, rounds: int) -> None:
    run = tiny.lte_run(train={"steps": steps}, merge_every=merge_every)
    assert num_rounds(run) == rounds == sum(tiny.build(run).merge_due(step) for step in range(steps))


@pytest.mark.parametrize(
    ("quantize", "expected_bytes"),
    [  # two rows, and two blocks of 64, in one group
        ("none", 128 * 4),
        ("bf16", 128 * 2),
        ("int8", 128 + 2 * 4),
        ("nf4", 64 + 2 * 4),
        ("nf4-double", 64 + 2 + 4),
    ],
)
def test_bytes_of_a_frozen_layer_of_two_rows_of_64(quantize: str, expected_bytes: int) -> None:
    assert quantized_bytes(elements=128, inputs=64, quantize=quantize, element_bytes=4) == expected_bytes


SIZES_BYTES = st.lists(st.integers(0, 50), max_size=30)
CAP_BYTES = st.integers(1, 100)


@given(sizes=SIZES_BYTES, cap=CAP_BYTES)
def test_packing_keeps_every_item_once_and_in_order(sizes: list[int], cap: int) -> None:
    assert [index for group in bucket(sizes, cap) for index in group] == list(range(len(sizes)))


@given(sizes=SIZES_BYTES, cap=CAP_BYTES)
def test_no_message_exceeds_the_cap_unless_it_is_one_item(sizes: list[int], cap: int) -> None:
    assert all(len(group) == 1 or sum(sizes[i] for i in group) <= cap for group in bucket(sizes, cap))


@given(sizes=SIZES_BYTES, cap=CAP_BYTES)
def test_no_message_could_have_taken_the_next_item_too(sizes: list[int], cap: int) -> None:
    groups = bucket(sizes, cap)
    for group, after in pairwise(groups):
        assert sum(sizes[i] for i in group) + sizes[after[0]] > cap


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        pytest.param([], [], id="nothing"),
        pytest.param([3, 3, 4, 9, 1], [range(0, 3), range(3, 5)], id="filled to the last byte"),
        pytest.param([3, 3, 5, 6], [range(0, 2), range(2, 3), range(3, 4)], id="one byte too many"),
        pytest.param([1, 11, 1], [range(0, 1), range(1, 2), range(2, 3)], id="an item above the cap"),
    ],
)
def test_messages_of_at_most_ten_bytes(sizes: list[int], groups: list[range]) -> None:
    assert bucket(sizes, cap_bytes=10) == groups


def test_what_is_exchanged_aside_is_counted_apart() -> None:
    told: list[Transfer] = []
    communicator = VirtualCommunicator(2, lambda transfer, background: told.append(transfer))
    apart = ByteCounter()
    with pytest.raises(ValueError, match="broken"), communicator.uncounted(apart):
        communicator.all_reduce([torch.zeros(3)])
        raise ValueError("broken")
    assert (apart.sent_bytes, apart.messages) == (2 * 12, 1)
    assert (communicator.counter.messages, told) == (0, [])
    communicator.all_reduce([torch.zeros(3)])
    assert communicator.counter.sent_bytes == sum(transfer.sent_bytes for transfer in told) == 24
    assert apart.messages == 1
