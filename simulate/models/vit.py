"""Vision Transformers in plain PyTorch (Dosovitskiy et al. 2021, arXiv 2010.11929; the small one: Touvron et al. 2021).

Legend: S samples, C colours, P patches of an image, T = P + 1 tokens (the class token leads), D width. The class token
and the positions are embedding tables, because simulate.layers.convert gives every device its own of those.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simulate.models.blocks import Block, BlockStyle, run_blocks
from simulate.models.families.vit import VitModel

INIT_STD = 0.02
# Exact GELU and epsilon 1e-6, as in the published checkpoints.
STYLE = BlockStyle(causal=False, gelu="none", norm_epsilon=1e-6)


class Vit(nn.Module):
    """Network: images (S, C, image, image) in, logits (S, classes) out."""

    trained_whole = ("patch", "head")  # both ends get no adapters: simulate.models.families counts them so

    def __init__(self, size: VitModel, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.patch_side, patches = size.patch, (size.image // size.patch) ** 2
        self.patch = nn.Linear(size.colours * size.patch**2, size.width)
        self.class_token = nn.Embedding(1, size.width)
        self.position = nn.Embedding(patches + 1, size.width)
        self.blocks = nn.ModuleList(Block(size.width, size.attention_heads, STYLE) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width, eps=STYLE.norm_epsilon)
        self.head = nn.Linear(size.width, size.classes)
        self.activation_checkpointing = activation_checkpointing
        init_truncated_normal(self)

    def forward(self, images_SCYX: Tensor) -> Tensor:
        x_SPD = self.patch(patches_of(images_SCYX, self.patch_side))
        samples, patches, _ = x_SPD.shape
        # One row of positions a sample, because each device has its own table.
        positions = torch.arange(patches + 1, device=images_SCYX.device).expand(samples, -1)
        first_S1D = self.class_token(torch.zeros_like(positions[:, :1]))
        x_STD = torch.cat([first_S1D, x_SPD], dim=1) + self.position(positions)
        x_STD = run_blocks(self.blocks, x_STD, recompute=self.activation_checkpointing and self.training)
        # The norm treats each token alone, so it is computed for the class token only.
        return self.head(self.norm(x_STD[:, 0]))


def init_truncated_normal(model: nn.Module) -> None:
    """Draw all matrices from a truncated normal distribution, and zero biases."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.trunc_normal_(module.weight, std=INIT_STD)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def patches_of(images_SCYX: Tensor, side: int) -> Tensor:
    """Return patches row by row, (S, P, C*side*side), each flattened in the order of a convolution's kernel."""
    samples, colours, height, width = images_SCYX.shape
    tiles = images_SCYX.view(samples, colours, height // side, side, width // side, side)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(samples, -1, colours * side * side)
