"""A GPT-2 shaped decoder in plain PyTorch: pre-norm blocks, learned positions, the head tied to the token embedding.

Legend: S samples, T tokens of a sample, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simulate.models.blocks import Block, BlockStyle, init_normal, run_blocks
from simulate.models.families.gpt import GptModel

INIT_STD = 0.02
STYLE = BlockStyle(causal=True, gelu="tanh", norm_epsilon=1e-5)


class Gpt(nn.Module):
    """Network: tokens (S, T) int64 in, logits (S, T, vocab) out."""

    def __init__(self, size: GptModel, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.token = nn.Embedding(size.vocab, size.width)
        self.position = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size.width, size.attention_heads, STYLE) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocab, bias=False)
        self.head.weight = self.token.weight  # tied (Radford et al. 2019), so that `convert` gives it no adapter
        self.activation_checkpointing = activation_checkpointing
        init_normal(self, size.layers, INIT_STD)

    def forward(self, tokens_ST: Tensor) -> Tensor:
        # One row of positions a sample, because each device has its own table.
        positions = torch.arange(tokens_ST.shape[1], device=tokens_ST.device).expand_as(tokens_ST)
        x_STD = self.token(tokens_ST) + self.position(positions)
        x_STD = run_blocks(self.blocks, x_STD, recompute=self.activation_checkpointing and self.training)
        return self.head(self.norm(x_STD))
