"""Bytes of one event of diagnostics, by hand, for a matrix (3, 5) and a norm of 3 in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simulate.config.run import Run
from simulate.costs.diagnostics_bytes import diagnostics_exchange
from simulate.models.shapes import LinearShape, ModelShape, ParameterShape
from simulate.training.diagnostics import Diagnostics
from tests import tiny
from tests.selection import others_slow


def small(run: Run) -> ModelShape:
    return replace(
        run.model.shape(),
        adapted=(LinearShape("w", 3, 5, 1),),
        tensors=(ParameterShape("adapted", (3, 5)), ParameterShape("norm", (3,))),
    )


ROUNDS = (
    "lte", "lte, auto", "lte, int8, served", "lte, streaming int8", "lte, norms of one", "lte, vector norms",
    "lte, frozen", "lte, joint", "lte, frozen a, muon", "lte, paced, redrawn", "local-sgd, moments", "fedavg",
    "diloco, streaming", "daso", "lora, nf4", "powersgd",
)  # fmt: skip
GRADIENTS, NORM = 18 * 8, 3 * 8
"""Their buffers; the ring sends each 2 (N - 1) times."""


@pytest.mark.parametrize(
    ("variant", "devices", "merged_before", "sent_bytes"),
    [
        ("ddp", 2, True, 2 * GRADIENTS),
        # A device's B, (3, 2); of both devices to the other.
        ("lte, frozen a", 2, True, 2 * 6 * 8 + 2 * NORM + 2 * GRADIENTS),
        # A, (2, 5), as well; from the second merge on with those of the last one.
        ("lte", 2, False, 2 * 16 * 8 + 2 * NORM + 2 * GRADIENTS),
        ("lte", 2, True, 2 * 2 * 16 * 8 + 2 * NORM + 2 * GRADIENTS),
        # The mean; two of three devices' weights to two others; three of 3 x 3 directions, and 3 x 3 products.
        ("local-sgd", 3, True, 4 * 15 * 8 + 2 * 2 * 15 * 8 + 4 * (3 * 9 + 9) * 8 + 4 * NORM + 4 * GRADIENTS),
        # Eight of nine devices are compared.
        ("diloco", 9, True, 16 * 15 * 8 + 7 * 8 * 15 * 8 + 16 * (8 * 9 + 64) * 8 + 16 * NORM + 16 * GRADIENTS),
        # Half of four devices take part.
        ("fedavg", 4, True, 6 * 15 * 8 + 3 * 15 * 8 + 6 * (2 * 9 + 4) * 8 + 6 * NORM + 6 * GRADIENTS),
        # Two nodes of two; and one node, whose devices agree.
        ("daso", 4, True, 6 * 15 * 8 + 3 * 15 * 8 + 6 * (2 * 9 + 4) * 8 + 6 * NORM + 6 * GRADIENTS),
        ("daso", 2, True, 2 * GRADIENTS),
        ("lte", 1, True, 0),
    ],
)
def test_bytes_of_an_event_by_hand(variant: str, devices: int, merged_before: bool, sent_bytes: int) -> None:
    run = tiny.variant_run(variant, devices)
    assert diagnostics_exchange(run, small(run), merged_before).sent_bytes == sent_bytes


@pytest.mark.parametrize(
    ("variant", "model"),
    others_slow(
        [
            *((variant, None) for variant in ROUNDS),
            *((variant, tiny.LLAMA) for variant in ("lte, frozen a", "diloco", "lte, norms of one")),
        ],
        [
            *(
                (variant, None)
                for variant in ("lte, streaming int8", "lte, vector norms", "fedavg", "daso", "powersgd")
            ),
            ("lte, frozen a", tiny.LLAMA),
        ],
    ),
)
def test_an_event_sends_what_was_planned(variant: str, model: tiny.Table | None) -> None:
    run = tiny.variant_run(variant, model=model, train={"steps": 8, "dtype": "fp32"})
    method, data = tiny.build(run), tiny.batches(run)
    diagnostics, shape = Diagnostics(method), run.model.shape()
    for step in range(8):
        method.step(*data.batch(step, range(4)), step)
        if not method.merge_due(step):
            continue
        counted = method.communicator.counter.sent_bytes
        diagnostics.of_round(step)
        assert method.communicator.counter.sent_bytes == counted
        method.merge(step)
        diagnostics.of_gradients(data, step + 1, tiny.CPU)
        planned = diagnostics_exchange(run, shape, merged_before=step >= run.method.round_steps)
        assert diagnostics.traffic.messages == len(planned.transfers)
        assert diagnostics.take_sent_bytes() == planned.sent_bytes
