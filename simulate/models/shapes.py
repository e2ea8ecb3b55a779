"""What a model is made of, without torch: the linear layers that are adapted, and everything that is replicated.

The planner and the clock count bytes and operations from here; a test holds each shape against the real network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Kind = Literal["adapted", "norm", "bias", "embedding", "other"]


@dataclass(frozen=True)
class LinearShape:
    """`count` adapted linear layers of one shape; W is (out_features, in_features)."""

    name: str
    out_features: int
    in_features: int
    count: int
    rows: int = 1
    """Rows of one sample that pass through it: its tokens, or a convolution's pixels."""

    @property
    def weights(self) -> int:
        """Number of weights in one such layer."""
        return self.out_features * self.in_features

    def factors(self, rank: int, frozen_a: bool = False) -> int:
        """Number of elements of one head's A and B for one such layer, or of B alone where A is not trained."""
        return rank * (self.out_features + (0 if frozen_a else self.in_features))


@dataclass(frozen=True)
class ParameterShape:
    """One parameter of the plain network."""

    kind: Kind
    shape: tuple[int, ...]

    @cached_property
    def elements(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether it is the matrix of a linear layer or a convolution."""
        return self.kind in ("adapted", "other") and len(self.shape) > 1


@dataclass(frozen=True)
class ActivationTrace:
    """Peak bytes of a pass forward and back in float32, over samples: `fixed_bytes` + samples x `sample_bytes`.

    Taken by simulate.models.tracing.
    """

    fixed_bytes: int
    sample_bytes: int


@dataclass(frozen=True, eq=False)
class ModelShape:
    """A network's counts; `tensors` are all parameters of the plain network, in its order.

    Those of kind "adapted" get low-rank pairs; every device has its own copy of all others, averaged at merges.
    """

    name: str
    family: str
    """Which closed form its activations have: a key of simulate.models.sizes.FAMILIES, or "traced"."""
    adapted: tuple[LinearShape, ...]
    tensors: tuple[ParameterShape, ...]
    layers: int
    """Equal blocks."""
    tokens: int
    """Of one sample, inside the network: tokens of text, patches of an image."""
    width: int
    outputs: int
    """Classes that a prediction chooses from: the vocabulary, or kinds of images."""
    predictions: int
    """Of one sample, each with a loss of its own."""
    mixing_flops: int
    """Forward operations of one sample inside the blocks that no weight takes part in: attention."""
    outer_flops: int
    """Operations of one sample's whole step in layers outside the blocks, which every method trains densely."""
    attention_heads: int = 0
    mlp_width: int = 0
    """Inner width of a block's two-layer network over channels."""
    tokens_width: int = 0
    """Inner width of a Mixer block's two-layer network over tokens."""
    notes: tuple[str, ...] = ()
    """What a plan should say of it."""
    inputs: int = 0
    """Numbers of one sample that enters; 0 for token indices."""
    dense_trace: ActivationTrace | None = None
    """What a network without a closed form was measured to need, with every weight trained."""
    adapted_trace: ActivationTrace | None = None
    """The same with pairs of rank 1."""
    frozen_a_trace: ActivationTrace | None = None
    """The same with pairs of rank 1 whose A is frozen."""

    @cached_property
    def replicated(self) -> tuple[ParameterShape, ...]:
        """The parameters that no adapter serves, in the order of the network."""
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
        """Number of parameters of the dense model."""
        return self.adapted_parameters + self.replicated_parameters

    def factors(self, rank: int, frozen_a: bool = False) -> int:
        """Number of elements of one head's trained factors over all adapted layers."""
        return rank * self._factors_of_rank_one[frozen_a]

    @cached_property
    def _factors_of_rank_one(self) -> tuple[int, int]:
        both, b_alone = (sum(x.factors(1, frozen) * x.count for x in self.adapted) for frozen in (False, True))
        return both, b_alone

    @cached_property
    def largest_dimension(self) -> int:
        """The largest min(out, in) of an adapted layer: the rank that a full update can have."""
        return max(min(linear.out_features, linear.in_features) for linear in self.adapted)

    def in_order(self) -> list[LinearShape]:
        """Return one entry per adapted layer, in the order of the network."""
        return [linear for _ in range(self.adapted[0].count) for linear in self.adapted]

    @cached_property
    def adapted_flops(self) -> int:
        """Forward operations of one sample in the adapted layers."""
        return sum(2 * linear.weights * linear.count * linear.rows for linear in self.adapted)

    def factor_flops(self, rank: int, frozen_a: bool = False) -> int:
        """Forward operations of one sample in one head's factors, or in B alone where A is not trained."""
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
