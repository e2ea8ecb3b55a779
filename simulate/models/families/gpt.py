"""GPT-2 shaped decoders as plans read them: named sizes, keys of [model], counts in closed form; torch-free.

simulate/models/gpt.py holds the network itself.
"""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

from simulate.models.families.parts import FORWARD_AND_BACKWARD, adapted, norm, transformer_block
from simulate.models.schema import Attends, Reads, Sizes
from simulate.models.shapes import ModelShape, ParameterShape

SIZES: dict[str, Sizes] = {
    # The default: small enough to train on a laptop in a minute, with a vocabulary of bytes.
    "gpt": {"layers": 4, "width": 128, "attention_heads": 4, "context": 128, "vocab": 256},
    # LTE's miniGPT for Shakespeare (arXiv 2402.16828, table 4), whose vocabulary is 65 characters there, bytes here.
    "minigpt": {"layers": 6, "width": 384, "attention_heads": 6, "context": 256, "vocab": 256},
    # Radford et al. 2019, table 2, with the published vocabulary and context.
    "gpt2": {"layers": 12, "width": 768, "attention_heads": 12, "context": 1024, "vocab": 50257},
    "gpt2_medium": {"layers": 24, "width": 1024, "attention_heads": 16, "context": 1024, "vocab": 50257},
    "gpt2_large": {"layers": 36, "width": 1280, "attention_heads": 20, "context": 1024, "vocab": 50257},
    "gpt2_xl": {"layers": 48, "width": 1600, "attention_heads": 25, "context": 1024, "vocab": 50257},
}


class GptModel(Reads, Attends):
    """Options of a GPT-2 shaped decoder."""

    family: ClassVar[str] = "gpt"
    sizes: ClassVar[dict[str, Sizes]] = SIZES
    name: str = "gpt"

    def shape(self) -> ModelShape:
        return gpt_shape(self.name, self.layers, self.width, self.attention_heads, self.context, self.vocab)


@lru_cache(maxsize=256)
def gpt_shape(name: str, layers: int, width: int, attention_heads: int, context: int, vocab: int) -> ModelShape:
    """Return the counts of a GPT-2 shaped decoder: pre-norm, learned positions, head tied to the token embedding."""
    linears, block = transformer_block(width, context)
    embeddings = (ParameterShape("embedding", (vocab, width)), ParameterShape("embedding", (context, width)))
    return ModelShape(
        name=name,
        family="gpt",
        adapted=adapted(linears, layers),
        tensors=(*embeddings, *(block * layers), *norm(width)),
        layers=layers,
        tokens=context,
        width=width,
        outputs=vocab,
        predictions=context,
        # Two products of t x d a token, of which the causal mask skips half.
        mixing_flops=2 * layers * context * context * width,
        outer_flops=FORWARD_AND_BACKWARD * 2 * vocab * width * context,
        attention_heads=attention_heads,
        mlp_width=4 * width,
    )
