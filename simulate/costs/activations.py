"""Bytes of activations and gradients in the phases in which a step's memory can peak, family by family.

Planned memory must not be below the real peak, or a chosen run would fail after hours. So each family of networks lists
what its blocks keep and what its passes hold at once, instead of a rule of thumb. simulate.costs.memory calls
step_phases for a run, simulate.costs.diagnostics_memory for the dense passes of diagnostics.

Letters: u one activation tensor between blocks (tokens x width), V outputs (vocabulary or classes), L blocks. The
constants follow the order in which torch's autograd frees and allocates; tests hold the result against the allocator's
trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from simulate.layers.folding import folded_products, writes_columns
from simulate.layers.formats import LOSS_CHUNK_ELEMENTS, layer_draws
from simulate.models.shapes import LinearShape, ModelShape
from simulate.rules.cadence import evaluation_batch
from simulate.rules.phases import AS_THEY_ARE, Phase, WeightMaterialisation

BLOCK_TENSORS = 16
"""Activation tensors, in u, that a transformer block keeps: inputs of 2 norms, 4 linears (1, 1, 1, 4), q, k, v, the
GELU (4). Korthikanti et al. 2022 (arXiv 2205.05198), section 4.1, without dropout and with no attention matrix stored.
"""
BLOCK_INPUTS_OF_PRODUCTS = 6
"""Tensors among BLOCK_TENSORS that only gradients of weights or of A need: outputs of 2 norms, and of the GELU (4). The
fourth linear's input is attention's output, which attention keeps.
"""
BLOCK_NORMS = 2
"""Tensors among BLOCK_TENSORS that norms read: sums, which stay in the weights' format under autocast."""
BLOCK_BACKWARD = 5
"""Working tensors, in u, at the peak of a block's backward: the stream's gradient (1) and one of the GELU's width (4).
A second one of that width reuses the memory of the GELU's output, or is extra where that was not kept.
"""
BLOCK_INPUTS = 4
"""Tensors, in u, held while an MLP runs forward only: the network's and the block's input, the stream, the norm's
output."""
TRANSPOSED = 4
"""Tensors, in u, held during the backward pass of a Mixer's network over tokens: gradients, and their transposed
copies; one where the network is recomputed or does not keep its inputs."""
FLOAT_BYTES = 4
INDEX_BYTES = 8


