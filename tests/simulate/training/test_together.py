"""A merge that breaks at any of its exchanges leaves everything as it was, and can be done again."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from simulate.comm.virtual import VirtualCommunicator
from simulate.common.errors import LostPeerError
from simulate.config.run import build_run
from simulate.methods.base import Method
from simulate.methods.registry import build_method
from simulate.training.together import StateReplacedError, together
from tests import tiny

DEVICES, EVERY = 3, 4
METHODS: dict[str, dict[str, Any]] = {
    "lte": {"name": "lte", "rank": 2, "reset": "b"},
    "lte, drawn anew": {"name": "lte", "rank": 2, "reset": "ab", "frozen_a": False},
    "lte, int8": {"name": "lte", "rank": 2, "reset": "b", "quantize": "int8"},
    "lte, moments": {"name": "lte", "rank": 2, "reset": "b", "merge_optimizer": "reset"},
    "lte, reduced": {"name": "lte", "rank": 2, "reset": "b", "merge_transport": "reduce"},
    "local-sgd": {"name": "local-sgd"},
    "local-sgd, reset": {"name": "local-sgd", "merge_optimizer": "reset"},
    "diloco": {"name": "diloco"},
}


class Breaking(VirtualCommunicator):
    """A communicator that loses a peer in one exchange."""

    exchanges, breaks_at = 0, 0

    def _break(self) -> None:
        self.exchanges += 1
        if self.exchanges == self.breaks_at:
            raise LostPeerError("a peer is gone")

    def _all_reduce(self, sums: Sequence[Tensor]) -> None:
        self._break()

    def _all_gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        self._break()
        return super()._all_gather(tensors)


class Group:
    """The group of a session: it looks at the state where an act has failed."""

    def __init__(self, before: dict[str, Tensor], refuses: int = 0) -> None:
        self.before, self.formed, self.refuses = before, 0, refuses

    def arrive(self, session: Any) -> None:
        """Wait for nobody."""

    def confirm(self) -> None:
        """Fail the first times."""
        if self.refuses:
            self.refuses -= 1
            raise LostPeerError("somebody has not got it")

    def form_anew(self, session: Any, error: LostPeerError) -> None:
        """Look, and go on."""
        assert_same(state_of(session.method), self.before)
        assert all(parameter.grad is None for parameter in session.method.parameters.values())
        self.formed += 1

    def admit(self, session: Any) -> None:
        """Admit nobody."""


def trained(name: str) -> Method:
    """Return a method after two rounds but for the second merge."""
    method = {"merge_every": EVERY, **METHODS[name]}
    tables = {
        "model": tiny.SIZES, "data": {"name": "stdlib"}, "method": method,
        "train": {"steps": 40, "micro_batch": 2, "dtype": "fp64"}, "cluster": {"devices": DEVICES, "quorum": 2},
    }  # fmt: skip
    run = build_run(tables)
    built = build_method(run, Breaking(DEVICES), tiny.CPU)
    torch.manual_seed(0)
    for step in range(2 * EVERY):
        tokens = torch.randint(256, (DEVICES * 2, 9))
        built.step(tokens[:, :-1], tokens[:, 1:], step)
        if step == EVERY - 1:
            built.merge(step)
    built.close_round(2 * EVERY - 1)
    return built


def state_of(method: Method) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in method.state.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", METHODS)
def test_a_broken_merge_is_taken_back_and_done_again(name: str) -> None:
    undisturbed = trained(name)
    counted = undisturbed.communicator
    assert isinstance(counted, Breaking)
    counted.exchanges = 0
    undisturbed.merge(2 * EVERY - 1)
    merged = state_of(undisturbed)
    for exchange in {1, counted.exchanges}:
        method = trained(name)
        communicator = method.communicator
        assert isinstance(communicator, Breaking)
        communicator.exchanges, communicator.breaks_at = 0, exchange
        group = Group(state_of(method))
        session: Any = SimpleNamespace(group=group, method=method)
        together(session, lambda method=method: method.merge(2 * EVERY - 1), changes=True)  # type: ignore[misc]
        assert group.formed == 1
        assert_same(state_of(method), merged)


def test_a_merge_that_others_have_not_got_is_taken_back_too() -> None:
    method = trained("diloco")
    group = Group(state_of(method), refuses=2)
    session: Any = SimpleNamespace(group=group, method=method)
    together(session, lambda: method.merge(2 * EVERY - 1), changes=True)
    assert group.formed == 2


def test_without_a_group_an_act_is_a_call_and_failures_are_the_callers() -> None:
    session: Any = SimpleNamespace(group=None)
    assert together(session, lambda: 7) == 7

    def fail() -> None:
        raise LostPeerError("gone")

    with pytest.raises(LostPeerError):
        together(session, fail)


def test_who_takes_over_another_state_leaves_the_act() -> None:
    class Replacing(Group):
        def form_anew(self, session: Any, error: LostPeerError) -> None:
            raise StateReplacedError(is_at_merge=True)

    session: Any = SimpleNamespace(group=Replacing({}, refuses=1), method=trained("local-sgd"))
    with pytest.raises(StateReplacedError) as replaced:
        together(session, lambda: 7)
    assert replaced.value.is_at_merge
