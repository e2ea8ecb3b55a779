"""Compression of messages to fp16, bf16, int8, int4 or int2, and means of compressed vectors with error feedback.

Compressed methods trade precision of a message for bytes; error feedback sends what a message lost with the next one,
so that nothing is lost for good. Merges of LTE (simulate.methods.lte.merge) and other averaging methods call this.

Legend: L local devices, N devices, X elements, C elements of a chunk (the part that one device averages), W blocks of
WIRE_BLOCK elements that share a scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from simulate.comm.base import Exchanges
from simulate.comm.transfers import WIRE_BITS, WIRE_BLOCK, chunk_elements

LEVELS = {"int8": 127, "int4": 7}
"""Largest whole number of each symmetric grid, −levels ... levels."""
FOUR_LEVELS_OF_RMS = 0.4979
"""Half a step between the four equidistant levels that are nearest to normal numbers, over their standard deviation
(0.9957 / 2: Max 1960, "Quantizing for minimum distortion", IRE Transactions on Information Theory, table II)."""
ZERO_SHARE = 1e-6
"""Share of a step of int2 up to which a negative number counts as zero."""
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""Formats of two bytes, which need no scale."""


def encode(x_LX: Tensor, wire: str, numbers_L: Sequence[int] | None = None) -> list[Tensor]:
    """Return the message of each row as tensors (L, ...): rounded values, and for whole numbers the blocks' scales.

    x ≈ scale·q. For int8 and int4 q is in −levels ... levels, rounded to nearest, and scale = max|x| / levels over a
    block. For int2 q is −3, −1, 1 or 3, and scale = Σxq / Σq² in bf16: the largest number of a block would leave the
    others hardly any level. `numbers_L` says how many numbers of a row count, where zeros behind them fill it up.
    """
    if wire == "full":
        return [x_LX]
    if wire in HALVES:
        half = x_LX.to(HALVES[wire])
        # Overflow would be infinite, and error feedback could not correct that: send the largest number instead.
        return [half.clamp_(-torch.finfo(half.dtype).max, torch.finfo(half.dtype).max)]
    rows, elements = x_LX.shape
    whole = elements % WIRE_BLOCK == 0  # F.pad copies even without anything to pad
    x_LWX = (x_LX if whole else F.pad(x_LX, (0, -elements % WIRE_BLOCK))).view(rows, -1, WIRE_BLOCK)
    if wire == "int2":
        q_LWX, scale_LW = _round_to_four_levels(x_LWX, numbers_L or [elements] * rows)
        # −3, −1, 1, 3 travel as 0, 1, 2, 3.
        return [_pack(q_LWX.add_(3).div_(2).view(rows, -1)[:, :elements].to(torch.int8), 2), scale_LW]
    scale_LW = (torch.linalg.vector_norm(x_LWX, torch.inf, dim=2) / LEVELS[wire]).float()
    q = (x_LWX / _divisor(scale_LW).to(x_LX.dtype).unsqueeze(2)).round_().clamp_(-LEVELS[wire], LEVELS[wire])
    q_LX = q.view(rows, -1)[:, :elements].to(torch.int8)
    return [q_LX if wire == "int8" else _pack(q_LX, 4), scale_LW]


def _divisor(scale_LW: Tensor) -> Tensor:
    # A block of zeros has scale 0; divide it by 1 instead, so that it stays zero.
    return torch.where(scale_LW > 0, scale_LW, torch.ones_like(scale_LW))


