"""What a step's activations and gradients take at the moments that can be its peak, family by family.

Letters: u one activation tensor between blocks (tokens x width), V outputs (vocabulary or classes), L blocks. The
constants follow the order in which torch's autograd frees and allocates; tests hold the result against the allocator's
trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from simulate.models.shapes import ModelShape

BLOCK_TENSORS = 16
"""Activation tensors, in u, that a transformer block keeps: inputs of 2 norms, 4 linears (1, 1, 1, 4), q, k, v, the
GELU (4). Korthikanti et al. 2022 (arXiv 2205.05198), section 4.1, without dropout and with no attention matrix stored.
"""
BLOCK_NORMS = 2
"""Of these, what the norms read: sums, which stay in the weights' format."""
BLOCK_BACKWARD = 5
"""Working tensors, in u, at the height of a block's backward: the stream's gradient and one of the GELU's width."""
LOSS_CHUNK_ELEMENTS = 2**20
"""Logits that the loss works on at once: a few megabytes of scratch, whatever the batch."""
FLOAT_BYTES = 4
INDEX_BYTES = 8


@dataclass(frozen=True)
class Phase:
    """Bytes beside what is held all the time, at one moment."""

    gradients: int
    activations: int
    temporary: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.gradients + self.activations + self.temporary


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
    unpacked: int
    """Bytes of the largest frozen layer while a product unpacks it."""

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
        """Of the loss: exponentials, and where logits are in half precision some of them in the weights'."""
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
        """Bytes that one layer of a block takes in its backward pass: a dense gradient, or W, unpacked or cast.

        A dense gradient leaves the product cast as well; when it becomes one of the weights' format, what the layer had
        kept is gone.
        """
        largest = max(self.shape.adapted, key=lambda x: x.weights)
        cast, gradient = largest.weights * self.product_bytes, largest.weights * self.element_bytes
        if not self.is_cast:
            return self.unpacked if self.rank else gradient
        kept = self.samples * largest.rows * max(largest.in_features, largest.out_features) * self.product_bytes
        return cast + self.unpacked if self.rank else max(cast, gradient - kept)

    @property
    def stream_gradient(self) -> int:
        """Bytes of the gradient between blocks; where products take a cast of it, it is there twice."""
        return self.u + self.v if self.is_cast else self.u

    @property
    def replicated(self) -> int:
        return self.shape.replicated_parameters * self.element_bytes

    @property
    def all_gradients(self) -> int:
        return self.shape.layers * self.block_gradients + self.replicated


def step_phases(
    shape: ModelShape, samples: int, rank: int, block_gradient_bytes: int, checkpointing: bool, element_bytes: int,
    product_bytes: int, unpacked_bytes: int = 0,
) -> tuple[Phase, ...]:  # fmt: skip
    """Return the phases of one step that can be its peak, over what is held all the time."""
    step = _Step(
        shape, samples, rank, block_gradient_bytes, checkpointing, element_bytes, product_bytes, unpacked_bytes
    )
    return _step_phases(step)


@lru_cache(maxsize=4096)
def _step_phases(step: _Step) -> tuple[Phase, ...]:
    return _FAMILIES[step.shape.family](step)


def _attention_statistics(step: _Step) -> int:
    return step.tokens * step.shape.attention_heads * max(step.element_bytes, FLOAT_BYTES)


def _transformer_block(step: _Step) -> int:
    """Bytes that a block keeps: norms read u, everything else v."""
    norms = BLOCK_NORMS * step.u + 4 * step.tokens * step.element_bytes
    others = (BLOCK_TENSORS - BLOCK_NORMS) * step.v + step.adapters + step.cast_block
    return norms + others + _attention_statistics(step)


def _transformer_backward(step: _Step) -> int:
    """Bytes at the height of a block's backward pass."""
    return step.stream_gradient + (BLOCK_BACKWARD - 1) * step.v + step.largest_weight


def _gpt(step: _Step) -> tuple[Phase, ...]:
    u, tokens, element_bytes, layers = step.u, step.tokens, step.element_bytes, step.shape.layers
    block = _transformer_block(step)
    kept, recomputed = (u, block - u) if step.checkpointing else (block, 0)
    ends = 2 * tokens * element_bytes + 3 * tokens * INDEX_BYTES
    working = _transformer_backward(step)
    working += (2 if step.checkpointing else 1) * tokens * step.rank * step.product_bytes
    table, all_gradients = step.head_table, step.all_gradients
    last = u + step.v + step.cast_table
    return (
        Phase(0, layers * kept + ends + last, step.logits + step.scratch),
        # The logits, which have become their own gradient, with the output layer's two gradients.
        Phase(table, layers * kept + ends + last, step.logits + u + step.cast_table),
        Phase(table, layers * kept + ends + recomputed, working),
        Phase(all_gradients - step.block_gradients, kept + ends + recomputed, working),
        Phase(all_gradients, ends, 2 * table + u),  # the tied table's two gradients, and their sum
    )


