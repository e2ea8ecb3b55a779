"""Vision Transformers as plans read them: named sizes, keys of [model], counts in closed form; torch-free.

simulate/models/vit.py holds the network itself.
"""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

from simulate.models.families.parts import (
    IMAGENET,
    adapted,
    image_ends_flops,
    norm,
    num_patches,
    transformer_block,
    whole_linear,
)
from simulate.models.schema import Attends, Sees, Sizes
from simulate.models.shapes import ModelShape, ParameterShape

SIZES: dict[str, Sizes] = {
    # For images of 32 pixels, such as CIFAR's.
    "vit": {
        "layers": 6, "width": 192, "attention_heads": 3, "image": 32, "patch": 4, "colours": 3, "classes": 10,
    },
    # Dosovitskiy et al. 2021 (arXiv 2010.11929), table 1; S: Touvron et al. 2021 (arXiv 2012.12877), table 1.
    "vit_s16": {"layers": 12, "width": 384, "attention_heads": 6, **IMAGENET},
    "vit_s32": {"layers": 12, "width": 384, "attention_heads": 6, **IMAGENET, "patch": 32},
    "vit_b16": {"layers": 12, "width": 768, "attention_heads": 12, **IMAGENET},
    "vit_b32": {"layers": 12, "width": 768, "attention_heads": 12, **IMAGENET, "patch": 32},
    "vit_l16": {"layers": 24, "width": 1024, "attention_heads": 16, **IMAGENET},
    "vit_l32": {"layers": 24, "width": 1024, "attention_heads": 16, **IMAGENET, "patch": 32},
}  # fmt: skip


class VitModel(Sees, Attends):
    """Options of a Vision Transformer."""

    family: ClassVar[str] = "vit"
    sizes: ClassVar[dict[str, Sizes]] = SIZES
    name: str = "vit"

    def shape(self) -> ModelShape:
        return vit_shape(
            self.name, self.layers, self.width, self.attention_heads, self.image, self.patch, self.colours, self.classes
        )


@lru_cache(maxsize=256)
def vit_shape(
    name: str, layers: int, width: int, attention_heads: int, image: int, patch: int, colours: int, classes: int
) -> ModelShape:
    """Return the counts of a Vision Transformer with a class token and learned positions."""
    patches, patch_inputs = num_patches(image, patch), colours * patch**2
    tokens = patches + 1  # the class token leads
    linears, block = transformer_block(width, tokens)
    tables = (ParameterShape("embedding", (1, width)), ParameterShape("embedding", (tokens, width)))
    ends = (*norm(width), *whole_linear(classes, width))
    return ModelShape(
        name=name,
        family="vit",
        adapted=adapted(linears, layers),
        tensors=(*whole_linear(width, patch_inputs), *tables, *(block * layers), *ends),
        layers=layers,
        tokens=tokens,
        width=width,
        outputs=classes,
        predictions=1,
        mixing_flops=4 * layers * tokens * tokens * width,  # no causal mask: both products in full
        outer_flops=image_ends_flops(width, patches, patch_inputs, classes),
        attention_heads=attention_heads,
        mlp_width=4 * width,
        inputs=colours * image**2,
    )
