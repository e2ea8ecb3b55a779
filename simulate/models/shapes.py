"""Counts of a network: its adapted linear layers, its other parameters, its operations; torch-free.

The planner and the simulated clock compute bytes and seconds from a ModelShape without building the network. Closed
forms (simulate.models.families) or tracing (simulate.models.tracing) make it; a test compares it with the real network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

Kind = Literal["adapted", "norm", "bias", "embedding", "other"]
"""Role of a parameter; methods treat each kind in its own way."""


@dataclass(frozen=True)
class LinearShape:
    """Group of `count` adapted linear layers of one shape; W is (out_features, in_features)."""

    name: str
    """Module's name in the network; "*" stands for a block's index."""
    out_features: int
    in_features: int
    count: int
    rows: int = 1
    """Rows of one sample that pass through each: its tokens, or a convolution's output pixels."""

    @cached_property  # plans ask for it many times a candidate
    def weights(self) -> int:
        """Number of weights in one such layer."""
        return self.out_features * self.in_features

    def factors(self, rank: int, frozen_a: bool = False) -> int:
        """Return the elements of one head's A and B for one such layer, or of B alone if A is frozen."""
        return rank * (self.out_features + (0 if frozen_a else self.in_features))


@dataclass(frozen=True)
class ParameterShape:
    """Kind and shape of one parameter of the plain network."""

    kind: Kind
    shape: tuple[int, ...]

    @cached_property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether it is the matrix of a linear layer or a convolution."""
        return self.kind in ("adapted", "other") and len(self.shape) > 1


@dataclass(frozen=True)
class ActivationTrace:
    """Peak bytes of a forward and backward pass in float32: `fixed_bytes` + samples x `sample_bytes`."""

    fixed_bytes: int
    sample_bytes: int


@dataclass(frozen=True, eq=False)
class ModelShape:
    """Counts of a network, for one sample where they depend on the batch."""

    name: str
    family: str
    """Closed form of its activations: a key of simulate.models.families.table.FAMILIES, or "traced" for none."""
    adapted: tuple[LinearShape, ...]
    """Linear layers that get low-rank pairs, of one block."""
    tensors: tuple[ParameterShape, ...]
    """All parameters of the plain network, in its order; those that get no pairs have a copy on each device."""
    layers: int
    """Number of equal blocks."""
    tokens: int
    """Tokens of one sample inside the network: of text, or patches of an image (and a class token)."""
    width: int
    outputs: int
    """Number of classes of one prediction: the vocabulary's size, or an image's classes."""
    predictions: int
    """Predictions of one sample, each with its own loss."""
    mixing_flops: int
    """Forward operations of one sample inside the blocks that involve no weight: attention's."""
    outer_flops: int
    """Forward and backward operations of one sample in layers outside the blocks, which every method trains densely."""
    attention_heads: int = 0
    mlp_width: int = 0
    """Inner width of a block's MLP over channels."""
    tokens_width: int = 0
    """Inner width of a Mixer block's MLP over tokens."""
    notes: tuple[str, ...] = ()
    """Remarks on the network for a plan's reader."""
    inputs: int = 0
    """Numbers of one sample's input; 0 for token indices."""
    fixed_parameters: int = 0
    """Numbers in parameters that stay as they are: frozen by the user, or unused by the loss. All devices share them,
    and `tensors` leaves them out."""
    dense_trace: ActivationTrace | None = None
    """Measured activations of a network without a closed form, with every weight trained."""
    adapted_trace: ActivationTrace | None = None
    """The same with pairs of rank 1."""
    frozen_a_trace: ActivationTrace | None = None
    """The same with pairs of rank 1 whose A is frozen."""
    forward_trace: ActivationTrace | None = None
    """The same of an evaluation: a forward pass and the losses, without gradients."""

    @cached_property
    def replicated(self) -> tuple[ParameterShape, ...]:
        """Parameters without adapters, in the order of the network."""
        return tuple(tensor for tensor in self.tensors if tensor.kind != "adapted")

    @cached_property
    def adapted_parameters(self) -> int:
        """Number of weights in adapted layers."""
        return sum(linear.weights * linear.count for linear in self.adapted)

    @cached_property
    def replicated_parameters(self) -> int:
        """Number of parameters outside adapted layers."""
        return sum(tensor.elements for tensor in self.replicated)

    @property
    def parameters(self) -> int:
        """Number of parameters that dense training changes."""
        return self.adapted_parameters + self.replicated_parameters

    @property
    def all_parameters(self) -> int:
        """Number of parameters of the plain network."""
        return self.parameters + self.fixed_parameters

    def factors(self, rank: int, frozen_a: bool = False) -> int:
        """Return the elements of one head's trained factors over all adapted layers."""
        return rank * self._factors_of_rank_one[frozen_a]

    @cached_property
    def _factors_of_rank_one(self) -> tuple[int, int]:
        both, b_alone = (sum(x.factors(1, frozen) * x.count for x in self.adapted) for frozen in (False, True))
        return both, b_alone

    @cached_property
    def largest_dimension(self) -> int:
        """Largest min(out, in) of an adapted layer: the highest rank that an update can have."""
        return max(min(linear.out_features, linear.in_features) for linear in self.adapted)

    def in_order(self) -> list[LinearShape]:
        """Return one entry per adapted layer, in the order of the network."""
        # `adapted` lists one block's layers, all with the same count.
        return [linear for _ in range(self.adapted[0].count) for linear in self.adapted]

    @cached_property
    def adapted_flops(self) -> int:
        """Forward operations of one sample in the adapted layers."""
        return sum(2 * linear.weights * linear.count * linear.rows for linear in self.adapted)

    def factor_flops(self, rank: int, frozen_a: bool = False) -> int:
        """Return the forward operations of one sample in one head's factors, or in B alone if A is frozen."""
        return rank * self._factor_flops_of_rank_one[frozen_a]

    @cached_property
    def _factor_flops_of_rank_one(self) -> tuple[int, int]:
        both, b_alone = (
            sum(2 * x.factors(1, frozen) * x.count * x.rows for x in self.adapted) for frozen in (False, True)
        )
        return both, b_alone

    @cached_property
    def adapted_rows(self) -> int:
        """Rows of one sample over all adapted layers of one block."""
        return sum(linear.rows for linear in self.adapted)


def shape_table(shape: ModelShape) -> dict[str, Any]:
    """Return a shape as JSON has it."""
    return asdict(shape)


def shape_of_table(table: Mapping[str, Any]) -> ModelShape:
    """Return the shape of a table that `shape_table` made; raises TypeError or KeyError for another."""
    traces = {key: value and ActivationTrace(**value) for key, value in table.items() if key.endswith("_trace")}
    tensors = tuple(ParameterShape(tensor["kind"], tuple(tensor["shape"])) for tensor in table["tensors"])
    adapted = tuple(LinearShape(**linear) for linear in table["adapted"])
    return ModelShape(**{**table, **traces, "tensors": tensors, "adapted": adapted, "notes": tuple(table["notes"])})
