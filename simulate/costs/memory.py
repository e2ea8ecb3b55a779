"""Peak memory of one device, by part, as the largest of a step's and a merge's phases (never their sum).

Letters: u one activation tensor (tokens x width), V vocabulary, L blocks. A pre-norm block with GELU and fused
attention keeps 16u for its backward pass (Korthikanti et al. 2022, arXiv 2205.05198, section 4.1, without dropout and
with the attention matrix never stored), an adapted layer tokens x rank more. The constants of working memory follow the
order in which torch's autograd frees and allocates; tests hold the result against the allocator's trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from simulate.config import LteOptions, Run
from simulate.costs.traffic import (
    ELEMENT_BYTES,
    Transport,
    frozen_bytes,
    lte_buffer_sizes,
    lte_merge_sizes,
    pack,
    replicated_groups,
)  # fmt: skip
from simulate.hardware import Device
from simulate.models.shapes import ModelShape

BLOCK_TENSORS = 16
"""Activation tensors, in u, that a block keeps: inputs of 2 norms, 4 linears (1, 1, 1, 4), q, k, v, the GELU (4)."""
BLOCK_BACKWARD = 5
"""Working tensors, in u, at the height of a block's backward: the stream's gradient and one of the GELU's width."""
LOSS_CHUNK_ELEMENTS = 2**20
"""Logits that the loss works on at once: a few megabytes of scratch, whatever the batch."""
FLOAT_BYTES = 4
INDEX_BYTES = 8


@dataclass(frozen=True)
class Memory:
    """Bytes of one device at its peak."""

    weights: int
    """Frozen or dense weights, and what is replicated."""
    adapters: int
    """A and B, and in reset-less mode their values at the last merge."""
    gradients: int
    optimizer: int
    activations: int
    temporary: int
    """Buffers of the phase that peaks: logits, working tensors, messages."""
    reserved: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return (
            self.weights + self.adapters + self.gradients + self.optimizer + self.activations + self.temporary
            + self.reserved
        )  # fmt: skip

    def parts(self) -> dict[str, int]:
        """Return bytes by part."""
        return dict(vars(self))


@dataclass(frozen=True)
class _Phase:
    gradients: int
    activations: int
    temporary: int

    @property
    def total(self) -> int:
        return self.gradients + self.activations + self.temporary


def peak_memory(run: Run, shape: ModelShape, device: Device) -> Memory:
    """Return the peak of one device of the run."""
    method, element_bytes, devices = run.method, ELEMENT_BYTES[run.train.dtype], run.cluster.devices
    tokens = run.train.micro_batch * shape.context
    checkpointing = run.train.activation_checkpointing
    if isinstance(method, LteOptions):
        shared_memory = device.host_memory_bytes == 0
        weights, adapters, trained = _lte_static(shape, method, element_bytes, shared_memory)
        kept_gradients, exchanged = (
            0,
            _lte_exchange(
                shape,
                devices,
                method.rank,
                method.heads_per_device,
                method.quantize,
                method.merge_transport,
                element_bytes,
            ),
        )
        block_trained = method.heads_per_device * shape.factors(method.rank) // shape.layers
        rank = method.rank
    else:
        weights, adapters, trained = shape.parameters * element_bytes, 0, shape.parameters
        kept_gradients = trained * element_bytes
        exchanged = max(replicated_groups(shape.dense_tensors, element_bytes)) if devices > 1 else 0
        block_trained, rank = sum(linear.weights for linear in shape.adapted), 0
    phases = _step_phases(shape, tokens, rank, block_trained * element_bytes, checkpointing, element_bytes)
    phase = max((*phases, _Phase(kept_gradients, 0, exchanged)), key=lambda p: p.total)
    return Memory(
        weights=weights,
        adapters=adapters,
        gradients=phase.gradients,
        optimizer=2 * trained * element_bytes,
        activations=phase.activations,
        temporary=phase.temporary,
        reserved=device.reserved_bytes,
    )


def host_memory_bytes(run: Run, shape: ModelShape, device: Device) -> int:
    """Bytes of the host's own memory that one device needs: the weights that merges start from."""
    method = run.method
    if not isinstance(method, LteOptions) or not _needs_master(method) or device.host_memory_bytes == 0:
        return 0
    return shape.adapted_parameters * ELEMENT_BYTES[run.train.dtype]


