"""Parts of the families' counts in closed form; torch-free.

The planner tries thousands of candidates, so it cannot build a network for each: every family counts its layers and
parameters with these. Equal sizes give the same shape object, so that caches can use its identity as their key.

Legend of the formulas: d width, t tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

from simulate.models.schema import Sizes
from simulate.models.shapes import LinearShape, ParameterShape

IMAGENET: Sizes = {"image": 224, "patch": 16, "colours": 3, "classes": 1000}
"""Sizes that networks named for ImageNet share."""
Sides = tuple[str, int, int, int]
"""Linear layer of a block: its name, outputs, inputs, and rows of a sample."""
FORWARD_AND_BACKWARD = 3
"""Products of a dense layer: one forward, and backward one for the inputs and one for the weights (Kaplan et al. 2020,
section 2.1)."""


def linear(outputs: int, inputs: int, bias: bool = True) -> tuple[ParameterShape, ...]:
    """Return the parameters of a linear layer whose weight gets adapters."""
    weight = ParameterShape("adapted", (outputs, inputs))
    return (weight, ParameterShape("bias", (outputs,))) if bias else (weight,)


def whole_linear(outputs: int, inputs: int) -> tuple[ParameterShape, ...]:
    """Return the parameters of a linear layer with bias that gets no adapter."""
    return (ParameterShape("other", (outputs, inputs)), ParameterShape("bias", (outputs,)))


def norm(width: int, bias: bool = True) -> tuple[ParameterShape, ...]:
    """Return the parameters of a norm."""
    return (ParameterShape("norm", (width,)),) * (2 if bias else 1)


def adapted(linears: Sequence[Sides], layers: int) -> tuple[LinearShape, ...]:
    """Return the adapted layers of all blocks, from one block's."""
    return tuple(LinearShape(f"blocks.*.{name}", o, i, layers, rows) for name, o, i, rows in linears)


def transformer_block(d: int, t: int) -> tuple[tuple[Sides, ...], tuple[ParameterShape, ...]]:
    """Return the linear layers and parameters of a block of GPT-2 or ViT: attention and an MLP, each after a norm."""
    linears = (
        ("attention.qkv", 3 * d, d, t), ("attention.project", d, d, t),
        ("mlp.up", 4 * d, d, t), ("mlp.down", d, 4 * d, t),
    )  # fmt: skip
    qkv, project, up, down = (linear(o, i) for _, o, i, _ in linears)
    return linears, (*norm(d), *qkv, *project, *norm(d), *up, *down)


def num_patches(image: int, patch: int) -> int:
    """Return the patches of a square image."""
    return (image // patch) ** 2


def image_ends_flops(d: int, patches: int, patch_inputs: int, classes: int) -> int:
    """Return the operations of the first layer, over patches, and of the last, over classes."""
    # Images need no gradient, which saves one of the first layer's products.
    return (FORWARD_AND_BACKWARD - 1) * 2 * patches * patch_inputs * d + FORWARD_AND_BACKWARD * 2 * classes * d
