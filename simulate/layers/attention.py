"""Replacement for torch's multi-head attention, made of layers with copies, so that its projections can be adapted.

Legend: S samples, Q queries, K keys, D width, A heads, E numbers of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_plain_attention(module: nn.Module) -> bool:
    """Whether `PerDeviceAttention` supports all settings of a module; `convert` runs others copy by copy."""
    return (
        type(module) is nn.MultiheadAttention
        and module.batch_first
        and module._qkv_same_embed_dim
        and module.bias_k is None
        and not module.add_zero_attn
    )


class PerDeviceAttention(nn.Module):
    """Attention with the signature of nn.MultiheadAttention(batch_first=True), around two given projections."""

    # nn.TransformerEncoderLayer reads these. A missing bias keeps it off its fused path for evaluation, which would
    # read the plain weights directly.
    batch_first = True
    _qkv_same_embed_dim = True
    in_proj_bias = None

    def __init__(self, plain: nn.MultiheadAttention, in_proj: nn.Module, out_proj: nn.Module) -> None:
        super().__init__()
        self.num_heads, self.embed_dim, self.dropout = plain.num_heads, plain.embed_dim, plain.dropout
        self.in_proj, self.out_proj = in_proj, out_proj

    def plain_names(self, name: str) -> dict[str, str]:
        """Map the names of the input projection's parameters here to their names in the plain module."""
        return {f"{name}.in_proj.{key}": f"{name}.in_proj_{key}" for key in ("weight", "bias")}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        projected: Sequence[Tensor]
        if query is key and key is value:  # self-attention: one product for all three
            projected = self.in_proj(query).chunk(3, dim=-1)
        else:
            # The projection is one adapted layer, so each input passes through all of it and a third is kept.
            projected = [self.in_proj(x).chunk(3, dim=-1)[i] for i, x in enumerate((query, key, value))]
        q_SAQE, k_SAKE, v_SAKE = (x_SKD.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x_SKD in projected)
        mask = self._mask(attn_mask, key_padding_mask, query)
        dropout = self.dropout if self.training else 0.0
        if need_weights:  # the fused function returns no weights
            scores = q_SAQE @ k_SAKE.mT / math.sqrt(q_SAQE.shape[-1])
            shares_SAQK = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            y_SAQE = F.dropout(shares_SAQK, dropout) @ v_SAKE
        else:
            y_SAQE = F.scaled_dot_product_attention(
                q_SAQE, k_SAKE, v_SAKE, mask, dropout, is_causal=is_causal and mask is None
            )
        y_SQD: Tensor = self.out_proj(y_SAQE.transpose(1, 2).flatten(2))
        if not need_weights:
            return y_SQD, None
        return y_SQD, shares_SAQK.mean(1) if average_attn_weights else shares_SAQK

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, like: Tensor) -> Tensor | None:
        """Return the sum of both masks as numbers to add to scores, in a form that broadcasts to (S, A, Q, K)."""
        parts = []
        if attn_mask is not None:
            additive = _additive(attn_mask, like)
            # torch takes (Q, K), or (S*A, Q, K).
            parts.append(additive if additive.ndim == 2 else additive.unflatten(0, (-1, self.num_heads)))
        if key_padding_mask is not None:
            parts.append(_additive(key_padding_mask, like)[:, None, None, :])
        return sum(parts[1:], parts[0]) if parts else None


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask as numbers to add to scores: −inf where a boolean one is true, which forbids that key."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(mask, -math.inf)
