"""A GPT-2 shaped decoder in plain PyTorch: pre-norm blocks, learned positions, the head tied to the token embedding.

Legend: S samples, T tokens of a sample, D width. The batch dimension leads everywhere, which is all that the
device-batched layers in simulate.adapters need.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simulate.models.blocks import Attention, Block, BlockStyle
from simulate.models.shapes import ModelShape

__all__ = ["Attention", "Gpt"]

INIT_STD = 0.02
STYLE = BlockStyle(causal=True, gelu="tanh", norm_epsilon=1e-5)


class Gpt(nn.Module):
    """Tokens (S, T) int64 in, logits (S, T, vocab) out."""

    def __init__(self, shape: ModelShape, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.token = nn.Embedding(shape.vocab, shape.width)
        self.position = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape.width, shape.attention_heads, STYLE) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocab, bias=False)
        self.head.weight = self.token.weight
        self.activation_checkpointing = activation_checkpointing
        self._initialise(shape.layers)

    def _initialise(self, layers: int) -> None:
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                # Radford et al. 2019, section 2.3: what feeds the residual stream is scaled by 1/sqrt(its additions).
                residual = name.endswith((".project", ".down"))
                nn.init.normal_(module.weight, std=INIT_STD / math.sqrt(2 * layers) if residual else INIT_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens_ST: Tensor) -> Tensor:
        positions = torch.arange(tokens_ST.shape[1], device=tokens_ST.device).expand_as(tokens_ST)
        x_STD = self.token(tokens_ST) + self.position(positions)
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                x_STD = checkpoint(block, x_STD, use_reentrant=False, preserve_rng_state=False)
            else:
                x_STD = block(x_STD)
        return self.head(self.norm(x_STD))
