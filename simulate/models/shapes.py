"""What a model is made of, without torch: the linear layers that are adapted, and everything that is replicated.

The planner and the clock count bytes and operations from here; a test holds each shape against the real network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

Kind = Literal["adapted", "norm", "bias", "embedding", "other"]

GPT_SIZES: dict[str, dict[str, int]] = {
    # The embedded default: small enough to train on a laptop in a minute, byte-level vocabulary.
    "gpt": {"layers": 4, "width": 128, "attention_heads": 4, "context": 128, "vocab": 256},
    # Radford et al. 2019, table 2, with the published vocabulary and context.
    "gpt2": {"layers": 12, "width": 768, "attention_heads": 12, "context": 1024, "vocab": 50257},
    "gpt2_medium": {"layers": 24, "width": 1024, "attention_heads": 16, "context": 1024, "vocab": 50257},
    "gpt2_large": {"layers": 36, "width": 1280, "attention_heads": 20, "context": 1024, "vocab": 50257},
    "gpt2_xl": {"layers": 48, "width": 1600, "attention_heads": 25, "context": 1024, "vocab": 50257},
}
MODEL_NAMES = tuple(GPT_SIZES)


@dataclass(frozen=True)
class LinearShape:
    """`count` adapted linear layers of one shape; W is (out_features, in_features)."""

    name: str
    out_features: int
    in_features: int
    count: int

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

    @property
    def elements(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class ModelShape:
    """A decoder-only transformer's counts; `tensors` are all parameters of the plain network, in its order.

    Those of kind "adapted" get low-rank pairs; every device has its own copy of all others, averaged at merges.
    """

    name: str
    adapted: tuple[LinearShape, ...]
    tensors: tuple[ParameterShape, ...]
    layers: int
    width: int
    attention_heads: int
    context: int
    vocab: int

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
        return [linear for _ in range(self.layers) for linear in self.adapted]


@lru_cache(maxsize=256)
def gpt_shape(name: str, layers: int, width: int, attention_heads: int, context: int, vocab: int) -> ModelShape:
    """Return the counts of a GPT-2 shaped decoder: pre-norm, learned positions, head tied to the token embedding.

    Equal sizes give the same object, so that what is worked out from a shape can be remembered by it.
    """
    linears = (("attention.qkv", 3, 1), ("attention.project", 1, 1), ("mlp.up", 4, 1), ("mlp.down", 1, 4))
    norm = (ParameterShape("norm", (width,)),) * 2
    linear = {
        name: (ParameterShape("adapted", (o * width, i * width)), ParameterShape("bias", (o * width,)))
        for name, o, i in linears
    }
    attention = (*norm, *linear["attention.qkv"], *linear["attention.project"])
    block = (*attention, *norm, *linear["mlp.up"], *linear["mlp.down"])
    embeddings = (ParameterShape("embedding", (vocab, width)), ParameterShape("embedding", (context, width)))
    return ModelShape(
        name=name,
        adapted=tuple(LinearShape(f"blocks.*.{n}", o * width, i * width, layers) for n, o, i in linears),
        tensors=(*embeddings, *(block * layers), *norm),
        layers=layers,
        width=width,
        attention_heads=attention_heads,
        context=context,
        vocab=vocab,
    )
