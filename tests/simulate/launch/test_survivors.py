"""What processes that are left do where an exchange has failed; whole runs are in tests/launch/test_survivors.py."""

from __future__ import annotations

import weakref
from typing import Any
from unittest.mock import Mock

import pytest

from simulate.common.errors import LostPeerError
from simulate.launch.survivors import SurvivingGroup


class Connections:
    """What closes with its last reference, as a group of torch.distributed does."""


def failing_exchange() -> tuple[LostPeerError, weakref.ref[Connections]]:
    """Return the error of an exchange whose frames hold their group, as torch's do, and the group."""
    alive: list[weakref.ref[Connections]] = []

    def all_gather() -> None:
        group = Connections()
        alive.append(weakref.ref(group))
        raise RuntimeError("connection closed by peer")

    def guarded() -> None:
        try:
            all_gather()
        except RuntimeError as error:
            raise LostPeerError("an all-gather failed") from error

    with pytest.raises(LostPeerError) as raised:
        guarded()
    return raised.value, alive[0]


def test_the_connections_of_a_failed_exchange_close_before_the_others_are_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error, group = failing_exchange()
    assert group() is not None  # or the test would say nothing
    seen: list[Any] = []
    monkeypatch.setattr(SurvivingGroup, "_form", lambda *_, **__: seen.append(group()))
    membership = Mock()
    SurvivingGroup(membership, Mock(), Mock(), Mock()).form_anew(Mock(), error)
    assert seen == [None]
    membership.veto.assert_called_once_with("an all-gather failed")
