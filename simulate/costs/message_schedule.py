"""List the messages of a run and the steps after which they are sent, as its method's plan states them.

Planned bytes come from here; tests hold them equal, to the byte, to those that a communicator counts. Methods' plans
build their exchanges from the functions at the end.

Letters: N devices, T steps of a round.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache

from simulate.comm.transfers import Exchange, Transfer, averages
from simulate.config.run import Run
from simulate.costs.cache import by_method
from simulate.layers.formats import ELEMENT_BYTES
from simulate.models.shapes import ModelShape
from simulate.rules.method_plan import PeriodicExchange, plan_of
from simulate.rules.transport import gather_groups


@by_method
def schedule(run: Run, shape: ModelShape) -> tuple[PeriodicExchange, ...]:
    """Return all exchanges of a run's devices; one device alone exchanges nothing."""
    devices = run.cluster.devices
    if devices == 1:
        return ()
    # A message is the same to all classes of devices, so any of them knows it.
    return plan_of(run.of_class(0).method).messages(shape, devices, ELEMENT_BYTES[run.train.dtype])


def sent_bytes(run: Run, shape: ModelShape, steps: int) -> int:
    """Return the bytes that all devices together send in the first `steps` steps.

    With a quorum all devices are counted in every merge, unless the run gives its merges.
    """
    if run.cluster.merges_given is not None:
        return sum(exchange.sent_bytes for exchange in given_exchanges(run, shape, steps))
    total = 0
    for part in schedule(run, shape):  # thousands of candidates ask
        total += part.exchange.sent_bytes * part.times(steps, run.train.steps)
    return total


def received_bytes(run: Run, shape: ModelShape, steps: int) -> int:
    """Return the bytes that all devices together receive in the first `steps` steps."""
    if run.cluster.merges_given is not None:
        return sum(exchange.received_bytes for exchange in given_exchanges(run, shape, steps))
    return sum(part.exchange.received_bytes * part.times(steps, run.train.steps) for part in schedule(run, shape))


def given_exchanges(run: Run, shape: ModelShape, steps: int) -> Iterator[Exchange]:
    """Yield the exchanges of the first `steps` steps of a run that gives its merges: among those that take part."""
    from simulate.rules.attendance import GivenAttendance  # numpy, which plans do without

    parts, attendance, every = schedule(run, shape), GivenAttendance(run), run.method.round_steps
    for start in range(0, steps, every):
        round_ = attendance.begin(start, 0.0)
        yield from itertools.repeat(base_exchange(run, shape), int(round_.joined_N.sum()))
        if start + every > steps and steps != run.train.steps:
            return  # the round's merge comes later
        late_N = (round_.brought_N > 0) & (round_.takes_N == 0)
        yield from itertools.repeat(base_exchange(run, shape), int(late_N.sum()))
        for part in parts:
            yield among(part.exchange, round_.present_N.tolist())


def among(exchange: Exchange, present_N: Sequence[bool]) -> Exchange:
    """Return an exchange of all devices as it is among those that are present; a ring of one sends nothing."""
    transfers = (t.among(present_N) if t.devices == len(present_N) else t for t in exchange.transfers)
    return Exchange(tuple(t for t in transfers if t.devices > 1 or t.operation in ("push", "pull")))


@by_method
def base_exchange(run: Run, shape: ModelShape) -> Exchange:
    """Return the message that brings one device to the base of the others, before it takes part again."""
    payload_bytes = plan_of(run.of_class(0).method).base_bytes(shape, ELEMENT_BYTES[run.train.dtype])
    is_served = getattr(run.method, "merge_transport", "") == "server"
    return Exchange((Transfer("pull", payload_bytes, 1) if is_served else Transfer("broadcast", payload_bytes, 2),))


def num_rounds(run: Run) -> int:
    """Return the rounds of a whole run; a last one that is shorter also ends with a merge."""
    return -(-run.train.steps // run.method.round_steps)


@lru_cache(maxsize=256)
def dense_reduction(shape: ModelShape, devices: int, element_bytes: int, wire: str = "full") -> Exchange:
    """Return the messages that average one dense tensor per parameter over all devices."""
    return Exchange(averages((t.elements for t in shape.tensors), devices, wire, element_bytes))


@lru_cache(maxsize=1024)
def adapter_reduction(shape: ModelShape, rank: int, devices: int, element_bytes: int) -> Exchange:
    """Return the messages that average the gradients of a pair of the given rank in each layer, and all others."""
    counts: list[int] = []
    # In the order in which the network holds its parameters, since that decides how they share messages.
    layers = iter(shape.in_order())
    for tensor in shape.tensors:
        if tensor.kind == "adapted":
            layer = next(layers)
            counts += [rank * layer.in_features, rank * layer.out_features]
        else:
            counts.append(tensor.elements)
    return Exchange(averages(counts, devices, "full", element_bytes))


def gathered(sizes_bytes: Sequence[int], devices: int) -> Exchange:
    """Return the messages that gather every device's parts, of the given bytes, on all devices."""
    groups = gather_groups(sizes_bytes, devices)
    return Exchange(tuple(Transfer("all_gather", sum(sizes_bytes[i] for i in group), devices) for group in groups))