def _llama(step: _Step) -> tuple[Phase, ...]:
    """As GPT-2's, with 8u for norms, attention and inputs, and four tensors of the gated network's inner width.

    Where products take a cast of their input, each of the layers that share one keeps a cast of its own: 3 more.
    """
    u, tokens, element_bytes, layers = step.u, step.tokens, step.element_bytes, step.shape.layers
    inner = tokens * step.shape.mlp_width * step.product_bytes
    others = (9 if step.is_cast else 6) * step.v + 4 * inner + step.adapters + step.cast_block
    block = BLOCK_NORMS * u + others + _attention_statistics(step) + 2 * tokens * element_bytes
    kept, recomputed = (u, block - u) if step.checkpointing else (block, 0)
    ends = tokens * element_bytes + 2 * tokens * INDEX_BYTES
    # The stream's gradient, and those of both factors of the gated product beside its own.
    working = step.stream_gradient + 2 * inner + step.largest_weight
    table, all_gradients = step.head_table, step.all_gradients
    last = u + step.v + step.cast_table
    return (
        Phase(0, layers * kept + ends + last, step.logits + step.scratch),
        Phase(table, layers * kept + ends + last, step.logits + u + step.cast_table),
        Phase(table, layers * kept + ends + recomputed, working),
        Phase(all_gradients - table - step.block_gradients, kept + ends + recomputed, working),
        Phase(all_gradients, ends, u),
    )


def _vit(step: _Step) -> tuple[Phase, ...]:
    """GPT-2's blocks between the patches and one prediction."""
    return _of_images(step, _transformer_block(step), _transformer_backward(step), step.u)


def _mixer(step: _Step) -> tuple[Phase, ...]:
    """Inputs of 2 norms and 2 networks (one transposed, so copied), and of each network's GELU and last layer.

    No embedding brings the stream back to the weights' format: it stays in that of products, and norms keep a cast.
    """
    u, v, tokens = step.u, step.v, step.tokens
    over_channels = tokens * step.shape.mlp_width * step.product_bytes
    over_tokens = step.samples * step.shape.width * step.shape.tokens_width * step.product_bytes
    norms = BLOCK_NORMS * u + 4 * tokens * step.element_bytes
    block = norms + 2 * v + 2 * over_tokens + 2 * over_channels + step.adapters + step.cast_block
    stream = u + 2 * v if step.is_cast else u  # its gradient, and a norm's before and after the cast
    return _of_images(step, block, stream + over_channels + step.largest_weight, v)


def _of_images(step: _Step, block: int, working: int, stream: int) -> tuple[Phase, ...]:
    layers, all_gradients = step.shape.layers, step.all_gradients
    first_norm = stream if stream == step.u else 0  # reads what a checkpoint keeps
    kept, recomputed = (stream, block - first_norm) if step.checkpointing else (block, 0)
    # The images, and once more as patches.
    ends = step.samples * step.shape.inputs * (step.element_bytes + step.product_bytes)
    return (
        Phase(0, layers * kept + ends + stream, stream + step.logits),
        Phase(step.head_table, layers * kept + ends + recomputed, working),
        Phase(all_gradients - step.block_gradients, kept + ends + recomputed, working),
        Phase(all_gradients, ends, step.u),
    )


def _traced(step: _Step) -> tuple[Phase, ...]:
    """As measured on the network itself; a higher rank than the measured one keeps more of every row."""
    trace = step.shape.adapted_trace if step.rank else step.shape.dense_trace
    assert trace is not None
    measured = (trace.fixed_bytes + trace.sample_bytes * step.samples) * step.element_bytes // FLOAT_BYTES
    further_ranks = step.adapters // step.rank * (step.rank - 1) if step.rank else 0
    return (
        Phase(0, measured + further_ranks, 0),
        Phase(step.all_gradients, 0, step.largest_weight),
    )


_FAMILIES: dict[str, Callable[[_Step], tuple[Phase, ...]]] = {
    "gpt": _gpt, "llama": _llama, "vit": _vit, "mixer": _mixer, "traced": _traced,
}  # fmt: skip
