"""Quantization of frozen weights to bf16, int8 and NF4 (Dettmers et al. 2023, arXiv 2305.14314), and back.

LoRA layers with `method.quantize` hold their W in this form: it is dequantized for each product and quantized at
merges.

    bf16        two bytes a weight, no scales
    int8        one byte, and an fp32 scale for each row of W
    nf4         half a byte, and an fp32 scale for each block of 64
    nf4-double  as nf4, with scales of one byte, and an fp32 second-level scale ("top") for each 256 of them

Torch rounds to bf16 and multiplies int8 by its scales in one pass, so these need no library. NF4 needs a kernel, since
it is dequantized at every product: bitsandbytes has one for the CPU and one for CUDA, 6 times faster on the CPU than
torch's own operations. It is imported at the first NF4 weight. Quantizing is written here, because it must give the
same bits on every device, and the library's takes 16 times the weight's memory on a CPU; it runs at merges only, so its
speed matters less. Blocks are runs of W as it lies in memory, the first of two codes in the high half of a byte.

Legend: O outputs, I inputs, B blocks, G groups of blocks.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache, wraps
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor

from simulate.common.disk import TEMPORARY_VARIABLE, reserve, temporary_folder
from simulate.common.errors import InputError
from simulate.layers.formats import NF4_BLOCK, NF4_GROUP, PACK_CHUNK_ELEMENTS, Quantize

BYTE = 255
INT8 = 127
NF4_LIBRARY = "bitsandbytes"
NF4_BLOCK_BYTES = NF4_BLOCK // 2


class QuantizedWeight(nn.Module):
    """Frozen matrix in one of the formats, held in its buffers alone."""

    def __init__(self, weight_OI: Tensor, quantize: Quantize) -> None:
        super().__init__()
        self.format, self.shape, self.dtype = quantize, weight_OI.shape, weight_OI.dtype
        for name, tensor in self._quantized(weight_OI.detach()).items():
            self.register_buffer(name, tensor)

    @property
    def device(self) -> torch.device:
        """Device of the buffers."""
        return self.values.device

    def tensors(self) -> list[Tensor]:
        """Return the buffers, which can be sent to a device so that it need not quantize the weight itself."""
        return list(self.buffers())

    @torch.no_grad()
    def quantize(self, weight_OI: Tensor) -> None:
        """Replace the weight; equal weights give equal bits on every device."""
        # Into the same buffers, as a pull from the server writes into them, too.
        for name, tensor in self._quantized(weight_OI).items():
            getattr(self, name).copy_(tensor)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return the weight in the dtype it was given in, (O, I): a new tensor, which the caller may overwrite."""
        if self.format == "bf16":
            return self.values.to(self.dtype)
        if self.format == "int8":
            return self.values.to(self.dtype).mul_(self.scales)  # in place: a product of two dtypes makes two tensors
        scales_B = self.scales if self.format == "nf4" else _expanded(self.scales, self.tops)
        return _unpacked_nf4(self.values, scales_B, self.shape).to(self.dtype)

    values: Tensor
    scales: Tensor
    tops: Tensor

    def _quantized(self, weight_OI: Tensor) -> dict[str, Tensor]:
        if self.format == "bf16":
            return {"values": weight_OI.bfloat16()}
        if self.format == "int8":
            return _int8(weight_OI)
        scales_B, kept = _block_scales(weight_OI), dict[str, Tensor]()
        # The codes must be relative to the scales as they will be decoded, not as they were.
        if self.format == "nf4-double":
            bytes_B, tops_G = _compressed(scales_B)
            kept, scales_B = {"scales": bytes_B, "tops": tops_G}, _expanded(bytes_B, tops_G)
        return {"values": _nf4(weight_OI, scales_B), **(kept or {"scales": scales_B})}


def dense(weight: Tensor | QuantizedWeight) -> Tensor:
    """Return a frozen weight unpacked, or as it is."""
    return weight.dense() if isinstance(weight, QuantizedWeight) else weight


