"""Shapes of our own networks in closed form, one function a family; torch-free.

The planner tries thousands of candidates, so it cannot build a network for each: simulate.models.schema gets the counts
from here. Equal sizes give the same object, so that caches can use a shape's identity as their key.

Legend of the formulas: d width, m inner width, t tokens of a sample, V vocabulary or classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from simulate.models.shapes import LinearShape, ModelShape, ParameterShape

Sides = tuple[str, int, int, int]
"""Linear layer of a block: its name, outputs, inputs, and rows of a sample."""
FORWARD_AND_BACKWARD = 3
"""Products of a dense layer: one forward, and backward one for the inputs and one for the weights (Kaplan et al. 2020,
section 2.1)."""


def _linear(outputs: int, inputs: int, bias: bool = True) -> tuple[ParameterShape, ...]:
    weight = ParameterShape("adapted", (outputs, inputs))
    return (weight, ParameterShape("bias", (outputs,))) if bias else (weight,)


def _whole_linear(outputs: int, inputs: int) -> tuple[ParameterShape, ...]:
    """Return the parameters of a linear layer with bias that gets no adapter."""
    return (ParameterShape("other", (outputs, inputs)), ParameterShape("bias", (outputs,)))


def _norm(width: int, bias: bool = True) -> tuple[ParameterShape, ...]:
    return (ParameterShape("norm", (width,)),) * (2 if bias else 1)


def _adapted(linears: Sequence[Sides], layers: int) -> tuple[LinearShape, ...]:
    return tuple(LinearShape(f"blocks.*.{name}", o, i, layers, rows) for name, o, i, rows in linears)


def _transformer_block(d: int, t: int) -> tuple[tuple[Sides, ...], tuple[ParameterShape, ...]]:
    """Return the linear layers and parameters of a block of GPT-2 or ViT: attention and an MLP, each after a norm."""
    linears = (
        ("attention.qkv", 3 * d, d, t), ("attention.project", d, d, t),
        ("mlp.up", 4 * d, d, t), ("mlp.down", d, 4 * d, t),
    )  # fmt: skip
    qkv, project, up, down = (_linear(o, i) for _, o, i, _ in linears)
    return linears, (*_norm(d), *qkv, *project, *_norm(d), *up, *down)


def _patches(image: int, patch: int) -> int:
    return (image // patch) ** 2


def _image_ends_flops(d: int, patches: int, patch_inputs: int, classes: int) -> int:
    """Return the operations of the first layer, over patches, and of the last, over classes."""
    # Images need no gradient, which saves one of the first layer's products.
    return (FORWARD_AND_BACKWARD - 1) * 2 * patches * patch_inputs * d + FORWARD_AND_BACKWARD * 2 * classes * d


@lru_cache(maxsize=256)
def gpt_shape(name: str, layers: int, width: int, attention_heads: int, context: int, vocab: int) -> ModelShape:
    """Return the counts of a GPT-2 shaped decoder: pre-norm, learned positions, head tied to the token embedding."""
    linears, block = _transformer_block(width, context)
    embeddings = (ParameterShape("embedding", (vocab, width)), ParameterShape("embedding", (context, width)))
    return ModelShape(
        name=name,
        family="gpt",
        adapted=_adapted(linears, layers),
        tensors=(*embeddings, *(block * layers), *_norm(width)),
        layers=layers,
        tokens=context,
        width=width,
        outputs=vocab,
        predictions=context,
        # Two products of t x d a token, of which the causal mask skips half.
        mixing_flops=2 * layers * context * context * width,
        outer_flops=FORWARD_AND_BACKWARD * 2 * vocab * width * context,
        attention_heads=attention_heads,
        mlp_width=4 * width,
    )


@lru_cache(maxsize=256)
def llama_shape(
    name: str, layers: int, width: int, attention_heads: int, mlp_width: int, context: int, vocab: int
) -> ModelShape:
    """Return the counts of a Llama shaped decoder: RMSNorm, rotary positions, SwiGLU, no biases, a head of its own."""
    attention = tuple((f"attention.{x}", width, width, context) for x in ("query", "key", "value", "project"))
    gates = tuple((f"mlp.{x}", mlp_width, width, context) for x in ("gate", "up"))
    linears = (*attention, *gates, ("mlp.down", width, mlp_width, context))
    weights = [_linear(o, i, bias=False) for _, o, i, _ in linears]
    norm = _norm(width, bias=False)
    # In the order of the network: the four layers of attention, then those of the MLP, each behind a norm.
    block = (*norm, *(w for x in weights[:4] for w in x), *norm, *(w for x in weights[4:] for w in x))
    return ModelShape(
        name=name,
        family="llama",
        adapted=_adapted(linears, layers),
        tensors=(
            ParameterShape("embedding", (vocab, width)), *(block * layers), *norm,
            ParameterShape("other", (vocab, width)),
        ),
        layers=layers,
        tokens=context,
        width=width,
        outputs=vocab,
        predictions=context,
        mixing_flops=2 * layers * context * context * width,
        outer_flops=FORWARD_AND_BACKWARD * 2 * vocab * width * context,
        attention_heads=attention_heads,
        mlp_width=mlp_width,
    )  # fmt: skip


@lru_cache(maxsize=256)
def vit_shape(
    name: str, layers: int, width: int, attention_heads: int, image: int, patch: int, colours: int, classes: int
) -> ModelShape:
    """Return the counts of a Vision Transformer with a class token and learned positions."""
    patches, patch_inputs = _patches(image, patch), colours * patch**2
    tokens = patches + 1  # the class token leads
    linears, block = _transformer_block(width, tokens)
    tables = (ParameterShape("embedding", (1, width)), ParameterShape("embedding", (tokens, width)))
    ends = (*_norm(width), *_whole_linear(classes, width))
    return ModelShape(
        name=name,
        family="vit",
        adapted=_adapted(linears, layers),
        tensors=(*_whole_linear(width, patch_inputs), *tables, *(block * layers), *ends),
        layers=layers,
        tokens=tokens,
        width=width,
        outputs=classes,
        predictions=1,
        mixing_flops=4 * layers * tokens * tokens * width,  # no causal mask: both products in full
        outer_flops=_image_ends_flops(width, patches, patch_inputs, classes),
        attention_heads=attention_heads,
        mlp_width=4 * width,
        inputs=colours * image**2,
    )


@lru_cache(maxsize=256)
def mixer_shape(
    name: str, layers: int, width: int, tokens_width: int, channels_width: int, image: int, patch: int, colours: int,
    classes: int,
) -> ModelShape:  # fmt: skip
    """Return the counts of an MLP-Mixer: in each block an MLP over the tokens of a channel, and one over channels."""
    tokens, patch_inputs = _patches(image, patch), colours * patch**2
    linears = (
        ("over_tokens.up", tokens_width, tokens, width), ("over_tokens.down", tokens, tokens_width, width),
        ("over_channels.up", channels_width, width, tokens), ("over_channels.down", width, channels_width, tokens),
    )  # fmt: skip
    t_up, t_down, c_up, c_down = (_linear(o, i) for _, o, i, _ in linears)
    block = (*_norm(width), *t_up, *t_down, *_norm(width), *c_up, *c_down)
    return ModelShape(
        name=name,
        family="mixer",
        adapted=_adapted(linears, layers),
        tensors=(
            *_whole_linear(width, patch_inputs), *(block * layers), *_norm(width), *_whole_linear(classes, width),
        ),
        layers=layers,
        tokens=tokens,
        width=width,
        outputs=classes,
        predictions=1,
        mixing_flops=0,  # tokens are mixed by adapted layers
        outer_flops=_image_ends_flops(width, tokens, patch_inputs, classes),
        mlp_width=channels_width,
        tokens_width=tokens_width,
        inputs=colours * image**2,
    )  # fmt: skip
