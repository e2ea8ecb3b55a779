"""Numbers in fewer bits on the wire, and means of them with error feedback.

Legend: L local devices, N devices, X elements, C elements of a chunk (the part that one device averages), W blocks of
WIRE_BLOCK elements that share a scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from simulate.comm.base import Communicator
from simulate.comm.transfers import WIRE_BLOCK, chunk_elements

LEVELS = {"int8": 127, "int4": 7}
"""Largest magnitude of a symmetric grid."""
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def encode(x_LX: Tensor, wire: str) -> list[Tensor]:
    """Return what travels for each row, (L, ...) each: rounded values, and for int8 and int4 the scales of the blocks.

    x ≈ scale·q with q in −levels ... levels and scale = max|x| / levels over a block; rounding is to nearest.
    """
    if wire == "full":
        return [x_LX]
    if wire in HALVES:
        half = x_LX.to(HALVES[wire])
        # What fp16 cannot hold travels as its largest number, and the rest with the next messages.
        return [half.clamp_(-torch.finfo(half.dtype).max, torch.finfo(half.dtype).max)]
    rows, elements = x_LX.shape
    whole = elements % WIRE_BLOCK == 0
    x_LWX = (x_LX if whole else F.pad(x_LX, (0, -elements % WIRE_BLOCK))).view(rows, -1, WIRE_BLOCK)
    scale_LW = (torch.linalg.vector_norm(x_LWX, torch.inf, dim=2) / LEVELS[wire]).float()
    # A block of zeros has no scale; any but zero gives back zeros.
    divisor = torch.where(scale_LW > 0, scale_LW, torch.ones_like(scale_LW)).to(x_LX.dtype)
    q = (x_LWX / divisor.unsqueeze(2)).round_().clamp_(-LEVELS[wire], LEVELS[wire])
    q_LX = q.view(rows, -1)[:, :elements].to(torch.int8)
    return [q_LX if wire == "int8" else _two_in_a_byte(q_LX), scale_LW]


def decode(message: Sequence[Tensor], elements: int, wire: str, dtype: torch.dtype) -> Tensor:
    """Return the rows, (L, elements), that `encode` was given, as far as the format kept them."""
    if wire == "full" or wire in HALVES:
        return message[0].to(dtype)
    packed, scale_LW = message
    q_LX = packed if wire == "int8" else _from_bytes(packed, elements)
    whole = q_LX if elements % WIRE_BLOCK == 0 else F.pad(q_LX, (0, -elements % WIRE_BLOCK))
    x_LWX = whole.reshape(len(q_LX), -1, WIRE_BLOCK).to(dtype)
    x_LWX.mul_(scale_LW.to(dtype).unsqueeze(2))
    return x_LWX.view(len(q_LX), -1)[:, :elements]


def _two_in_a_byte(q_LX: Tensor) -> Tensor:
    nibbles = F.pad(q_LX, (0, q_LX.shape[1] % 2)).to(torch.uint8) & 0xF
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


def _from_bytes(packed: Tensor, elements: int) -> Tensor:
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=2).view(len(packed), -1)[:, :elements].to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def round_trip(x_LX: Tensor, wire: str) -> Tensor:
    """Return the rows as a receiver sees them."""
    return decode(encode(x_LX, wire), x_LX.shape[1], wire, x_LX.dtype)


class CompressedMean:
    """The mean over all devices of vectors that travel compressed, with error feedback on both ways.

    Worker n sends C(x_n + e_n) and keeps e_n ← x_n + e_n − C(x_n + e_n); the device that owns a chunk averages what it
    received, sends C(m + ē) to all, and keeps ē likewise (Tang et al. 2021, arXiv 2102.02888, section 4.3).
    """

    def __init__(self, elements: int, wire: str, communicator: Communicator, like: Tensor) -> None:
        self.wire, self.communicator, self.elements = wire, communicator, elements
        local, devices = len(communicator.local_devices), communicator.num_devices
        self.chunk = chunk_elements(elements, devices)
        # As long as the chunks of all devices together.
        self.sent_error_LX = like.new_zeros(local, devices * self.chunk)
        self.mean_error_LC = like.new_zeros(local, self.chunk)

    def mean(self, parts: Iterable[Tensor]) -> list[Tensor]:
        """Return the mean, [(X,)], of vectors that are given in parts, (L, ...) each.

        As all lists that come of exchanges in the background, it is filled when it has arrived.
        """
        gathered = self.communicator.all_gather(self._means_of_chunks(parts))
        mean: list[Tensor] = []

        def unpack() -> None:
            everyones_NC = decode(gathered, self.chunk, self.wire, self.mean_error_LC.dtype)
            mean.append(everyones_NC.reshape(-1)[: self.elements])

        self.communicator.on_complete(unpack)
        return mean

    def _means_of_chunks(self, parts: Iterable[Tensor]) -> list[Tensor]:
        """Return the message, (L, ...), with the means of what all devices sent of the chunks that belong here."""
        local, devices = len(self.mean_error_LC), self.communicator.num_devices
        sent = self._send(parts)
        received = self.communicator.all_to_all([part.view(local, devices, *part.shape[1:]) for part in sent])
        message = [part.new_empty(local, *part.shape[1:]) for part in sent]

        def average() -> None:
            mean_LC = self._mean_of(received)
            received.clear()
            for part, content in zip(message, encode(mean_LC, self.wire), strict=True):
                part.copy_(content)
            torch.sub(mean_LC, decode(message, self.chunk, self.wire, mean_LC.dtype), out=self.mean_error_LC)

        self.communicator.on_complete(average)
        return message

    def _mean_of(self, received: list[Tensor]) -> Tensor:
        """Return the mean of all devices' chunks and what the last one left out, (L, C)."""
        local, devices = len(self.mean_error_LC), self.communicator.num_devices
        flat = [part.reshape(local * devices, *part.shape[2:]) for part in received]
        parts_LNC = decode(flat, self.chunk, self.wire, self.mean_error_LC.dtype).view(local, devices, self.chunk)
        return parts_LNC.sum(1).div_(devices).add_(self.mean_error_LC)

    def _send(self, parts: Iterable[Tensor]) -> list[Tensor]:
        """Return the messages to all devices, (L*N, ...), and keep what they leave out."""
        self._add_to_error(parts)
        x_NC = self.sent_error_LX.view(-1, self.chunk)
        message = encode(x_NC, self.wire)
        x_NC.sub_(decode(message, self.chunk, self.wire, x_NC.dtype))
        return message

    def _add_to_error(self, parts: Iterable[Tensor]) -> None:
        """Add a vector in parts to what the last message left out, so that nothing is held twice."""
        first = 0
        for part in parts:
            flat_LX = part.flatten(1)
            self.sent_error_LX[:, first : first + flat_LX.shape[1]] += flat_LX
            first += flat_LX.shape[1]

    def state_dict(self) -> dict[str, Tensor]:
        """Return both errors by name."""
        return {"sent_error": self.sent_error_LX, "mean_error": self.mean_error_LC}
