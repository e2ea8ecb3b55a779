"""Acts of all devices in a run that goes on without lost ones: all of them have done one, or none.

Whoever is lost in the middle of an exchange leaves some processes with its result and others without. So each part of
the loop that exchanges is an act: everybody arrives, exchanges, and applies nothing for good before all have voted that
they have everything. Where somebody is lost, the others take back what they have changed, form the group anew, and do
the act again. The loop calls `together`; simulate.launch.survivors keeps the group. Without a group, an act is a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from simulate.common.errors import LostPeerError
from simulate.methods.base import Method

Result = TypeVar("Result")
CHANGES_MOMENTS = ("average", "prune", "reset")
"""Settings of `method.merge_optimizer` with which a merge changes moments."""


class StateReplacedError(Exception):
    """The session's state is another one: the loop goes on at its step; `is_at_merge`: at the merge that follows it."""

    def __init__(self, is_at_merge: bool = False) -> None:
        super().__init__()
        self.is_at_merge = is_at_merge


class Acting(Protocol):
    """The part of a session (simulate.training.loop) that an act needs."""

    method: Method

    @property
    def group(self) -> Group | None: ...


class Group(Protocol):
    """The processes that are there now; each function raises LostPeerError where the group must be formed anew."""

    def arrive(self, session: Any) -> None:
        """Wait for all others before a merge; whoever stays away longer than the deadline is left behind."""

    def confirm(self) -> None:
        """Return once all others have everything that this act exchanges."""

    def form_anew(self, session: Any, error: LostPeerError) -> None:
        """Go on with those who are left; raises StateReplacedError where this process takes over another state."""

    def admit(self, session: Any) -> None:
        """Take in who waits to join, where all have seen that somebody does."""


class Backup:
    """Copies of all tensors that a merge changes, to take it back."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self._copies = [(tensor, tensor.detach().clone()) for tensor in merge_tensors(method)]
        # Old products are made room for by the first merge.
        self._empty = [
            (module, name) for module in method.model.modules() for name, t in module._buffers.items() if t is None
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back as it was."""
        for tensor, copy in self._copies:
            tensor.copy_(copy)
        for module, name in self._empty:
            module._buffers[name] = None
        self.method.healthy_N = None


def merge_tensors(method: Method) -> list[Tensor]:
    """Return the tensors that a merge of this method may change."""
    state = method.state.state_dict()
    with_moments = getattr(method.run.method, "merge_optimizer", "") in CHANGES_MOMENTS
    return [
        tensor
        for name, tensor in state.items()
        # The start weights change with the group alone, which no merge takes back.
        if not name.endswith(".start_weight")
        and (with_moments or not name.startswith("optimizer.") or name.endswith(".step"))
    ]


def together(session: Acting, act: Callable[[], Result], changes: bool = False, arrives: bool = False) -> Result:
    """Do an act with all others, again where some are lost meanwhile; `changes`: it changes what a merge changes.

    `arrives` waits for the others first, no longer than the deadline.
    """
    group = session.group
    if group is None:
        return act()
    while True:
        backup = Backup(session.method) if changes else None
        try:
            if arrives:
                group.arrive(session)
            result = act()
            group.confirm()
            return result
        except LostPeerError as error:
            if backup is not None:
                backup.restore()
            _clear_gradients(session.method)
            group.form_anew(session, error)


def _clear_gradients(method: Method) -> None:
    for parameter in (*method.parameters.values(), *method.model.parameters()):
        parameter.grad = None
