"""A Llama shaped decoder in plain PyTorch (Touvron et al. 2023, arXiv 2302.13971): RMSNorm, rotary positions, SwiGLU.

simulate.methods.build_network builds it for the family "llama"; simulate.models.families counts the same layers.

Legend: S samples, T tokens of a sample, D width, A heads, E numbers of a head, P = E / 2 pairs that are rotated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simulate.models.blocks import init_normal, run_blocks
from simulate.models.families.llama import LlamaModel

INIT_STD = 0.02
NORM_EPSILON = 1e-6
ROTARY_BASE = 10_000.0
"""Pair p turns by base^(−2p/E) radians a token (Su et al. 2021, arXiv 2104.09864, section 3.2.2)."""


class RotaryAttention(nn.Module):
    """Causal self-attention whose queries and keys are rotated by their position."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.project = nn.Linear(width, width, bias=False)

    def forward(self, x_STD: Tensor, cos_T1P: Tensor, sin_T1P: Tensor) -> Tensor:
        q_STAE, k_STAE, v_STAE = (
            layer(x_STD).unflatten(2, (self.heads, -1)) for layer in (self.query, self.key, self.value)
        )
        # Rotated before the transpose, so that the output is laid out like the input and reshapes without a copy.
        q_SATE, k_SATE = (rotate_pairs(x, cos_T1P, sin_T1P).transpose(1, 2) for x in (q_STAE, k_STAE))
        y_SATE = F.scaled_dot_product_attention(q_SATE, k_SATE, v_STAE.transpose(1, 2), is_causal=True)
        return self.project(y_SATE.transpose(1, 2).reshape(x_STD.shape))


def rotate_pairs(x_STAE: Tensor, cos_T1P: Tensor, sin_T1P: Tensor) -> Tensor:
    """Rotate each pair (x_p, x_{p+P}) by its angle; pairs join both halves, as in the published checkpoints."""
    first, second = x_STAE.chunk(2, dim=-1)
    return torch.cat([first * cos_T1P - second * sin_T1P, second * cos_T1P + first * sin_T1P], dim=-1)


def rotary_angles(tokens: int, head_size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of position / base^(2p/E), (T, 1, P), equal for all heads.

    They are computed in every pass: a buffer would have to follow the network to other devices and the meta device.
    """
    pairs_P = torch.arange(0, head_size, 2, device=like.device, dtype=torch.float64) / head_size
    angles_TP = torch.outer(torch.arange(tokens, device=like.device, dtype=torch.float64), ROTARY_BASE**-pairs_P)
    angles_T1P = angles_TP.unsqueeze(1)
    return angles_T1P.cos().to(like.dtype), angles_T1P.sin().to(like.dtype)


class GatedMlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x_STD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_STD)) * self.up(x_STD))


class LlamaBlock(nn.Module):
    """Pre-norm block of rotary attention and SwiGLU."""

    def __init__(self, size: LlamaModel) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(size.width, eps=NORM_EPSILON)
        self.attention = RotaryAttention(size.width, size.attention_heads)
        self.norm2 = nn.RMSNorm(size.width, eps=NORM_EPSILON)
        self.mlp = GatedMlp(size.width, size.mlp_width)

    def forward(self, x_STD: Tensor, cos_T1P: Tensor, sin_T1P: Tensor) -> Tensor:
        x_STD = x_STD + self.attention(self.norm1(x_STD), cos_T1P, sin_T1P)
        return x_STD + self.mlp(self.norm2(x_STD))


class Llama(nn.Module):
    """Network: tokens (S, T) int64 in, logits (S, T, vocab) out."""

    trained_whole = ("head",)  # unlike GPT-2's, its head is not tied, so that `convert` needs this mark

    def __init__(self, size: LlamaModel, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.head_size = size.width // size.attention_heads
        self.token = nn.Embedding(size.vocab, size.width)
        self.blocks = nn.ModuleList(LlamaBlock(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width, eps=NORM_EPSILON)
        self.head = nn.Linear(size.width, size.vocab, bias=False)
        self.activation_checkpointing = activation_checkpointing
        init_normal(self, size.layers, INIT_STD)

    def forward(self, tokens_ST: Tensor) -> Tensor:
        x_STD = self.token(tokens_ST)
        angles = rotary_angles(tokens_ST.shape[1], self.head_size, x_STD)
        recompute = self.activation_checkpointing and self.training
        return self.head(self.norm(run_blocks(self.blocks, x_STD, *angles, recompute=recompute)))
