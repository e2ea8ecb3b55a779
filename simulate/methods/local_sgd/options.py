"""Keys of the [method] table; torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from simulate.comm.transfers import Wire
from simulate.config.method_options import DenseOptions, Pace, Steps


class LocalSgdOptions(DenseOptions):
    """Local SGD (arXiv 1805.09767) and FedAvg (arXiv 1602.05629): weights are averaged every T steps."""

    name: Literal["local-sgd"] = "local-sgd"
    merge_every: int = Field(default=10, gt=0)
    """Optimizer steps T of one round."""
    merge_transport: Literal["reduce", "server"] = "reduce"
    """reduce: everyone's weights are summed; server: push weights, pull their mean."""
    merge_optimizer: Literal["keep", "average", "reset"] = "keep"
    """Adam's moments at a merge: each device keeps its own, they are averaged as well (three times the bytes), or start
    anew."""
    participation: float = Field(default=1.0, gt=0, le=1)
    """Share of the devices that train in a round, drawn anew for each; below 1 needs the server and reset."""
    wire: Wire = "full"
    """Format in which the round's change of the weights travels."""
    merge_delay: int = Field(default=0, ge=0)
    """Steps that go on while a merge travels; 0 waits for it."""
    pace: Pace = "lockstep"
    """deadline: a slow device takes fewer steps of a round, at least one, and counts for what it trained on."""
    round_deadline_s: float | None = Field(default=None, gt=0)
    """Seconds of a round with pace = "deadline"; not set: what the fastest device needs for T steps."""
    steps_taken: Steps | None = None
    """Steps of each device, round by round, in place of a deadline, and again from the start: [[10, 3], [10, 4]]."""

    @property
    def round_steps(self) -> int:
        return self.merge_every

    def participants(self, devices: int) -> int:
        """Devices that train in a round: max(1, round(share x N))."""
        return max(1, round(self.participation * devices))

    @model_validator(mode="after")
    def _delay_goes_with_the_rest(self) -> LocalSgdOptions:
        self._check_delay()
        self._check_pace()
        if self.is_paced and self.participation < 1:
            raise ValueError(
                f"pace = 'deadline' is for devices that train in every round, not for participation = "
                f"{self.participation}; leave one of them away"
            )
        if self.merge_delay and self.participation < 1:
            raise ValueError(
                f"merge_delay = {self.merge_delay} lets devices go on from weights of their own, which participation = "
                f"{self.participation} takes from them; try --set method.merge_delay=0"
            )
        if self.merge_delay and self.merge_optimizer == "average":
            raise ValueError(
                f"merge_delay = {self.merge_delay} would add to averaged second moments what may make them negative; "
                "try --set method.merge_optimizer=keep"
            )
        return self

    @model_validator(mode="after")
    def _stateless_clients(self) -> LocalSgdOptions:
        if self.participation < 1 and (self.merge_transport != "server" or self.merge_optimizer != "reset"):
            raise ValueError(
                f"participation = {self.participation} leaves devices out, which then have neither weights nor "
                "optimizer state; it needs merge_transport = 'server' and merge_optimizer = 'reset'"
            )
        if self.wire != "full" and (self.merge_transport == "server" or self.merge_optimizer == "average"):
            raise ValueError(
                f"wire = {self.wire!r} carries changes of weights in an all-reduce; it needs "
                "merge_transport = 'reduce' and merge_optimizer other than 'average'"
            )
        return self
