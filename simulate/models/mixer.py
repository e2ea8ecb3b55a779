"""MLP-Mixers in plain PyTorch (Tolstikhin et al. 2021, arXiv 2105.01601).

Legend: S samples, C colours, P patches of an image, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from simulate.models.blocks import Mlp, run_blocks
from simulate.models.families.mixer import MixerModel
from simulate.models.vit import init_truncated_normal, patches_of

NORM_EPSILON = 1e-6


class MixerBlock(nn.Module):
    """Block of an MLP over the patches of each channel, then one over the channels of each patch."""

    def __init__(self, size: MixerModel) -> None:
        super().__init__()
        patches = (size.image // size.patch) ** 2
        self.norm1 = nn.LayerNorm(size.width, eps=NORM_EPSILON)
        self.over_tokens = Mlp(patches, "none", size.tokens_width)
        self.norm2 = nn.LayerNorm(size.width, eps=NORM_EPSILON)
        self.over_channels = Mlp(size.width, "none", size.channels_width)

    def forward(self, x_SPD: Tensor) -> Tensor:
        # Transposed, so that the linear layers mix patches; a row is then a channel.
        x_SPD = x_SPD + self.over_tokens(self.norm1(x_SPD).transpose(1, 2)).transpose(1, 2)
        return x_SPD + self.over_channels(self.norm2(x_SPD))


class Mixer(nn.Module):
    """Network: images (S, C, image, image) in, logits (S, classes) out."""

    trained_whole = ("patch", "head")

    def __init__(self, size: MixerModel, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.patch_side = size.patch
        self.patch = nn.Linear(size.colours * size.patch**2, size.width)
        self.blocks = nn.ModuleList(MixerBlock(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width, eps=NORM_EPSILON)
        self.head = nn.Linear(size.width, size.classes)
        self.activation_checkpointing = activation_checkpointing
        init_truncated_normal(self)

    def forward(self, images_SCYX: Tensor) -> Tensor:
        x_SPD = self.patch(patches_of(images_SCYX, self.patch_side))
        x_SPD = run_blocks(self.blocks, x_SPD, recompute=self.activation_checkpointing and self.training)
        return self.head(self.norm(x_SPD).mean(1))  # no class token: the mean over patches
