"""Keys that the [method] tables of several methods share; torch-free."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from simulate.common import toml_io
from simulate.layers.formats import Quantize

Pace = Literal["lockstep", "deadline"]
"""Whether all devices take all steps of a round, or each as many as fit into the round's time."""
DEFAULT_SCALE = 64.0  # alpha / rank of the paper's best run: alpha = 4096 at rank 64


def _as_tuples(value: Any) -> Any:
    """TOML has lists; frozen options, which others remember results by, need tuples."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


Steps = Annotated[tuple[tuple[int, ...], ...], BeforeValidator(_as_tuples), Field(min_length=1)]
"""Steps of each device, round by round; they start again where they end."""


class MethodOptions(toml_io.Schema):
    """What all methods share."""

    @property
    def round_steps(self) -> int:
        """Optimizer steps T between two points at which all devices hold one model."""
        return 1

    @property
    def merges_per_round(self) -> int:
        """Staggered merges in one round, each of another group of layers."""
        return 1

    @property
    def steps_apart(self) -> int:
        """Steps from one merge to the next, of whichever group of layers."""
        return self.round_steps // self.merges_per_round

    @property
    def late_steps(self) -> int:
        """Steps from a merge until its result is there."""
        return getattr(self, "merge_delay", 0)

    @property
    def frozen_format(self) -> Quantize:
        """Format of frozen weights, where there are any."""
        frozen: Quantize = getattr(self, "quantize", "none")
        return frozen

    @property
    def is_paced(self) -> bool:
        """Whether a slow device takes fewer steps of a round, instead of all waiting for it."""
        return getattr(self, "pace", "lockstep") == "deadline"

    @property
    def deadline_s(self) -> float | None:
        """Seconds of a paced round, if they are given."""
        return getattr(self, "round_deadline_s", None)

    @property
    def given_steps(self) -> Steps | None:
        """Steps of each device in each paced round, if they are given."""
        return getattr(self, "steps_taken", None)

    def _check_pace(self) -> None:
        if not self.is_paced:
            for key in ("round_deadline_s", "steps_taken"):
                if getattr(self, key) is not None:
                    raise ValueError(
                        f"{key} is for pace = 'deadline'; try --set method.pace=deadline, or leave it away"
                    )
            return
        for key, value in (("merge_delay", self.late_steps), ("fragments", self.merges_per_round - 1)):
            if value:
                raise ValueError(
                    f"pace = 'deadline' does not go with {key} = {getattr(self, key)}: what is merged has its weight "
                    f"from the steps of one round; leave {key} away"
                )
        every = self.round_steps
        bad = next((c for counts in self.given_steps or () for c in counts if not 1 <= c <= every), None)
        if bad is not None:
            raise ValueError(f"steps_taken has {bad}, which is not from 1 to merge_every = {every}; correct it")

    def _check_delay(self) -> None:
        if self.late_steps >= self.steps_apart and self.late_steps:
            groups = f" / fragments = {self.steps_apart}" if self.merges_per_round > 1 else f" = {self.steps_apart}"
            raise ValueError(
                f"merge_delay = {self.late_steps} is not below merge_every{groups}; lower it, since one merge travels "
                "at a time"
            )


class DenseOptions(MethodOptions):
    """Methods that train every weight."""


class AdapterOptions(MethodOptions):
    """Methods that train low-rank pairs on frozen weights."""

    rank: int = Field(default=32, gt=0)
    """Rank r of one head."""
    alpha: float = Field(default=0.0, gt=0)
    """The adapter's product is scaled by alpha / rank; not set: 64 x rank."""
    adapter_learning_rate: float | None = Field(default=None, gt=0)
    """Not set: train.learning_rate x rank / alpha, so that an Adam step moves W as much as a dense step would."""

    @model_validator(mode="before")
    @classmethod
    def _fill_alpha(cls, given: Any) -> Any:
        if isinstance(given, dict) and "alpha" not in given and isinstance(rank := given.get("rank", 32), int):
            return {**given, "alpha": DEFAULT_SCALE * max(rank, 1)}
        return given

    @property
    def scale(self) -> float:
        """s = alpha / r."""
        return self.alpha / self.rank

    def held_rank(self, devices: int) -> int:
        """Rank of all the pairs that one device holds and trains for a layer."""
        return self.rank

    def row_rank(self, devices: int) -> int:
        """Rank that one row of activations passes through."""
        return self.rank

    @property
    def remembers_product(self) -> bool:
        """Whether the product at the last merge is kept and subtracted in every pass."""
        return False

    @property
    def keeps_master(self) -> bool:
        """Whether merged weights are kept in full precision beside quantised ones."""
        return False


class SharedAdapterOptions(AdapterOptions):
    """Methods whose adapters all devices share."""

    quantize: Quantize = "none"
    """Format of the frozen weights; products unpack a layer at a time."""
