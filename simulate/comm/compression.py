"""Compression of messages to fp16, bf16, int8 or int4, and means of compressed vectors with error feedback.

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
from simulate.comm.transfers import WIRE_BLOCK, chunk_elements

LEVELS = {"int8": 127, "int4": 7}
"""Largest whole number of each symmetric grid, −levels ... levels."""
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""Formats of two bytes, which need no scale."""


def encode(x_LX: Tensor, wire: str) -> list[Tensor]:
    """Return the message of each row as tensors (L, ...): rounded values, and for int8 and int4 the blocks' scales.

    x ≈ scale·q with q in −levels ... levels and scale = max|x| / levels over a block; rounding is to nearest.
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
    scale_LW = (torch.linalg.vector_norm(x_LWX, torch.inf, dim=2) / LEVELS[wire]).float()
    # A block of zeros has scale 0; divide it by 1 instead, so that it stays zero.
    divisor = torch.where(scale_LW > 0, scale_LW, torch.ones_like(scale_LW)).to(x_LX.dtype)
    q = (x_LWX / divisor.unsqueeze(2)).round_().clamp_(-LEVELS[wire], LEVELS[wire])
    q_LX = q.view(rows, -1)[:, :elements].to(torch.int8)
    return [q_LX if wire == "int8" else _pack_int4(q_LX), scale_LW]


def decode(message: Sequence[Tensor], elements: int, wire: str, dtype: torch.dtype) -> Tensor:
    """Return the rows, (L, elements), of a message made by `encode`, rounded by its format."""
    if wire == "full" or wire in HALVES:
        return message[0].to(dtype)
    packed, scale_LW = message
    q_LX = packed if wire == "int8" else _unpack_int4(packed, elements)
    whole = q_LX if elements % WIRE_BLOCK == 0 else F.pad(q_LX, (0, -elements % WIRE_BLOCK))
    x_LWX = whole.reshape(len(q_LX), -1, WIRE_BLOCK).to(dtype)
    x_LWX.mul_(scale_LW.to(dtype).unsqueeze(2))
    return x_LWX.view(len(q_LX), -1)[:, :elements]


def _pack_int4(q_LX: Tensor) -> Tensor:
    """Return numbers from −8 to 7 as two's complements of 4 bits, the first of two in a byte's lower half."""
    # An odd count gets a zero, so that every byte holds two.
    nibbles = F.pad(q_LX, (0, q_LX.shape[1] % 2)).to(torch.uint8) & 0xF
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


def _unpack_int4(packed: Tensor, elements: int) -> Tensor:
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=2).view(len(packed), -1)[:, :elements].to(torch.int8)
    # Two's complement of 4 bits: 8 to 15 stand for −8 to −1.
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


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
            for part, content in zip(message, encode(mean_LC, self.wire), strict=True):
                part.copy_(content)
            torch.sub(mean_LC, decode(message, self.chunk, self.wire, mean_LC.dtype), out=self.mean_error_LC)

        self.communicator.on_complete(average)
        return message

    def _mean_of(self, received: list[Tensor]) -> Tensor:
        """Return the mean of all devices' chunks, plus the rounding error of the last mean, (L, C)."""
        local, devices = len(self.mean_error_LC), self.communicator.num_devices
        flat = [part.reshape(local * devices, *part.shape[2:]) for part in received]
        parts_LNC = decode(flat, self.chunk, self.wire, self.mean_error_LC.dtype).view(local, devices, self.chunk)
        return parts_LNC.sum(1).div_(devices).add_(self.mean_error_LC)

    def _compress(self, parts: Iterable[Tensor]) -> list[Tensor]:
        """Return the messages to all devices, (L*N, ...), and keep their rounding error for the next ones."""
        # The vector is added to the error part by part, so that no second buffer of its length is needed.
        first = 0
        for part in parts:
            flat_LX = part.reshape(len(part), -1)  # of a scalar, too
            self.sent_error_LX[:, first : first + flat_LX.shape[1]] += flat_LX
            first += flat_LX.shape[1]
        x_NC = self.sent_error_LX.view(-1, self.chunk)
        # The error holds vector plus old error by now: send its rounded value, keep the rest.
        message = encode(x_NC, self.wire)
        x_NC.sub_(decode(message, self.chunk, self.wire, x_NC.dtype))
        return message

    def state_dict(self) -> dict[str, Tensor]:
        """Return both rounding errors by name, for checkpoints."""
        return {"sent_error": self.sent_error_LX, "mean_error": self.mean_error_LC}
