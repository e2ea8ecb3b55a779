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
    unpacked: int
    """Bytes of the largest frozen layer while a product unpacks it."""

    @property
    def tokens(self) -> int:
        return self.samples * self.shape.tokens

    @property
    def u(self) -> int:
        return self.tokens * self.shape.width * self.element_bytes

    @property
    def adapters(self) -> int:
        """Bytes that a block's adapted layers keep more: rows in rank dimensions."""
        return self.samples * self.shape.adapted_rows * self.rank * self.element_bytes

    @property
    def logits(self) -> int:
        return self.samples * self.shape.predictions * self.shape.outputs * self.element_bytes

    @property
    def scratch(self) -> int:
        """Of the loss."""
        rows = min(self.samples * self.shape.predictions, max(1, LOSS_CHUNK_ELEMENTS // self.shape.outputs))
        return rows * self.shape.outputs * self.element_bytes

    @property
    def head_table(self) -> int:
        """Bytes of the output layer's weights."""
        return self.shape.outputs * self.shape.width * self.element_bytes

    @property
    def largest_weight(self) -> int:
        """Of a block: its gradient where that is dense, or itself, unpacked."""
        return self.unpacked if self.rank else max(x.weights for x in self.shape.adapted) * self.element_bytes

    @property
    def replicated(self) -> int:
        return self.shape.replicated_parameters * self.element_bytes

    @property
    def all_gradients(self) -> int:
        return self.shape.layers * self.block_gradients + self.replicated


def step_phases(
    shape: ModelShape, samples: int, rank: int, block_gradient_bytes: int, checkpointing: bool, element_bytes: int,
    unpacked_bytes: int = 0,
) -> tuple[Phase, ...]:  # fmt: skip
    """Return the phases of one step that can be its peak, over what is held all the time."""
    return _step_phases(_Step(shape, samples, rank, block_gradient_bytes, checkpointing, element_bytes, unpacked_bytes))


@lru_cache(maxsize=4096)
def _step_phases(step: _Step) -> tuple[Phase, ...]:
    return _FAMILIES[step.shape.family](step)


def _attention_statistics(step: _Step) -> int:
    return step.tokens * step.shape.attention_heads * max(step.element_bytes, FLOAT_BYTES)


def _gpt(step: _Step) -> tuple[Phase, ...]:
    u, tokens, element_bytes, layers = step.u, step.tokens, step.element_bytes, step.shape.layers
    block = BLOCK_TENSORS * u + step.adapters + _attention_statistics(step) + 4 * tokens * element_bytes
    kept, recomputed = (u, block - u) if step.checkpointing else (block, 0)
    ends = 2 * tokens * element_bytes + 3 * tokens * INDEX_BYTES
    working = BLOCK_BACKWARD * u + step.largest_weight
    working += (2 if step.checkpointing else 1) * tokens * step.rank * element_bytes
    table, all_gradients = step.head_table, step.all_gradients
    return (
        Phase(0, layers * kept + ends + 2 * u, step.logits + step.scratch),
        # The logits, which have become their own gradient, with the output layer's two gradients.
        Phase(table, layers * kept + ends + 2 * u, step.logits + u),
        Phase(table, layers * kept + ends + recomputed, working),
        Phase(all_gradients - step.block_gradients, kept + ends + recomputed, working),
        Phase(all_gradients, ends, 2 * table + u),  # the tied table's two gradients, and their sum
    )


def _llama(step: _Step) -> tuple[Phase, ...]:
    """As GPT-2's, with 8u for norms, attention and inputs, and four tensors of the gated network's inner width."""
    u, tokens, element_bytes, layers = step.u, step.tokens, step.element_bytes, step.shape.layers
    inner = tokens * step.shape.mlp_width * element_bytes
    block = 8 * u + 4 * inner + step.adapters + _attention_statistics(step) + 2 * tokens * element_bytes
    kept, recomputed = (u, block - u) if step.checkpointing else (block, 0)
    ends = tokens * element_bytes + 2 * tokens * INDEX_BYTES
    # The stream's gradient, and those of both factors of the gated product beside its own.
    working = u + 2 * inner + step.largest_weight
    table, all_gradients = step.head_table, step.all_gradients
    return (
        Phase(0, layers * kept + ends + 2 * u, step.logits + step.scratch),
        Phase(table, layers * kept + ends + 2 * u, step.logits + u),
        Phase(table, layers * kept + ends + recomputed, working),
        Phase(all_gradients - table - step.block_gradients, kept + ends + recomputed, working),
        Phase(all_gradients, ends, u),
    )


def _vit(step: _Step) -> tuple[Phase, ...]:
    """GPT-2's blocks between the patches and one prediction."""
    u, tokens, element_bytes = step.u, step.tokens, step.element_bytes
    block = BLOCK_TENSORS * u + step.adapters + _attention_statistics(step) + 4 * tokens * element_bytes
    working = BLOCK_BACKWARD * u + step.largest_weight
    return _of_images(step, block, working)


def _mixer(step: _Step) -> tuple[Phase, ...]:
    """Inputs of 2 norms and 2 networks (one transposed, so copied), and of each network's GELU and last layer."""
    u, tokens, element_bytes = step.u, step.tokens, step.element_bytes
    over_channels = tokens * step.shape.mlp_width * element_bytes
    over_tokens = step.samples * step.shape.width * step.shape.tokens_width * element_bytes
    block = 4 * u + 2 * over_tokens + 2 * over_channels + step.adapters + 4 * tokens * element_bytes
    working = u + over_channels + step.largest_weight
    return _of_images(step, block, working)


def _of_images(step: _Step, block: int, working: int) -> tuple[Phase, ...]:
    u, layers, all_gradients = step.u, step.shape.layers, step.all_gradients
    kept, recomputed = (u, block - u) if step.checkpointing else (block, 0)
    # The images, and once more as patches.
    ends = 2 * step.samples * step.shape.inputs * step.element_bytes
    return (
        Phase(0, layers * kept + ends + u, u + step.logits),
        Phase(step.head_table, layers * kept + ends + recomputed, working),
        Phase(all_gradients - step.block_gradients, kept + ends + recomputed, working),
        Phase(all_gradients, ends, u),
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
