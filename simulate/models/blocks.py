"""Pre-norm blocks in plain PyTorch, shared by the networks.

Legend: S samples, T tokens of a sample, D width, A heads, E numbers of a head. The batch dimension leads everywhere,
which is all that the device-batched layers in simulate.layers.lora need.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class BlockStyle:
    """Settings in which published transformers differ inside a block."""

    causal: bool
    """Whether a token attends to no later one."""
    gelu: str
    """Torch's name of the approximation: "none" is exact, "tanh" approximate."""
    norm_epsilon: float


class Attention(nn.Module):
    """Self-attention, causal by default (Radford et al. 2019)."""

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x_STD: Tensor) -> Tensor:
        samples, tokens, width = x_STD.shape
        qkv = self.qkv(x_STD).view(samples, tokens, 3, self.heads, width // self.heads)
        # One product for all three, then (3, S, A, T, E).
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.project(y.transpose(1, 2).reshape(samples, tokens, width))


class Mlp(nn.Module):
    """Two linear layers around a GELU; the inner width is four times the outer one, unless it is given."""

    def __init__(self, width: int, gelu: str, inner: int | None = None) -> None:
        super().__init__()
        self.gelu = gelu
        inner = 4 * width if inner is None else inner
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate=self.gelu))


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


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, *others: Tensor, recompute: bool) -> Tensor:
    """Pass activations through all blocks; with `recompute`, save only each block's input for the backward pass."""
    for block in blocks:
        if recompute:
            # Blocks draw nothing at random, so the generator's state need not be saved.
            x = checkpoint(block, x, *others, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x, *others)
    return x


def init_normal(model: nn.Module, layers: int, std: float) -> None:
    """Draw all matrices from a normal distribution, and zero biases.

    The two layers of a block that add to the residual stream get std/sqrt(2·layers), so that the stream's variance does
    not grow with depth (Radford et al. 2019, section 2.3).
    """
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            residual = name.endswith((".project", ".down"))
            nn.init.normal_(module.weight, std=std / math.sqrt(2 * layers) if residual else std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
