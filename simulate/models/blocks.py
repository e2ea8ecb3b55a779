"""Pre-norm transformer blocks in plain PyTorch, shared by the networks.

Legend: S samples, T tokens of a sample, D width. The batch dimension leads everywhere, which is all that the
device-batched layers in simulate.adapters need.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class BlockStyle:
    """Where published transformers differ inside a block."""

    causal: bool
    """No token sees a later one."""
    gelu: str
    """As torch names it: "none" is the exact one, "tanh" its approximation."""
    norm_epsilon: float


class Attention(nn.Module):
    """Self-attention, causal unless told otherwise (Radford et al. 2019)."""

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x_STD: Tensor) -> Tensor:
        samples, tokens, width = x_STD.shape
        qkv = self.qkv(x_STD).view(samples, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.project(y.transpose(1, 2).reshape(samples, tokens, width))


class Mlp(nn.Module):
    """Two linear layers around a GELU, four times as wide inside."""

    def __init__(self, width: int, gelu: str) -> None:
        super().__init__()
        self.gelu = gelu
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x_STD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_STD), approximate=self.gelu))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int, heads: int, style: BlockStyle) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=style.norm_epsilon)
        self.attention = Attention(width, heads, style.causal)
        self.norm2 = nn.LayerNorm(width, eps=style.norm_epsilon)
        self.mlp = Mlp(width, style.gelu)

    def forward(self, x_STD: Tensor) -> Tensor:
        x_STD = x_STD + self.attention(self.norm1(x_STD))
        return x_STD + self.mlp(self.norm2(x_STD))
