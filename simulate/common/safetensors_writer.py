"""safetensors files, written one tensor at a time; torch-free until a tensor is written.

The format (https://github.com/huggingface/safetensors#format) is the header's length in 8 little-endian bytes, the
header in JSON, padded with blanks, and then the tensors' bytes one after the other without gaps. The library's own
writer needs all tensors at once and raises no OSError where the disk is full. This one copies at most one tensor from
another device at a time. Checkpoints and `lte export` write tensors with it; the cache of data (simulate.data.cache)
takes the header alone. The library reads the files.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:  # plans read the cache of data, and must not wait for torch
    from torch import Tensor

DTYPES = {
    "int64": ("I64", 8), "uint64": ("U64", 8), "float64": ("F64", 8), "complex64": ("C64", 8), "float32": ("F32", 4),
    "uint32": ("U32", 4), "int32": ("I32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2), "uint16": ("U16", 2),
    "int16": ("I16", 2), "int8": ("I8", 1), "uint8": ("U8", 1), "bool": ("BOOL", 1),
}  # fmt: skip
"""Name of a dtype in torch and numpy → its name in the format, and bytes of an element, widest first."""
ALIGNMENT = 8
"""Bytes that the header's length is padded to a multiple of."""


def header(
    shapes: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """Return a file's first bytes, and the position in the file where each tensor begins, in the order of the file.

    `shapes` gives each tensor's dtype (a key of DTYPES) and shape.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begins, end, ranks = dict[str, int](), 0, list(DTYPES)
    # The widest elements lead, so that every tensor begins at a multiple of its element's bytes.
    for name in sorted(shapes, key=lambda name: (ranks.index(shapes[name][0]), name)):
        dtype, shape = shapes[name]
        format_name, element_bytes = DTYPES[dtype]
        begins[name], end = end, end + math.prod(shape) * element_bytes
        entries[name] = {"dtype": format_name, "shape": list(shape), "data_offsets": [begins[name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    content = len(text).to_bytes(8, "little") + text
    return content, {name: len(content) + begin for name, begin in begins.items()}


def file_parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[memoryview]:
    """Yield the bytes of a file: its header, then each tensor's, copied only where it cannot be read in place."""
    assert sys.byteorder == "little", "tensors are written as they lie in memory, and the format is little-endian"
    shapes = {name: (str(tensor.dtype).removeprefix("torch."), tensor.shape) for name, tensor in tensors.items()}
    content, begins = header(shapes, metadata)
    yield memoryview(content)
    for name in begins:
        yield _bytes_of(tensors[name])


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to an open file. Raises OSError where the disk refuses."""
    for part in file_parts(tensors, metadata):
        with part:  # released before the next tensor is copied
            file.write(part)


def _bytes_of(tensor: Tensor) -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
