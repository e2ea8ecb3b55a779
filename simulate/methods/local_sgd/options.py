"""Keys of [method] for local SGD; torch-free.

Some keys exclude each other, since a device that sits out has no state; simulate.config.run validates with this class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from simulate.comm.transfers import Wire
from simulate.config.method_options import MethodOptions, RoundOptions, quorum_key
from simulate.config.tables import Cluster, Train
from simulate.models.schema import ModelOptions


class LocalSgdOptions(RoundOptions):
    """Local SGD (arXiv 1805.09767) and FedAvg (arXiv 1602.05629): weights are averaged every T steps."""

    takes_classes: ClassVar[bool] = True
    name: Literal["local-sgd"] = "local-sgd"
    merge_transport: Literal["reduce", "server"] = "reduce"
    """reduce: everyone's weights are summed; server: push weights, pull their mean."""
    merge_optimizer: Literal["keep", "average", "reset"] = "keep"
    """Adam's moments at a merge: each device keeps its own, they are averaged as well (three times the bytes), or start
    anew."""
    participation: float = Field(default=1.0, gt=0, le=1)
    """Share of the devices that train in a round, drawn anew for each; below 1 needs the server and reset."""
    wire: Wire = "full"
    """Format in which the round's change of the weights travels."""

    @property
    def reads_adam_moments(self) -> bool:
        return self.merge_optimizer == "average"

    def participants(self, devices: int) -> int:
        """Devices that train in a round: max(1, round(share x N))."""
        return max(1, round(self.participation * devices))

    @model_validator(mode="after")
    def _delay_goes_with_the_rest(self) -> LocalSgdOptions:
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

    def classes_rule(self, of_classes: Sequence[MethodOptions]) -> str | None:
        if self.participation == 1:
            return None
        return (
            f"method.participation = {self.participation} draws devices that count by their shards, and "
            "cluster.class has unequal ones; leave one of them away"
        )

    def check_quorum(self, cluster: Cluster) -> None:
        super().check_quorum(cluster)
        refused = {"participation": self.participation < 1, "merge_optimizer": self.merge_optimizer == "average"}
        for key in (key for key, is_set in refused.items() if is_set):
            raise ValueError(
                f"method.{key} = {getattr(self, key)!r} does not go with cluster.{quorum_key(cluster)}: late devices "
                "bring changes of their weights alone, when they can; leave one of them away"
            )

    def check(self, model: ModelOptions, train: Train, cluster: Cluster) -> None:
        super().check(model, train, cluster)
        if not self.reads_adam_moments:
            return
        if train.optimizer != "adamw":
            raise ValueError(
                f"train.optimizer = {train.optimizer!r} has other moments than method.merge_optimizer = 'average' "
                "sends; try --set train.optimizer=adamw or --set method.merge_optimizer=keep"
            )
        if train.optimizer_state == "8bit":
            raise ValueError(
                "train.optimizer_state = '8bit' has no moments that method.merge_optimizer = 'average' could send; "
                "try --set train.optimizer_state=fp32 or --set method.merge_optimizer=keep"
            )
