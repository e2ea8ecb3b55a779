"""Llama shaped decoders as plans read them: named sizes, keys of [model], counts in closed form; torch-free.

simulate/models/llama.py holds the network itself.
"""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

from pydantic import model_validator

from simulate.models.families.parts import FORWARD_AND_BACKWARD, adapted, linear, norm
from simulate.models.schema import UNSET, Attends, Reads, Size, Sizes
from simulate.models.shapes import ModelShape, ParameterShape

SIZES: dict[str, Sizes] = {
    # As small as gpt, for the same bytes.
    "llama": {"layers": 4, "width": 128, "attention_heads": 4, "mlp_width": 352, "context": 128, "vocab": 256},
    # The networks that ReLoRA (arXiv 2307.05695) and GaLore (arXiv 2403.03507) pre-train, at the latter's 256 tokens.
    "llama_60m": {
        "layers": 8, "width": 512, "attention_heads": 8, "mlp_width": 1376, "context": 256, "vocab": 32000,
    },
    "llama_1b": {
        "layers": 24, "width": 2048, "attention_heads": 32, "mlp_width": 5461, "context": 256, "vocab": 32000,
    },
    # Touvron et al. 2023 (arXiv 2302.13971), table 2.
    "llama_7b": {
        "layers": 32, "width": 4096, "attention_heads": 32, "mlp_width": 11008, "context": 2048, "vocab": 32000,
    },
}  # fmt: skip


class LlamaModel(Reads, Attends):
    """Options of a Llama shaped decoder."""

    family: ClassVar[str] = "llama"
    sizes: ClassVar[dict[str, Sizes]] = SIZES
    name: str = "llama"
    mlp_width: Size = UNSET
    """Inner width of the gated MLP."""

    @model_validator(mode="after")
    def _positions_rotate_in_pairs(self) -> LlamaModel:
        if (self.width // self.attention_heads) % 2:
            raise ValueError(
                f"width / attention_heads = {self.width // self.attention_heads} is odd, and rotary positions rotate "
                "pairs of numbers; change one of them"
            )
        return self

    def shape(self) -> ModelShape:
        return llama_shape(
            self.name, self.layers, self.width, self.attention_heads, self.mlp_width, self.context, self.vocab
        )


@lru_cache(maxsize=256)
def llama_shape(
    name: str, layers: int, width: int, attention_heads: int, mlp_width: int, context: int, vocab: int
) -> ModelShape:
    """Return the counts of a Llama shaped decoder: RMSNorm, rotary positions, SwiGLU, no biases, a head of its own."""
    attention = tuple((f"attention.{x}", width, width, context) for x in ("query", "key", "value", "project"))
    gates = tuple((f"mlp.{x}", mlp_width, width, context) for x in ("gate", "up"))
    linears = (*attention, *gates, ("mlp.down", width, mlp_width, context))
    weights = [linear(o, i, bias=False) for _, o, i, _ in linears]
    one_norm = norm(width, bias=False)
    # In the order of the network: the four layers of attention, then those of the MLP, each behind a norm.
    block = (*one_norm, *(w for x in weights[:4] for w in x), *one_norm, *(w for x in weights[4:] for w in x))
    return ModelShape(
        name=name,
        family="llama",
        adapted=adapted(linears, layers),
        tensors=(
            ParameterShape("embedding", (vocab, width)), *(block * layers), *one_norm,
            ParameterShape("other", (vocab, width)),
        ),
        layers=layers,
        tokens=context,
        width=width,
        outputs=vocab,
        predictions=context,
        mixing_flops=2 * layers * context * context * width,
        outer_flops=FORWARD_AND_BACKWARD * 2 * vocab * width * context,
        attention_heads=attention_heads,
        mlp_width=mlp_width,
    )  # fmt: skip