def _int8(weight_OI: Tensor) -> dict[str, Tensor]:
    """Return rows rounded to 127ths of their largest magnitude, and their scales."""
    # `abs` would copy the whole weight.
    scales_O1 = torch.maximum(weight_OI.amax(1, keepdim=True), -weight_OI.amin(1, keepdim=True)).float() / INT8
    values_OI = torch.empty(weight_OI.shape, dtype=torch.int8, device=weight_OI.device)
    rows = max(1, PACK_CHUNK_ELEMENTS // weight_OI.shape[1])
    for weight, scales, values in zip(weight_OI.split(rows), scales_O1.split(rows), values_OI.split(rows), strict=True):
        values.copy_(torch.div(weight, _not_zero(scales)).round_())
    return {"values": values_OI, "scales": scales_O1}


def _block_scales(weight_OI: Tensor) -> Tensor:
    """Return the largest magnitude of every block, (B,), fp32."""
    chunks = weight_OI.reshape(-1).split(PACK_CHUNK_ELEMENTS)
    scales = [_in_blocks(chunk).abs().amax(1) for chunk in _followed(chunks)]
    return _joined(scales, -(-weight_OI.numel() // NF4_BLOCK))


def _followed(chunks: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the chunks to process; of a fake tensor only the first, whose memory stands for all of them."""
    return chunks[:1] if isinstance(chunks[0], FakeTensor) else chunks


def _joined(parts: list[Tensor], elements: int) -> Tensor:
    """Return the parts as one tensor; of a fake tensor, with empty elements for the parts that were skipped."""
    missing = elements - sum(len(part) for part in parts)
    return torch.cat([*parts, parts[0].new_empty(missing)] if missing else parts)


def _in_blocks(chunk: Tensor) -> Tensor:
    return F.pad(chunk.float(), (0, -len(chunk) % NF4_BLOCK)).view(-1, NF4_BLOCK)


def _compressed(scales_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales in 255ths of their group's largest, (B,) bytes, and the largest of each group, (G,)."""
    grouped = F.pad(scales_B, (0, -len(scales_B) % NF4_GROUP)).view(-1, NF4_GROUP)
    tops_G = grouped.amax(1)
    bytes_GB = (grouped / _not_zero(tops_G.unsqueeze(1)) * BYTE).round_().to(torch.uint8)
    return bytes_GB.view(-1)[: len(scales_B)].clone(), tops_G


def _expanded(bytes_B: Tensor, tops_G: Tensor) -> Tensor:
    """Return the values of compressed scales, (B,), fp32."""
    return tops_G.repeat_interleave(NF4_GROUP)[: len(bytes_B)].mul_(bytes_B).div_(BYTE)


def _nf4(weight_OI: Tensor, scales_B: Tensor) -> Tensor:
    """Return the code of each weight's nearest level, of 16 levels times its block's scale, two codes to a byte."""
    levels = nf4_levels().to(weight_OI.device)
    middles = (levels[1:] + levels[:-1]) / 2
    chunk_blocks = PACK_CHUNK_ELEMENTS // NF4_BLOCK
    parts = []
    chunks = weight_OI.reshape(-1).split(PACK_CHUNK_ELEMENTS)
    for chunk, scales in zip(_followed(chunks), scales_B.split(chunk_blocks), strict=False):
        relative = _in_blocks(chunk) / _not_zero(scales.unsqueeze(1))
        codes = torch.bucketize(relative, middles, out_int32=True).to(torch.uint8).view(-1)[: len(chunk)]
        codes = F.pad(codes, (0, len(chunk) % 2))
        parts.append((codes[0::2] << 4) | codes[1::2])
    return _joined(parts, (weight_OI.numel() + 1) // 2)


def _not_zero(scales: Tensor) -> Tensor:
    """Return divisors that are not zero: a block of zeros has scale 0, and stays zero over any other number."""
    return scales.where(scales > 0, 1.0)


def _unpacked_nf4(values: Tensor, scales_B: Tensor, shape: torch.Size) -> Tensor:
    """Return the weight in fp32: each product of a level and its block's scale, rounded once.

    The library gets rows of one block each, the last one padded: with AVX-512 it assumes that every row begins a new
    block, and would use wrong scales where W's width is not a multiple of 64.
    """
    library, rows = nf4_library(), torch.Size((len(scales_B), NF4_BLOCK))
    missing = -len(values) % NF4_BLOCK_BYTES
    codes = F.pad(values, (0, missing)) if missing else values
    state = library.QuantState(absmax=scales_B, shape=rows, dtype=torch.float32, blocksize=NF4_BLOCK, quant_type="nf4")
    unpacked: Tensor = library.dequantize_4bit(codes.unsqueeze(1), state)
    return unpacked.view(-1)[: shape.numel()].view(shape)


@lru_cache(maxsize=1)
def nf4_levels() -> Tensor:
    """Return the 16 levels, rising from −1 to 1: quantiles of a normal distribution, with 0 among them."""
    levels: Tensor = nf4_library().get_4bit_type("nf4", device="cpu")
    return levels


@lru_cache(maxsize=1)
def nf4_library() -> Any:
    """Return bitsandbytes' functions, which dequantize NF4. Raises InputError if they are not installed."""
    try:
        return import_bitsandbytes()
    except ImportError as error:
        raise InputError(
            f"method.quantize in nf4 needs {NF4_LIBRARY}: pip install 'lte[quantize]', or try "
            "--set method.quantize=int8"
        ) from error


@lru_cache(maxsize=1)
def import_bitsandbytes() -> Any:
    """Import bitsandbytes' functions at their first use; raises ImportError."""
    # Its imports warn of optional kernels that are missing, which no run here calls.
    logging.getLogger(NF4_LIBRARY).setLevel(logging.ERROR)
    with warnings.catch_warnings(), without_compiler():
        warnings.simplefilter("ignore")
        return import_module(f"{NF4_LIBRARY}.functional")


@contextmanager
def without_compiler() -> Iterator[None]:
    """Keep torch's compiler from being imported, which takes seconds, by what bitsandbytes says to it at import.

    It compiles kernels for devices that it has none for, which no run here calls, and keeps the compiler from tracing
    its kernels, while nothing here is compiled.
    """
    compile_now, keep_from_tracing = torch.compile, torch._disable_dynamo

    def compile_late(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
        compiled = cache(lambda: compile_now(function, **settings))
        return wraps(function)(lambda *arguments, **keywords: compiled()(*arguments, **keywords))

    torch.compile, torch._disable_dynamo = compile_late, lambda function: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile, torch._disable_dynamo = compile_now, keep_from_tracing


def mapped_copy(weight_OI: Tensor) -> Tensor:
    """Return a copy in host memory that is mapped to a temporary file, so that the system can page it out."""
    if isinstance(weight_OI, FakeTensor):  # it has no numbers to write
        return weight_OI.clone()
    copy = mapped_zeros(weight_OI.numel(), weight_OI.dtype).view(weight_OI.shape)
    return copy.copy_(weight_OI.detach())


def mapped_zeros(count: int, dtype: torch.dtype) -> Tensor:
    """Return zeros, (count,), mapped to a file in TMPDIR that has no name, so that it vanishes with the process."""
    if active_fake_mode() is not None:
        return torch.zeros(count, dtype=dtype)
    try:
        with tempfile.TemporaryFile(prefix="lte-") as file:
            reserve(file.fileno(), count * dtype.itemsize)
            # The mapping keeps the file's content alive after the file is closed.
            return torch.from_numpy(np.memmap(file, torch.empty(0, dtype=dtype).numpy().dtype, "r+", shape=(count,)))
    except OSError as error:
        raise InputError(
            f"{TEMPORARY_VARIABLE}: {temporary_folder()}, the place of temporary files, takes no "
            f"{count * dtype.itemsize:,} bytes more ({error.strerror or error}); make room there, or export "
            f"{TEMPORARY_VARIABLE}=FOLDER"
        ) from None