@dataclass(frozen=True)
class _Step:
    """The figures of one device's step on one network."""

    shape: ModelShape
    samples: int
    rank: int
    """Rank that one row passes through; 0 where every weight is trained."""
    block_gradients: int
    """Bytes of the trained parameters of one block's adapted layers."""
    checkpointing: bool
    element_bytes: int
    product_bytes: int
    """Bytes of an element that matrix products read and write."""
    unpacked: int = 0
    """Extra bytes of the largest frozen layer while a product unpacks it."""
    heads: int = 1
    """Pairs of a layer, each of which gets an equal part of the rows."""
    subtracts: bool = False
    """Whether the product of the last merge is subtracted in every pass."""
    materialisation: WeightMaterialisation = AS_THEY_ARE
    """How evaluations compute the weights of adapted layers."""
    plain: bool = False
    """Whether it is the plain network of diagnostics, which frees each gradient when it is complete (that of a tied
    table when both its parts are there), and whose RMS norms also keep their normalised inputs."""
    keeps_inputs: bool = True
    """Whether adapted layers keep their inputs: gradients of weights and of A need them, that of B alone does not."""
    column_rank: int = 0
    """As AdapterLayout.column_rank."""
    accumulates: bool = False
    """Whether gradients of earlier passes lie beside those of this one, which are added to them one by one."""

    @cached_property
    def tokens(self) -> int:
        return self.samples * self.shape.tokens

    @cached_property
    def u(self) -> int:
        return self.tokens * self.shape.width * self.element_bytes

    @property
    def v(self) -> int:
        """As u, for inputs and outputs of matrix products."""
        return self.tokens * self.shape.width * self.product_bytes

    @property
    def is_cast(self) -> bool:
        """Whether matrix products run in another format than weights have."""
        return self.product_bytes != self.element_bytes

    @property
    def adapters(self) -> int:
        """Bytes that adapters add to what a block keeps: rows in rank dimensions."""
        return self.samples * self.shape.adapted_rows * self.rank * self.product_bytes

    @property
    def logits(self) -> int:
        return self.samples * self.shape.predictions * self.shape.outputs * self.product_bytes

    @property
    def scratch(self) -> int:
        """Working bytes of the loss: exponentials, and half-precision logits copied to the weights' format."""
        # The loss works on chunks of rows (simulate.layers.cross_entropy), so that a vocabulary need not fit twice.
        rows = min(self.samples * self.shape.predictions, max(1, LOSS_CHUNK_ELEMENTS // self.shape.outputs))
        return rows * self.shape.outputs * self.element_bytes * (2 if self.is_cast else 1)

    @property
    def cast_block(self) -> int:
        """Bytes of the casts of a block's trained weights, kept since backward passes need them again."""
        if self.rank or not self.is_cast:  # frozen weights are cast again, not kept
            return 0
        return sum(x.weights for x in self.shape.adapted) * self.product_bytes

    @property
    def cast_table(self) -> int:
        """Bytes of the cast of the output layer's weights."""
        return self.shape.outputs * self.shape.width * self.product_bytes if self.is_cast else 0

    @property
    def head_table(self) -> int:
        """Bytes of the output layer's weights."""
        return self.shape.outputs * self.shape.width * self.element_bytes

    @property
    def largest_weight(self) -> int:
        """Bytes that the weights of a block's largest layer take in its backward pass."""
        return self._weight_bytes(max(self.shape.adapted, key=lambda x: x.weights))

    def _weight_bytes(self, linear: LinearShape) -> int:
        """Return the bytes that a layer's weights take in its backward pass: a dense gradient, or W, unpacked or cast.

        Under autocast a dense gradient leaves the product in the cast format. By the time it is converted to the
        weights' format, the layer's kept tensors have been freed.
        """
        cast, gradient = linear.weights * self.product_bytes, linear.weights * self.element_bytes
        if not self.is_cast:
            # Callers count the gradient of the inputs (`rows`), which is allocated only when W is complete.
            rows = self.samples * linear.rows * linear.in_features * self.element_bytes
            computing = self.materialisation.height(linear.weights, self.element_bytes, rows) - rows
            return self.unpacked if self.rank else max(gradient, computing)
        kept = self.samples * linear.rows * max(linear.in_features, linear.out_features) * self.product_bytes
        return cast + self.unpacked if self.rank else max(cast, gradient - kept)

    @property
    def stream_gradient(self) -> int:
        """Bytes of the gradient between blocks; where products read a cast of it, it exists twice."""
        return self.u + self.v if self.is_cast else self.u

    def beside(self, name: str) -> int:
        """Return the bytes of a layer's backward pass, without the gradients of its outputs and inputs.

        These are its weights; with adapters also rows in rank dimensions, and either the heads' folded weights or the
        rows of the old product, as simulate.layers.lora chooses.
        """
        linear = next(x for x in self.shape.adapted if x.name.endswith(name))
        weights = self._weight_bytes(linear)
        if not self.rank:
            return weights
        rows = self.samples * linear.rows
        small = rows * self.rank * self.product_bytes
        # simulate.layers.lora folds products into copies of the weight, for half of the heads at a time.
        if layer_draws("columns", self.column_rank, linear.in_features) == "columns":
            if not writes_columns(rows // self.heads, self.rank, linear.in_features):
                return weights + small
            # A copy of W, which a lone head does not need beside one that is unpacked or cast; B, scaled, of one head.
            copied = 0 if self.heads == 1 and (self.is_cast or self.unpacked) else linear.weights
            return weights + (copied + linear.out_features * self.rank) * self.product_bytes
        folds = folded_products(rows // self.heads, linear.out_features, linear.in_features, self.subtracts)
        folded = -(-self.heads // 2) * linear.weights * self.product_bytes if folds.any else 0
        if folds.new and not self.keeps_inputs:  # only A's gradient would read them
            small = 0
        return weights + small + max(folded, small * self.subtracts)

    def passing(self, name: str, before: int, outputs: int) -> int:
        """Return the peak bytes of an adapted layer in an evaluation, on top of `before`.

        Its weight is computed, unless it is stored ready to use, and stays until the outputs are complete.
        """
        linear = next(x for x in self.shape.adapted if x.name.endswith(name))
        return before + self.materialisation.height(linear.weights, self.element_bytes, outputs)

    @property
    def all_gradients(self) -> int:
        if self.plain:  # each leaves for the host as soon as it is there
            return 0
        return self.shape.layers * self.block_gradients + self.shape.replicated_parameters * self.element_bytes

    def added(self, gradient: int) -> int:
        """Return the bytes of a gradient that was just computed, beside the sum that it is about to be added to."""
        return gradient if self.accumulates else 0

    @property
    def head_gradient(self) -> int:
        """Bytes of the output layer's gradient, held while others are computed."""
        return 0 if self.plain else self.head_table


@lru_cache(maxsize=4096)
def step_phases(
    shape: ModelShape, samples: int, rank: int, block_gradient_bytes: int, checkpointing: bool, element_bytes: int,
    product_bytes: int, unpacked_bytes: int = 0, heads: int = 1, subtracts: bool = False,
    materialisation: WeightMaterialisation = AS_THEY_ARE, plain: bool = False, keeps_inputs: bool = True,
    accumulates: bool = False, column_rank: int = 0,
) -> tuple[Phase, ...]:  # fmt: skip
    """Return the phases of one step and of an evaluation that can be its peak, on top of what is held all the time."""
    step = _Step(
        shape, samples, rank, block_gradient_bytes, checkpointing, element_bytes, product_bytes, unpacked_bytes,
        heads, subtracts, materialisation, plain, keeps_inputs, column_rank, accumulates,
    )  # fmt: skip
    phases, forward = _FAMILIES[shape.family](step)
    if accumulates:  # from the second pass on, the sums of all gradients are there throughout
        phases = tuple(replace(phase, gradients=step.all_gradients) for phase in phases)
    evaluated = evaluation_batch(samples, step.is_cast)
    waiting = _images(step)  # the step's own batch stays, and an evaluation takes a part of it
    if step.is_cast or evaluated != samples:
        step = replace(step, product_bytes=element_bytes, samples=evaluated)  # evaluations run without autocast
        _, forward = _FAMILIES[shape.family](step)
    waiting -= _images(step)
    # An evaluation peaks inside a block, at the output layer, or in the loss.
    evaluation = max(forward, step.logits + 2 * step.u, step.logits + step.scratch)
    return (*phases, Phase("evaluation", 0, 0, waiting + evaluation))


def _attention_statistics(step: _Step) -> int:
    """Return the bytes of the softmax's log-sums, which attention keeps in at least fp32."""
    return step.tokens * step.shape.attention_heads * max(step.element_bytes, FLOAT_BYTES)


def _transformer_block(step: _Step) -> int:
    """Return the bytes that a block keeps: norms read u, everything else v."""
    # Beside its input a LayerNorm keeps two numbers a row, mean and inverse deviation.
    norms = BLOCK_NORMS * step.u + 4 * step.tokens * step.element_bytes
    tensors = BLOCK_TENSORS - BLOCK_NORMS - (0 if step.keeps_inputs else BLOCK_INPUTS_OF_PRODUCTS)
    others = tensors * step.v + step.adapters + step.cast_block
    return norms + others + _attention_statistics(step)


def _transformer_backward(step: _Step) -> int:
    """Return the peak bytes of a block's backward pass."""
    # The last linear of the MLP is first on the way back, while the block still keeps everything.
    inner = (BLOCK_BACKWARD - 1) * step.v
    return step.stream_gradient + max(inner + step.beside("mlp.down"), _unkept(step, "mlp.down", inner))


def _unkept(step: _Step, last_layer: str, inner: int) -> int:
    """Return the peak bytes of an MLP's backward pass where layers did not keep their inputs; 0 where they did.

    That is two tensors of the inner width, an activation and its gradient; or, recomputed, the last layer's pass.
    """
    if step.keeps_inputs:
        return 0
    return max(2 * inner, _last_pass(step, last_layer, inner) if step.checkpointing else 0)


def _last_pass(step: _Step, last_layer: str, inner: int) -> int:
    """Return the bytes of an MLP's last layer on top of what is kept: its input and output, and the MLP's input, which
    the caller holds.
    """
    return inner + 2 * step.v + step.beside(last_layer)


def _last_forward(
    step: _Step, kept: int, last_layer: str, inner: int, recomputed: int | None = None
) -> tuple[Phase, ...]:
    """Return the last block's forward pass where it can exceed what blocks keep: recomputed, or without kept inputs.

    A block to be recomputed keeps its input only; its MLP takes `recomputed` bytes, or two tensors of the inner width.
    """
    if step.checkpointing:
        working = 2 * inner if recomputed is None else recomputed
        working = max(working, inner + step.v + step.unpacked)
        return (Phase("forward", 0, kept, (BLOCK_INPUTS - 2) * step.u + working),)
    return () if step.keeps_inputs else (Phase("forward", 0, kept, _last_pass(step, last_layer, inner)),)


def _transformer_forward(step: _Step) -> int:
    """Return the peak bytes of a forward pass alone: the GELU's two tensors of four times the width, or one and a
    computed weight.
    """
    u = step.u
    before = BLOCK_INPUTS * u
    # The GELU reads 4u and writes 4u; around it the two linears compute their weights, if they must.
    ups = step.passing("mlp.up", before, 4 * u), step.passing("mlp.down", before + 4 * u, u)
    return max(before + 8 * u, *ups)


def _output_layer_backward(step: _Step, outputs: int, gradient: int) -> tuple[Phase, ...]:
    """Return the moments of the output layer's backward pass; `gradient` bytes of its weights' stay as a gradient.

    The logits are overwritten by their gradient, and the layer adds those of its weights and inputs. Of a cast product
    both are cast; they become the weights' format when the logits are gone.
    """
    waiting = step.head_table - gradient + step.added(gradient)
    if not step.is_cast:
        return (Phase("backward_start", gradient, outputs, waiting + step.u),)
    return (
        Phase("backward_start", 0, outputs, step.cast_table + step.v),
        Phase("backward_start", gradient, outputs - step.logits, waiting + step.cast_table + step.u + step.v),
    )


def _gpt(step: _Step) -> Found:
    u, tokens, element_bytes, layers = step.u, step.tokens, step.element_bytes, step.shape.layers
    block = _transformer_block(step)
    # A recomputed block keeps its input only; its backward pass then brings back the rest.
    kept, recomputed = (u, block - u) if step.checkpointing else (block, 0)
    # The last LayerNorm's two numbers a row; indices of tokens, positions and targets.
    ends = 2 * tokens * element_bytes + 3 * tokens * INDEX_BYTES
    working = _transformer_backward(step)
    table, all_gradients = step.head_table, step.all_gradients
    outputs = layers * kept + ends + u + step.v + step.cast_table + step.logits
    return (
        Phase("forward", 0, outputs, step.scratch),
        *_output_layer_backward(step, outputs, 0),  # a tied table's gradient waits until the embedding adds its own
        # The last block's backward pass, when every block still keeps its activations.
        Phase("backward_start", 0, layers * kept + ends, table + recomputed + working),
        # The first block's, when all other gradients are there.
        Phase("backward_end", all_gradients - step.block_gradients, kept + ends, recomputed + working),
        # The two gradients of the tied table; a plain network holds their sum as well.
        Phase("backward_end", all_gradients, ends, (3 if step.plain else 2) * table + step.added(table) + u),
        *_last_forward(step, layers * kept + ends, "mlp.down", (BLOCK_BACKWARD - 1) * step.v),
    ), _transformer_forward(step)


def _llama(step: _Step) -> Found:
    """Return Llama's phases: as GPT-2's, with 8u for norms, attention and inputs, and four tensors of the gated MLP's
    inner width.

    Where products read a cast of their input, layers that share an input keep a cast each: 3 more.
    """
    u, tokens, element_bytes, layers = step.u, step.tokens, step.element_bytes, step.shape.layers
    inner = tokens * step.shape.mlp_width * step.product_bytes
    inputs_of_products = (5 if step.is_cast else 2) * step.v + inner
    # q, k, v and attention's output; gate, up and activation of the gated MLP.
    products = 4 * step.v + 3 * inner + (inputs_of_products if step.keeps_inputs else 0)
    others = products + step.adapters + step.cast_block
    normalised = u if step.plain else 0  # of one norm
    block = BLOCK_NORMS * (u + normalised) + others + _attention_statistics(step) + 2 * tokens * element_bytes
    kept, recomputed = (u, block - u) if step.checkpointing else (block, 0)
    # The last RMS norm's number a row; indices of tokens and targets.
    ends = tokens * element_bytes + 2 * tokens * INDEX_BYTES
    # The gradients of both factors of the gated product; its own gradient reuses the product's memory.
    factors = max(2 * inner + step.largest_weight, 0 if step.keeps_inputs else 3 * inner)
    working = step.stream_gradient + max(factors, inner + step.beside("mlp.down"), _unkept(step, "mlp.down", inner))
    table, all_gradients = step.head_table, step.all_gradients
    inner_gradients = 0 if step.plain else all_gradients - table - step.block_gradients
    outputs = layers * kept + ends + normalised + u + step.v + step.cast_table + step.logits
    before = BLOCK_INPUTS * u
    gated = step.passing("mlp.up", before + inner, inner), step.passing("mlp.down", before + inner, u)
    return (
        Phase("forward", 0, outputs, step.scratch),
        *_output_layer_backward(step, outputs, table),
        Phase("backward_start", step.head_gradient, layers * kept + ends, recomputed + working),
        Phase("backward_end", inner_gradients, kept + ends, recomputed + working),
        Phase("backward_end", all_gradients, ends, step.added(table) + u),
        *_last_forward(step, layers * kept + ends, "mlp.down", inner, 3 * inner),
    ), max(before + 3 * inner, *gated)


def _vit(step: _Step) -> Found:
    """Return ViT's phases: GPT-2's blocks between the patches and one prediction."""
    block, inner = _transformer_block(step), (BLOCK_BACKWARD - 1) * step.v
    phases = _of_images(step, block, _transformer_backward(step), step.u)
    # The patches exist twice: before and after the class token was prepended.
    kept = step.shape.layers * (step.u if step.checkpointing else block) + _image_ends(step) + step.u
    passes = _last_forward(step, kept, "mlp.down", inner)
    return (*phases, *passes), _images(step) + step.u + _transformer_forward(step)


def _mixer(step: _Step) -> Found:
    """Return the Mixer's phases: blocks keep the inputs of 2 norms and 2 MLPs (one transposed, so copied), and those of
    each MLP's GELU and last layer.

    The MLP over tokens comes last in the backward pass, when the tensors of the other one are freed. Under autocast no
    embedding returns the stream to the weights' format: it stays in that of products, and norms keep a cast.
    """
    u, v, tokens = step.u, step.v, step.tokens
    over_channels = tokens * step.shape.mlp_width * step.product_bytes
    over_tokens = step.samples * step.shape.width * step.shape.tokens_width * step.product_bytes
    rows = 2 * tokens * step.element_bytes
    num_inputs = int(step.keeps_inputs)  # one for an MLP, one for its last layer
    of_tokens = u + num_inputs * v + (1 + num_inputs) * over_tokens + rows
    of_channels = u + num_inputs * v + (1 + num_inputs) * over_channels + rows
    block = of_tokens + of_channels + step.adapters + step.cast_block
    gradient = u + 2 * v if step.is_cast else u  # the stream's, and a norm's before and after the cast
    last = "over_channels.down"
    back = max(over_channels + step.beside(last), _unkept(step, last, over_channels))
    kept, stream = (v, v) if step.checkpointing else (block, 0)
    ends = _image_ends(step)
    networks = max(2 * over_channels, v + 2 * over_tokens)
    passes = _last_forward(step, step.shape.layers * kept + ends, last, over_channels, networks)
    phases = (*_of_images(step, block, gradient + back, v), *passes)
    # The peak comes before the weights over tokens have gradients, or their first layer's adapters have.
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
    """Return the bytes of the images, and of their copy as patches."""
    return _images(step) + step.samples * step.shape.inputs * step.product_bytes


def _of_images(step: _Step, block: int, working: int, stream: int) -> tuple[Phase, ...]:
    """Return the phases of blocks that keep `block`, hand on `stream` and need `working` in their backward pass."""
    layers, all_gradients, ends = step.shape.layers, step.all_gradients, _image_ends(step)
    first_norm = stream if stream == step.u else 0  # the first norm reads the input that a checkpoint keeps
    kept, recomputed = (stream, block - first_norm) if step.checkpointing else (block, 0)
    return (
        Phase("forward", 0, layers * kept + ends + stream + step.logits, stream),
        Phase(
            "backward_start", step.head_table, layers * kept + ends + stream + step.logits, step.added(step.head_table)
        ),
        Phase("backward_start", step.head_gradient, layers * kept + ends, recomputed + working),
        Phase("backward_end", all_gradients - step.block_gradients, kept + ends, recomputed + working),
        Phase("backward_end", all_gradients, ends, step.u),
    )


def _traced_table(step: _Step) -> int:
    """Return the gradient bytes of the largest parameter without adapters.

    A table that is tied to the output layer, which then has no weights of its own, has two gradients and their sum.
    """
    tensors = step.shape.replicated
    tied = not any(x.kind != "embedding" and x.shape[0] == step.shape.outputs for x in step.shape.tensors)
    # Both gradients of a tied table are complete before they are added up.
    sizes = ((3 if tied and x.kind == "embedding" else 1) * x.elements for x in tensors)
    return max(sizes, default=0) * step.element_bytes


def _traced(step: _Step) -> Found:
    """Return a user network's phases as traced on the network itself at rank 1.

    Higher ranks keep more of every row, and have larger gradients of the factors, which may all be there at the peak.
    """
    of_adapters = step.shape.adapted_trace if step.keeps_inputs else step.shape.frozen_a_trace
    trace = of_adapters if step.rank else step.shape.dense_trace
    largest = max(step.largest_weight, _traced_table(step) if step.plain or step.accumulates else 0)
    assert trace is not None
    # The trace counts fp32 bytes.
    measured = (trace.fixed_bytes + trace.sample_bytes * step.samples) * step.element_bytes // FLOAT_BYTES
    factors = sum(x.out_features + (x.in_features if step.keeps_inputs else 0) for x in step.shape.adapted)
    gradients = factors * (step.rank * step.heads - 1) * step.element_bytes if step.rank else 0
    further_ranks = step.adapters // step.rank * (step.rank - 1) + gradients if step.rank else 0
    # The trace is not cast, which bounds the activations, but has no casts of weights. Frozen ones are cast one by one.
    frozen = sum(x.weights for x in step.shape.adapted) - max(x.weights for x in step.shape.adapted) if step.rank else 0
    casts = step.shape.parameters - frozen + (factors * step.rank * step.heads if step.rank else 0)
    cast_bytes = casts * step.product_bytes if step.is_cast else 0
    passed = step.shape.forward_trace
    assert passed is not None
    forward = (passed.fixed_bytes + passed.sample_bytes * step.samples) * step.element_bytes // FLOAT_BYTES
    heights = (step.materialisation.height(x.weights, step.element_bytes, 0) for x in step.shape.adapted)
    return (
        Phase("backward_start", 0, measured + further_ranks + cast_bytes, 0),
        Phase("backward_end", step.all_gradients, 0, largest),
    ), forward + max(heights)


Found = tuple[tuple[Phase, ...], int]
"""The phases of a step, and the peak bytes of a forward pass alone."""
_FAMILIES: dict[str, Callable[[_Step], Found]] = {
    "gpt": _gpt, "llama": _llama, "vit": _vit, "mixer": _mixer, "traced": _traced,
}  # fmt: skip