def _needs_master(method: LteOptions) -> bool:
    """Whether merges need weights beside the frozen ones: the start weights, to which reset-less merges return, or a
    full-precision copy of quantised ones, which would swallow small updates.
    """
    return method.reset == "none" or method.quantize != "none"


def _lte_static(shape: ModelShape, method: LteOptions, element_bytes: int, shared_memory: bool) -> tuple[int, int, int]:
    """Return bytes of weights, bytes of adapters, and the number of trained elements."""
    frozen = frozen_bytes(shape, method.quantize, element_bytes)
    start = shape.adapted_parameters * element_bytes if _needs_master(method) and shared_memory else 0
    factors = method.heads_per_device * shape.factors(method.rank)
    trained = factors + shape.replicated_parameters
    weights = frozen + start + shape.replicated_parameters * element_bytes
    return weights, factors * element_bytes * (2 if method.reset == "none" else 1), trained


@lru_cache(maxsize=4096)
def _lte_exchange(
    shape: ModelShape, devices: int, rank: int, heads_per_device: int, quantize: str, transport: Transport,
    element_bytes: int,
) -> int:  # fmt: skip
    """Largest buffer of a merge: what travels in one message (a device alone sends none), and the work beside it."""
    sizes = lte_merge_sizes(shape, rank, heads_per_device, quantize, transport, element_bytes)
    layers = shape.in_order()
    messages = 1 if devices > 1 else 0
    largest = 0
    for group in pack(lte_buffer_sizes(sizes, devices, transport)):
        sent = sum(sizes[i][0] for i in group)
        if transport == "gather":  # everyone's factors, and one layer's B laid out for the product
            stacked = max(devices * heads_per_device * layers[i].out_features * rank for i in group) * element_bytes
            largest = max(largest, messages * devices * sent + stacked)
        elif transport == "reduce":  # the dense sums, and the message they are packed into
            largest = max(largest, (1 + messages) * sent)
        else:  # the factors packed to push, or the weights that come back
            largest = max(largest, messages * max(sent, sum(sizes[i][1] for i in group)))
    replicated = max(replicated_groups(shape.replicated_tensors, element_bytes))
    return max(largest, replicated if transport == "server" else (1 + messages) * replicated)


@lru_cache(maxsize=4096)
def _step_phases(
    shape: ModelShape, tokens: int, rank: int, block_gradient_bytes: int, checkpointing: bool, element_bytes: int
) -> tuple[_Phase, ...]:
    """Return the phases of one step that can be its peak, over what is held all the time."""
    u = tokens * shape.width * element_bytes
    adapter = tokens * rank * element_bytes * len(shape.adapted)
    attention_statistics = tokens * shape.attention_heads * max(element_bytes, FLOAT_BYTES)
    block = BLOCK_TENSORS * u + adapter + attention_statistics + 4 * tokens * element_bytes
    kept, recomputed = (u, block - u) if checkpointing else (block, 0)
    ends = 2 * tokens * element_bytes + 3 * tokens * INDEX_BYTES
    logits = tokens * shape.vocab * element_bytes
    scratch = min(tokens, max(1, LOSS_CHUNK_ELEMENTS // shape.vocab)) * shape.vocab * element_bytes
    token_table = shape.vocab * shape.width * element_bytes
    largest_weight = 0 if rank else max(linear.weights for linear in shape.adapted) * element_bytes
    working = BLOCK_BACKWARD * u + largest_weight + (2 if checkpointing else 1) * tokens * rank * element_bytes
    replicated = shape.replicated_parameters * element_bytes
    all_gradients = shape.layers * block_gradient_bytes + replicated
    return (
        _Phase(0, shape.layers * kept + ends + 2 * u, logits + scratch),
        # The logits, which have become their own gradient, with the output layer's two gradients.
        _Phase(token_table, shape.layers * kept + ends + 2 * u, logits + u),
        _Phase(token_table, shape.layers * kept + ends + recomputed, working),
        _Phase(all_gradients - block_gradient_bytes, kept + ends + recomputed, working),
        _Phase(all_gradients, ends, 2 * token_table + u),  # the tied table's two gradients, and their sum
    )
