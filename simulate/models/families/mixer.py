"""MLP-Mixers as plans read them: named sizes, keys of [model], counts in closed form; torch-free.

simulate/models/mixer.py holds the network itself.
"""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

from simulate.models.families.parts import IMAGENET, adapted, image_ends_flops, linear, norm, num_patches, whole_linear
from simulate.models.schema import UNSET, Blocks, Sees, Size, Sizes
from simulate.models.shapes import ModelShape

SIZES: dict[str, Sizes] = {
    # Tolstikhin et al. 2021 (arXiv 2105.01601), table 1; T: Huh et al. 2024 (arXiv 2402.16828), table 3, at patch 32.
    # The published 8.8M parameters imply a token width of half the channels', as in S and B.
    "mixer_t16": {"layers": 6, "width": 384, "tokens_width": 192, "channels_width": 1536, **IMAGENET},
    "mixer_t32": {"layers": 6, "width": 384, "tokens_width": 192, "channels_width": 1536, **IMAGENET, "patch": 32},
    "mixer_s16": {"layers": 8, "width": 512, "tokens_width": 256, "channels_width": 2048, **IMAGENET},
    "mixer_s32": {"layers": 8, "width": 512, "tokens_width": 256, "channels_width": 2048, **IMAGENET, "patch": 32},
    "mixer_b16": {"layers": 12, "width": 768, "tokens_width": 384, "channels_width": 3072, **IMAGENET},
    "mixer_b32": {"layers": 12, "width": 768, "tokens_width": 384, "channels_width": 3072, **IMAGENET, "patch": 32},
}


class MixerModel(Sees, Blocks):
    """Options of an MLP-Mixer."""

    family: ClassVar[str] = "mixer"
    sizes: ClassVar[dict[str, Sizes]] = SIZES
    name: str = "mixer_s16"
    tokens_width: Size = UNSET
    """Inner width of the MLP over tokens."""
    channels_width: Size = UNSET
    """Inner width of the MLP over channels."""

    def shape(self) -> ModelShape:
        return mixer_shape(
            self.name, self.layers, self.width, self.tokens_width, self.channels_width, self.image, self.patch,
            self.colours, self.classes,
        )  # fmt: skip


@lru_cache(maxsize=256)
def mixer_shape(
    name: str, layers: int, width: int, tokens_width: int, channels_width: int, image: int, patch: int, colours: int,
    classes: int,
) -> ModelShape:  # fmt: skip
    """Return the counts of an MLP-Mixer: in each block an MLP over the tokens of a channel, and one over channels."""
    tokens, patch_inputs = num_patches(image, patch), colours * patch**2
    linears = (
        ("over_tokens.up", tokens_width, tokens, width), ("over_tokens.down", tokens, tokens_width, width),
        ("over_channels.up", channels_width, width, tokens), ("over_channels.down", width, channels_width, tokens),
    )  # fmt: skip
    t_up, t_down, c_up, c_down = (linear(o, i) for _, o, i, _ in linears)
    block = (*norm(width), *t_up, *t_down, *norm(width), *c_up, *c_down)
    return ModelShape(
        name=name,
        family="mixer",
        adapted=adapted(linears, layers),
        tensors=(
            *whole_linear(width, patch_inputs), *(block * layers), *norm(width), *whole_linear(classes, width),
        ),
        layers=layers,
        tokens=tokens,
        width=width,
        outputs=classes,
        predictions=1,
        mixing_flops=0,  # tokens are mixed by adapted layers
        outer_flops=image_ends_flops(width, tokens, patch_inputs, classes),
        mlp_width=channels_width,
        tokens_width=tokens_width,
        inputs=colours * image**2,
    )  # fmt: skip
