"""Bytes of activations and gradients at the moments that can be a step's peak, family by family.

Letters: u one activation tensor between blocks (tokens x width), V outputs (vocabulary or classes), L blocks. The
constants follow the order in which torch's autograd frees and allocates; tests hold the result against the allocator's
trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from simulate.layers.folding import folded_products
from simulate.layers.formats import LOSS_CHUNK_ELEMENTS
from simulate.models.shapes import LinearShape, ModelShape
from simulate.rules.cadence import evaluation_batch
from simulate.rules.phases import AS_THEY_ARE, Phase, WeightMaterialisation

BLOCK_TENSORS = 16
"""Activation tensors, in u, that a transformer block keeps: inputs of 2 norms, 4 linears (1, 1, 1, 4), q, k, v, the
GELU (4). Korthikanti et al. 2022 (arXiv 2205.05198), section 4.1, without dropout and with no attention matrix stored.
"""
BLOCK_INPUTS_OF_PRODUCTS = 6
"""Of these, what only gradients of weights or of A need: outputs of 2 norms, and of the GELU (4). The fourth linear's
input is attention's output, which attention keeps.
"""
BLOCK_NORMS = 2
"""Of these, what the norms read: sums, which stay in the weights' format."""
BLOCK_BACKWARD = 5
"""Working tensors, in u, at the height of a block's backward: the stream's gradient and one of the GELU's width. A
second one takes the place of the GELU's output, or comes on top where that was not kept.
"""
BLOCK_INPUTS = 4
"""Tensors, in u, that an MLP's pass without a backward one goes on beside: the network's and the block's input, the
stream, the norm's output."""
TRANSPOSED = 4
"""Tensors, in u, beside the backward pass of a Mixer's network over tokens: gradients, and their
transposed copies; what is recomputed, or does not keep its inputs, needs one."""
FLOAT_BYTES = 4
INDEX_BYTES = 8


