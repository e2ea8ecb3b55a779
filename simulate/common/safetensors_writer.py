"""Writer of safetensors files, one tensor at a time.

The format (https://github.com/huggingface/safetensors#format) is the header's length in 8 little-endian bytes, the
header in JSON, padded with blanks, and then the tensors' bytes one after the other without gaps. The library's own
writer copies all tensors at once, and does not raise OSError on a full disk; this one copies at most one tensor from
another device at a time. The library reads the result.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import torch
from torch import Tensor

DTYPES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Names of dtypes in the format, the widest first. Tensors are written in this order, so that each begins at a
multiple of its element's bytes."""
ALIGNMENT = 8
"""Bytes that the header's length is padded to a multiple of."""


def file_parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[memoryview]:
    """Yield the bytes of a file: its header, then each tensor (a view of a contiguous CPU tensor, else a copy)."""
    assert sys.byteorder == "little", "tensors are written as they lie in memory, and the format is little-endian"
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPES)}
    names = sorted(tensors, key=lambda name: (ranks[tensors[name].dtype], name))
    yield memoryview(_header({name: tensors[name] for name in names}, metadata))
    for name in names:
        # In one expression: a local variable would keep this tensor's copy while the next one is made.
        yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to an open file. Raises OSError where the disk refuses."""
    for part in file_parts(tensors, metadata):
        with part:  # release the tensor's memory before the next one is copied
            file.write(part)


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