def _round_to_four_levels(x_LWX: Tensor, numbers_L: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return q of blocks as floats, −3, −1, 1 or 3, and each block's scale (L, W) in bf16.

    Levels are chosen by the root mean square; the scale of least squares then makes what is lost smaller than x, as
    error feedback needs (arXiv 1901.09847): |x − scale·q|² = |x|² − (Σxq)² / Σq².
    """
    firsts_W = torch.arange(0, x_LWX.shape[1] * WIRE_BLOCK, WIRE_BLOCK)
    counts_LW = (torch.tensor(numbers_L).unsqueeze(1) - firsts_W).clamp(0, WIRE_BLOCK).to(x_LWX)
    half_step_LW = torch.linalg.vector_norm(x_LWX, dim=2).div_(counts_LW.sqrt().clamp_(min=1)).mul_(FOUR_LEVELS_OF_RMS)
    steps_LWX = x_LWX / _divisor(half_step_LW).mul_(2).unsqueeze(2)
    # What is zero but for rounding has no sign: it is 1 everywhere, so that all processors send the same.
    q_LWX = steps_LWX.add_(ZERO_SHARE).floor_().clamp_(-2, 1).mul_(2).add_(1)
    # The zeros that fill a block up have q = 1, and nobody reads them.
    squares_LW = torch.linalg.vector_norm(q_LWX, dim=2).square_().sub_(WIRE_BLOCK - counts_LW).clamp_(min=1)
    return q_LWX, (x_LWX.unsqueeze(2) @ q_LWX.unsqueeze(3)).flatten(1).div_(squares_LW).bfloat16()


def encoded_shapes(elements: int, wire: str) -> tuple[tuple[int], ...]:
    """Return the shapes of the tensors that `encode` makes of one row of so many elements."""
    if wire == "full" or wire in HALVES:
        return ((elements,),)
    return ((-(-elements * WIRE_BITS[wire] // 8),), (-(-elements // WIRE_BLOCK),))


def decode(message: Sequence[Tensor], elements: int, wire: str, dtype: torch.dtype) -> Tensor:
    """Return the rows, (L, elements), of a message made by `encode`, rounded by its format."""
    if wire == "full" or wire in HALVES:
        return message[0].to(dtype)
    packed, scale_LW = message
    q_LX = packed if wire == "int8" else _unpack(packed, elements, WIRE_BITS[wire])
    if wire == "int4":  # two's complement of 4 bits: 8 to 15 stand for −8 to −1
        q_LX = torch.where(q_LX > 7, q_LX - 16, q_LX)
    whole = q_LX if elements % WIRE_BLOCK == 0 else F.pad(q_LX, (0, -elements % WIRE_BLOCK))
    x_LWX = whole.reshape(len(q_LX), -1, WIRE_BLOCK).to(dtype)
    if wire == "int2":
        x_LWX.mul_(2).sub_(3)
    x_LWX.mul_(scale_LW.to(dtype).unsqueeze(2))
    return x_LWX.view(len(q_LX), -1)[:, :elements]


def _pack(q_LX: Tensor, bits: int) -> Tensor:
    """Return whole numbers by their lowest 2 or 4 bits, the first of a byte in its lowest."""
    in_byte = 8 // bits
    # Zeros fill the last byte up.
    fields = F.pad(q_LX, (0, -q_LX.shape[1] % in_byte)).to(torch.uint8) & (2**bits - 1)
    packed = fields[:, ::in_byte].clone()
    for place in range(1, in_byte):
        packed |= fields[:, place::in_byte] << (bits * place)
    return packed


def _unpack(packed: Tensor, elements: int, bits: int) -> Tensor:
    """Return what `_pack` packed, as unsigned numbers in int8."""
    fields = torch.stack([(packed >> first) & (2**bits - 1) for first in range(0, 8, bits)], dim=2)
    return fields.view(len(packed), -1)[:, :elements].to(torch.int8)


class CompressedMean:
    """Mean over all devices of vectors that are sent compressed, with error feedback in both phases.

    Worker n sends C(x_n + e_n) and keeps e_n ← x_n + e_n − C(x_n + e_n); the device that owns a chunk averages what it
    received, sends C(m + ē) to all, and keeps ē likewise (Tang et al. 2021, arXiv 2102.02888, section 4.3).
    """

    def __init__(self, elements: int, wire: str, communicator: Exchanges, like: Tensor) -> None:
        self.wire, self.communicator, self.elements = wire, communicator, elements
        local, devices = len(communicator.local_devices), communicator.num_devices
        self.chunk = chunk_elements(elements, devices)
        # Chunks are whole blocks, so N of them may be longer than the vector; the rest stays zero.
        self.sent_error_LX = like.new_zeros(local, devices * self.chunk)
        self.mean_error_LC = like.new_zeros(local, self.chunk)
        numbers = [min(max(elements - device * self.chunk, 0), self.chunk) for device in range(devices)]
        self.sent_numbers, self.mean_numbers = numbers * local, [numbers[n] for n in communicator.local_devices]
        """Numbers of the vector in each chunk; the others are zeros."""

    def mean(self, parts: Iterable[Tensor]) -> list[Tensor]:
        """Return the mean, [(X,)], of vectors that are given in parts, (L, ...) each.

        In the background the list is empty until the mean has arrived (see Communicator.background).
        """
        gathered = self.communicator.all_gather(self._average_chunks(parts))
        mean: list[Tensor] = []

        def unpack() -> None:
            everyones_NC = decode(gathered, self.chunk, self.wire, self.mean_error_LC.dtype)
            mean.append(everyones_NC.reshape(-1)[: self.elements])

        self.communicator.on_complete(unpack)
        return mean

    def _average_chunks(self, parts: Iterable[Tensor]) -> list[Tensor]:
        """Send each chunk to its owner, average the local devices' own, and return their compressed means, (L, ...)."""
        local, devices = len(self.mean_error_LC), self.communicator.num_devices
        sent = self._compress(parts)
        received = self.communicator.all_to_all([part.view(local, devices, *part.shape[1:]) for part in sent])
        # Allocated before the exchange arrives, so that the gather behind it knows its buffers already.
        message = [part.new_empty(local, *part.shape[1:]) for part in sent]

        def average() -> None:
            mean_LC = self._mean_of(received)
            received.clear()  # frees the parts before the means are encoded
            for part, content in zip(message, encode(mean_LC, self.wire, self.mean_numbers), strict=True):
                part.copy_(content)
            torch.sub(mean_LC, decode(message, self.chunk, self.wire, mean_LC.dtype), out=self.mean_error_LC)
            self._clear_filling(self.mean_error_LC)

        self.communicator.on_complete(average)
        return message

    def _mean_of(self, received: list[Tensor]) -> Tensor:
        """Return the mean of all devices' chunks, plus the rounding error of the last mean, (L, C)."""
        local, devices = len(self.mean_error_LC), self.communicator.num_devices
        flat = [part.reshape(local * devices, *part.shape[2:]) for part in received]
        parts_LNC = decode(flat, self.chunk, self.wire, self.mean_error_LC.dtype).view(local, devices, self.chunk)
        return self._clear_filling(parts_LNC.sum(1).div_(devices).add_(self.mean_error_LC))

    def _clear_filling(self, chunks_LC: Tensor) -> Tensor:
        """Return the chunks that local devices average, zero again behind the vector's end: int2 has no zero."""
        for chunk_C, number in zip(chunks_LC, self.mean_numbers, strict=True):
            chunk_C[number:] = 0
        return chunks_LC

    def _compress(self, parts: Iterable[Tensor]) -> list[Tensor]:
        """Return the messages to all devices, (L*N, ...), and keep their rounding error for the next ones."""
        # The vector is added to the error part by part, so that no second buffer of its length is needed.
        first = 0
        for part in parts:
            flat_LX = part.reshape(len(part), -1)  # of a scalar, too
            self.sent_error_LX[:, first : first + flat_LX.shape[1]] += flat_LX
            first += flat_LX.shape[1]
            del part, flat_LX  # the last one is not held while the message is rounded
        x_NC = self.sent_error_LX.view(-1, self.chunk)
        # The error holds vector plus old error by now: send its rounded value, keep the rest.
        message = encode(x_NC, self.wire, self.sent_numbers)
        x_NC.sub_(decode(message, self.chunk, self.wire, x_NC.dtype))
        # Behind the vector's end, as in _clear_filling.
        self.sent_error_LX[:, self.elements :] = 0
        return message

    def state_dict(self) -> dict[str, Tensor]:
        """Return both rounding errors by name, for checkpoints."""
        return {"sent_error": self.sent_error_LX, "mean_error": self.mean_error_LC}