@dataclass(frozen=True)
class _Step:
    """One device's step on one network."""

    shape: ModelShape
    samples: int
    rank: int
    """That one row passes through; 0 where every weight is trained."""
    block_gradients: int
    """Bytes of the trained parameters of one block's adapted layers."""
    checkpointing: bool
    element_bytes: int
    product_bytes: int
    """Of an element that matrix products read and write."""
    unpacked: int = 0
    """Bytes of the largest frozen layer while a product unpacks it."""
    heads: int = 1
    """Pairs that divide the rows between them."""
    subtracts: bool = False
    """Whether the product of the last merge is subtracted in every pass."""
    materialisation: WeightMaterialisation = AS_THEY_ARE
    """What evaluations compute with."""
    plain: bool = False
    """Whether it is the plain network, for diagnostics, whose gradients go as they come: a tied table's when both are
    there. Its RMS norms keep what they have normalised, too."""
    keeps_inputs: bool = True
    """Whether adapted layers keep what enters them: gradients of weights and of A need it, that of B alone does not."""

    @property
    def tokens(self) -> int:
        return self.samples * self.shape.tokens

    @property
    def u(self) -> int:
        return self.tokens * self.shape.width * self.element_bytes

    @property
    def v(self) -> int:
        """As u, of what enters or leaves matrix products."""
        return self.tokens * self.shape.width * self.product_bytes

    @property
    def is_cast(self) -> bool:
        """Whether matrix products run in another format than weights have."""
        return self.product_bytes != self.element_bytes

    @property
    def adapters(self) -> int:
        """Bytes that a block's adapted layers keep more: rows in rank dimensions."""
        return self.samples * self.shape.adapted_rows * self.rank * self.product_bytes

    @property
    def logits(self) -> int:
        return self.samples * self.shape.predictions * self.shape.outputs * self.product_bytes

    @property
    def scratch(self) -> int:
        """Bytes that the loss works with: exponentials, and half-precision logits copied to the weights' format."""
        rows = min(self.samples * self.shape.predictions, max(1, LOSS_CHUNK_ELEMENTS // self.shape.outputs))
        return rows * self.shape.outputs * self.element_bytes * (2 if self.is_cast else 1)

    @property
    def cast_block(self) -> int:
        """Bytes of a block's trained weights as products read them, which their backward passes need again."""
        if self.rank or not self.is_cast:
            return 0
        return sum(x.weights for x in self.shape.adapted) * self.product_bytes

    @property
    def cast_table(self) -> int:
        """The same, of the output layer."""
        return self.shape.outputs * self.shape.width * self.product_bytes if self.is_cast else 0

    @property
    def head_table(self) -> int:
        """Bytes of the output layer's weights."""
        return self.shape.outputs * self.shape.width * self.element_bytes

    @property
    def largest_weight(self) -> int:
        """Bytes of the layer of a block whose weights take most in its backward pass."""
        return self._of_weights(max(self.shape.adapted, key=lambda x: x.weights))

    def _of_weights(self, linear: LinearShape) -> int:
        """Bytes that a layer's weights take in its backward pass: a dense gradient, or W, unpacked or cast.

        A dense gradient leaves the product cast as well; when it becomes one of the weights' format, what the layer had
        kept is gone.
        """
        cast, gradient = linear.weights * self.product_bytes, linear.weights * self.element_bytes
        if not self.is_cast:
            rows = self.samples * linear.rows * linear.in_features * self.element_bytes  # whose gradients come after W
            made = self.materialisation.height(linear.weights, self.element_bytes, rows) - rows
            return self.unpacked if self.rank else max(gradient, made)
        kept = self.samples * linear.rows * max(linear.in_features, linear.out_features) * self.product_bytes
        return cast + self.unpacked if self.rank else max(cast, gradient - kept)

    @property
    def stream_gradient(self) -> int:
        """Bytes of the gradient between blocks; where products take a cast of it, it is there twice."""
        return self.u + self.v if self.is_cast else self.u

    def beside(self, name: str) -> int:
        """Bytes of an adapted layer's backward pass beside the gradients of its outputs and inputs.

        Its weights; and of adapters rows in rank dimensions, and heads' own weights or the old product's rows, as
        simulate.layers.lora chooses.
        """
        linear = next(x for x in self.shape.adapted if x.name.endswith(name))
        weights = self._of_weights(linear)
        if not self.rank:
            return weights
        rows = self.samples * linear.rows
        small = rows * self.rank * self.product_bytes
        return weights + small + max(self._folded(linear, rows // self.heads), small * self.subtracts)

    def passing(self, name: str, before: int, outputs: int) -> int:
        """Bytes at the height of an adapted layer's pass in an evaluation, beside `before`.

        Its weight is made, if it is not there, and stays while the outputs come.
        """
        linear = next(x for x in self.shape.adapted if x.name.endswith(name))
        return before + self.materialisation.height(linear.weights, self.element_bytes, outputs)

    def _folded(self, linear: LinearShape, rows: int) -> int:
        """Bytes of the copies of the weight that a backward pass to the inputs folds products into, half the heads at
        a time; 0 where it folds none.
        """
        folds = folded_products(rows, linear.out_features, linear.in_features, self.subtracts)
        return -(-self.heads // 2) * linear.weights * self.product_bytes if folds.any else 0

    @property
    def replicated(self) -> int:
        return self.shape.replicated_parameters * self.element_bytes

    @property
    def all_gradients(self) -> int:
        return 0 if self.plain else self.shape.layers * self.block_gradients + self.replicated

    @property
    def head_gradient(self) -> int:
        """Bytes of the output layer's gradient, while others come."""
        return 0 if self.plain else self.head_table


@lru_cache(maxsize=4096)
def step_phases(
    shape: ModelShape, samples: int, rank: int, block_gradient_bytes: int, checkpointing: bool, element_bytes: int,
    product_bytes: int, unpacked_bytes: int = 0, heads: int = 1, subtracts: bool = False,
    materialisation: WeightMaterialisation = AS_THEY_ARE, plain: bool = False, keeps_inputs: bool = True,
) -> tuple[Phase, ...]:  # fmt: skip
    """Return the phases of one step and of an evaluation that can be its peak, over what is held all the time."""
    return _step_phases(
        _Step(
            shape, samples, rank, block_gradient_bytes, checkpointing, element_bytes, product_bytes, unpacked_bytes,
            heads, subtracts, materialisation, plain, keeps_inputs,
        )
    )  # fmt: skip


def _step_phases(step: _Step) -> tuple[Phase, ...]:
    phases, forward = _FAMILIES[step.shape.family](step)
    samples = evaluation_batch(step.samples, step.is_cast)
    waiting = _images(step)  # the step's own batch, of which an evaluation takes a part
    if step.is_cast or samples != step.samples:  # evaluations are not cast
        step = replace(step, product_bytes=step.element_bytes, samples=samples)
        _, forward = _FAMILIES[step.shape.family](step)
    waiting -= _images(step)
    evaluation = max(forward, step.logits + 2 * step.u, step.logits + step.scratch)
    return (*phases, Phase("evaluation", 0, 0, waiting + evaluation))


def _attention_statistics(step: _Step) -> int:
    return step.tokens * step.shape.attention_heads * max(step.element_bytes, FLOAT_BYTES)


def _transformer_block(step: _Step) -> int:
    """Bytes that a block keeps: norms read u, everything else v."""
    norms = BLOCK_NORMS * step.u + 4 * step.tokens * step.element_bytes
    tensors = BLOCK_TENSORS - BLOCK_NORMS - (0 if step.keeps_inputs else BLOCK_INPUTS_OF_PRODUCTS)
    others = tensors * step.v + step.adapters + step.cast_block
    return norms + others + _attention_statistics(step)


def _transformer_backward(step: _Step) -> int:
    """Bytes at the height of a block's backward pass."""
    inner = (BLOCK_BACKWARD - 1) * step.v
    return step.stream_gradient + max(inner + step.beside("mlp.down"), _unkept(step, "mlp.down", inner))


def _unkept(step: _Step, last_layer: str, inner: int) -> int:
    """Bytes at the height of a network's way back where what enters layers was not kept; 0 where it was.

    Two tensors of the inner width, of an activation and its gradient; or, recomputed, the last layer's pass.
    """
    if step.keeps_inputs:
        return 0
    return max(2 * inner, _last_pass(step, last_layer, inner) if step.checkpointing else 0)


def _last_pass(step: _Step, last_layer: str, inner: int) -> int:
    """Bytes of a network's last pass beside what is kept: its input and output, and what entered the network, which the
    caller holds.
    """
    return inner + 2 * step.v + step.beside(last_layer)


def _last_forward(
    step: _Step, kept: int, last_layer: str, inner: int, recomputed: int | None = None
) -> tuple[Phase, ...]:
    """Return the last block's pass where it can be higher than what is kept: without inputs, or of what is recomputed.

    Of that nothing stays but its input; its network takes `recomputed` bytes, or two tensors of the inner width.
    """
    if step.checkpointing:
        working = 2 * inner if recomputed is None else recomputed
        working = max(working, inner + step.v + step.unpacked)
        return (Phase("forward", 0, kept, (BLOCK_INPUTS - 2) * step.u + working),)
    return () if step.keeps_inputs else (Phase("forward", 0, kept, _last_pass(step, last_layer, inner)),)


def _transformer_forward(step: _Step) -> int:
    """Bytes at the height of a pass without a backward one: the GELU's two tensors of four times the width, or what is
    made of weights beside one of them."""
    u = step.u
    before = BLOCK_INPUTS * u
    ups = step.passing("mlp.up", before, 4 * u), step.passing("mlp.down", before + 4 * u, u)
    return max(before + 8 * u, *ups)


def _gpt(step: _Step) -> Found:
    u, tokens, element_bytes, layers = step.u, step.tokens, step.element_bytes, step.shape.layers
    block = _transformer_block(step)
    kept, recomputed = (u, block - u) if step.checkpointing else (block, 0)
    ends = 2 * tokens * element_bytes + 3 * tokens * INDEX_BYTES
    working = _transformer_backward(step)
    table, all_gradients = step.head_table, step.all_gradients
    outputs = layers * kept + ends + u + step.v + step.cast_table + step.logits
    return (
        Phase("forward", 0, outputs, step.scratch),
        # The logits, which have become their own gradient, with the output layer's two; the table's waits for another.
        Phase("backward_start", 0, outputs, table + u + step.cast_table),
        Phase("backward_start", 0, layers * kept + ends, table + recomputed + working),
        Phase("backward_end", all_gradients - step.block_gradients, kept + ends, recomputed + working),
        # The tied table's two gradients, and their sum.
        Phase("backward_end", all_gradients, ends, (3 if step.plain else 2) * table + u),
        *_last_forward(step, layers * kept + ends, "mlp.down", (BLOCK_BACKWARD - 1) * step.v),
    ), _transformer_forward(step)


def _llama(step: _Step) -> Found:
    """As GPT-2's, with 8u for norms, attention and inputs, and four tensors of the gated network's inner width.

    Where products take a cast of their input, each of the layers that share one keeps a cast of its own: 3 more.
    """
    u, tokens, element_bytes, layers = step.u, step.tokens, step.element_bytes, step.shape.layers
    inner = tokens * step.shape.mlp_width * step.product_bytes
    inputs_of_products = (5 if step.is_cast else 2) * step.v + inner
    products = 4 * step.v + 3 * inner + (inputs_of_products if step.keeps_inputs else 0)
    others = products + step.adapters + step.cast_block
    normalised = u if step.plain else 0  # of one norm
    block = BLOCK_NORMS * (u + normalised) + others + _attention_statistics(step) + 2 * tokens * element_bytes
    kept, recomputed = (u, block - u) if step.checkpointing else (block, 0)
    ends = tokens * element_bytes + 2 * tokens * INDEX_BYTES
    # The stream's gradient, and those of both factors of the gated product beside its own, in the product's place.
    factors = max(2 * inner + step.largest_weight, 0 if step.keeps_inputs else 3 * inner)
    working = step.stream_gradient + max(factors, inner + step.beside("mlp.down"), _unkept(step, "mlp.down", inner))
    table, all_gradients = step.head_table, step.all_gradients
    inner_gradients = 0 if step.plain else all_gradients - table - step.block_gradients
    outputs = layers * kept + ends + normalised + u + step.v + step.cast_table + step.logits
    return (
        Phase("forward", 0, outputs, step.scratch),
        Phase("backward_start", table, outputs, u + step.cast_table),
        Phase("backward_start", step.head_gradient, layers * kept + ends, recomputed + working),
        Phase("backward_end", inner_gradients, kept + ends, recomputed + working),
        Phase("backward_end", all_gradients, ends, u),
        *_last_forward(step, layers * kept + ends, "mlp.down", inner, 3 * inner),
    ), _gated_forward(step, inner)


def _gated_forward(step: _Step, inner: int) -> int:
    before = BLOCK_INPUTS * step.u
    gated = step.passing("mlp.up", before + inner, inner), step.passing("mlp.down", before + inner, step.u)
    return max(before + 3 * inner, *gated)


def _vit(step: _Step) -> Found:
    """GPT-2's blocks between the patches and one prediction."""
    block, inner = _transformer_block(step), (BLOCK_BACKWARD - 1) * step.v
    phases = _of_images(step, block, _transformer_backward(step), step.u)
    # Beside a pass, the patches before the class token joined them.
    kept = step.shape.layers * (step.u if step.checkpointing else block) + _image_ends(step) + step.u
    passes = _last_forward(step, kept, "mlp.down", inner)
    return (*phases, *passes), _images(step) + step.u + _transformer_forward(step)


def _mixer(step: _Step) -> Found:
    """Inputs of 2 norms and 2 networks (one transposed, so copied), and of each network's GELU and last layer.

    The network over tokens comes last on the way back, when what the other one kept is gone. No embedding brings the
    stream back to the weights' format: it stays in that of products, and norms keep a cast.
    """
    u, v, tokens = step.u, step.v, step.tokens
    over_channels = tokens * step.shape.mlp_width * step.product_bytes
    over_tokens = step.samples * step.shape.width * step.shape.tokens_width * step.product_bytes
    rows = 2 * tokens * step.element_bytes
    num_inputs = int(step.keeps_inputs)  # of a network, and of its last layer
    of_tokens = u + num_inputs * v + (1 + num_inputs) * over_tokens + rows
    of_channels = u + num_inputs * v + (1 + num_inputs) * over_channels + rows
    block = of_tokens + of_channels + step.adapters + step.cast_block
    gradient = u + 2 * v if step.is_cast else u  # of the stream, and a norm's before and after the cast
    last = "over_channels.down"
    back = max(over_channels + step.beside(last), _unkept(step, last, over_channels))
    kept, stream = (v, v) if step.checkpointing else (block, 0)
    ends = _image_ends(step)
    networks = max(2 * over_channels, v + 2 * over_tokens)
    passes = _last_forward(step, step.shape.layers * kept + ends, last, over_channels, networks)
    phases = (*_of_images(step, block, gradient + back, v), *passes)
    # Before the weights over tokens have gradients, or of their adapters those of the first layer.
    without = sum(x.weights for x in step.shape.adapted if "over_tokens" in x.name) * step.element_bytes
    if step.rank:
        sizes = {x.name: x.in_features + x.out_features for x in step.shape.adapted}
        up = sum(size for name, size in sizes.items() if name.endswith("over_tokens.up"))
        without = step.block_gradients * up // sum(sizes.values())
    if step.plain:
        without = 0
    recomputed = of_tokens + step.adapters - (stream if v == u else 0)
    copies = TRANSPOSED if step.keeps_inputs and not step.checkpointing else 1
    hidden = over_tokens + step.beside("over_tokens.down") + copies * v
    working = gradient + (hidden if step.keeps_inputs else max(hidden, 2 * over_tokens, 3 * v))
    others = (step.shape.layers - 1) * kept + stream + ends
    first_gradients = step.head_gradient + step.block_gradients - without
    of_first = Phase("backward_start", first_gradients, others, recomputed + working)
    of_last = Phase("backward_end", step.all_gradients - without, stream + ends, recomputed + working)
    before = BLOCK_INPUTS * u
    heights = (
        before + 2 * over_channels,
        before + u + 2 * over_tokens,
        step.passing("over_channels.up", before, over_channels),
        step.passing("over_channels.down", before + over_channels, u),
        step.passing("over_tokens.up", before, over_tokens),
        step.passing("over_tokens.down", before + over_tokens, u),
    )
    return (*phases, of_first, of_last), _images(step) + max(heights)


def _images(step: _Step) -> int:
    return step.samples * step.shape.inputs * step.element_bytes


def _image_ends(step: _Step) -> int:
    """Bytes of the images, and once more as patches."""
    return _images(step) + step.samples * step.shape.inputs * step.product_bytes


def _of_images(step: _Step, block: int, working: int, stream: int) -> tuple[Phase, ...]:
    """Return the phases of blocks that keep `block`, hand on `stream` and need `working` in their backward pass."""
    layers, all_gradients, ends = step.shape.layers, step.all_gradients, _image_ends(step)
    first_norm = stream if stream == step.u else 0  # reads what a checkpoint keeps
    kept, recomputed = (stream, block - first_norm) if step.checkpointing else (block, 0)
    return (
        Phase("forward", 0, layers * kept + ends + stream + step.logits, stream),
        Phase("backward_start", step.head_table, layers * kept + ends + stream + step.logits, 0),
        Phase("backward_start", step.head_gradient, layers * kept + ends, recomputed + working),
        Phase("backward_end", all_gradients - step.block_gradients, kept + ends, recomputed + working),
        Phase("backward_end", all_gradients, ends, step.u),
    )


def _traced_table(step: _Step) -> int:
    """Bytes of the gradients of the largest parameter that no adapter serves: of a table that is tied to the outputs,
    as it is where no other parameter leads to them, both uses' and their sum.
    """
    tensors = step.shape.replicated
    tied = not any(x.kind != "embedding" and x.shape[0] == step.shape.outputs for x in step.shape.tensors)
    sizes = ((3 if tied and x.kind == "embedding" else 1) * x.elements for x in tensors)
    return max(sizes, default=0) * step.element_bytes


def _traced(step: _Step) -> Found:
    """As measured on the network itself; a higher rank than the measured one keeps more of every row."""
    of_adapters = step.shape.adapted_trace if step.keeps_inputs else step.shape.frozen_a_trace
    trace = of_adapters if step.rank else step.shape.dense_trace
    largest = max(step.largest_weight, _traced_table(step)) if step.plain else step.largest_weight
    assert trace is not None
    measured = (trace.fixed_bytes + trace.sample_bytes * step.samples) * step.element_bytes // FLOAT_BYTES
    further_ranks = step.adapters // step.rank * (step.rank - 1) if step.rank else 0
    return (
        Phase("backward_start", 0, measured + further_ranks, 0),
        Phase("backward_end", step.all_gradients, 0, largest),
    ), max(step.materialisation.height(x.weights, step.element_bytes, 0) for x in step.shape.adapted)


Found = tuple[tuple[Phase, ...], int]
"""The phases of a step, and the bytes at the height of a pass without a backward one."""
_FAMILIES: dict[str, Callable[[_Step], Found]] = {
    "gpt": _gpt, "llama": _llama, "vit": _vit, "mixer": _mixer, "traced": _traced,
}  # fmt: skip
