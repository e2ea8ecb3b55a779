"""Tests of compressed messages: rounding error, size in bytes, and means that lose nothing for good."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from simulate.comm.compression import LEVELS, CompressedMean, decode, encode
from simulate.comm.transfers import WIRE_BLOCK, mean_transfers, wire_bytes
from simulate.comm.virtual import VirtualCommunicator
from simulate.layers.formats import ELEMENT_BYTES

pytestmark = pytest.mark.numeric

WIRES = ("full", "fp16", "bf16", "int8", "int4", "int2")
GRIDS = st.sampled_from(["int8", "int4"])
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


@st.composite
def rows(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw rows of numbers of very different magnitudes, with zeros, shorter and longer than a block."""
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 3 * WIRE_BLOCK))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    powers = torch.randint(draw(st.integers(-12, 0)), 3, shape, generator=random)
    signs = torch.randint(-1, 2, shape, generator=random)
    return (signs * torch.rand(shape, generator=random) * 10.0**powers).to(dtype)


def round_trip(x_LX: Tensor, wire: str) -> Tensor:
    """Return the rows as a receiver decodes them."""
    return decode(encode(x_LX, wire), x_LX.shape[1], wire, x_LX.dtype)


def block_maxima(x_LX: Tensor) -> Tensor:
    """Return the largest magnitude of each entry's block."""
    blocks = [block.abs().amax(1, keepdim=True).expand_as(block) for block in x_LX.split(WIRE_BLOCK, dim=1)]
    return torch.cat(blocks, dim=1)


@given(x=rows(), wire=GRIDS)
def test_numbers_come_back_within_half_a_step_of_their_block(x: Tensor, wire: str) -> None:
    half_step = block_maxima(x) / LEVELS[wire] / 2
    assert ((round_trip(x, wire) - x).abs() <= half_step * (1 + 1e-4)).all()  # the scale itself is an fp32 number


@pytest.mark.parametrize(("wire", "kept_bits"), [("fp16", 11), ("bf16", 8)])
@given(x=rows())
def test_halves_come_back_within_half_of_their_last_bit(wire: str, kept_bits: int, x: Tensor) -> None:
    below_normal = 2.0**-25 if wire == "fp16" else 0.0
    assert ((round_trip(x, wire) - x).abs() <= x.abs() * 2.0**-kept_bits + below_normal).all()


@given(x=rows())
def test_in_full_precision_nothing_changes(x: Tensor) -> None:
    assert torch.equal(round_trip(x, "full"), x)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dtype", list(DTYPES))
@given(data=st.data())
def test_a_message_has_the_bytes_that_are_planned_for(wire: str, dtype: str, data: st.DataObject) -> None:
    x = data.draw(rows(DTYPES[dtype]))
    sent = sum(part.numel() * part.element_size() for part in encode(x, wire))
    assert sent == len(x) * wire_bytes(x.shape[1], wire, ELEMENT_BYTES[dtype])


@pytest.mark.parametrize("wire", WIRES)
@given(data=st.data())
def test_what_came_back_once_comes_back_unchanged(wire: str, data: st.DataObject) -> None:
    once = round_trip(data.draw(rows()), wire)
    torch.testing.assert_close(round_trip(once, wire), once, rtol=1e-6, atol=0)


@given(st.lists(st.integers(-7, 7), min_size=1, max_size=300))
def test_int4_keeps_every_value_of_its_grid(values: list[int]) -> None:
    x = torch.tensor([[*values, 7]], dtype=torch.float64)  # a block without a 7 has another scale than 1
    x = torch.cat([x, torch.zeros(1, -x.shape[1] % WIRE_BLOCK, dtype=torch.float64)], dim=1)
    x[:, ::WIRE_BLOCK] = 7
    packed, scale_LW = encode(x, "int4")
    assert packed.dtype == torch.uint8
    assert packed.shape[1] == x.shape[1] // 2
    assert (scale_LW == 1).all()
    assert torch.equal(decode([packed, scale_LW], x.shape[1], "int4", torch.float64), x)


def test_an_int8_block_by_hand() -> None:
    # The scale is 254/127 = 2: 3 is one and a half steps, 5 two and a half; halves go to the even one.
    q, scale = encode(torch.tensor([[254.0, -254.0, 3.0, 5.0, -1.9, 0.0]]), "int8")
    assert scale.tolist() == [[2.0]]
    assert q.tolist() == [[127, -127, 2, 2, -1, 0]]


def test_an_int4_block_by_hand() -> None:
    # The scale is 14/7 = 2; −7 is 0b1001, in the second half of the first byte; a third value leaves a half free.
    packed, scale = encode(torch.tensor([[6.0, -14.0, 2.0]]), "int4")
    assert scale.tolist() == [[2.0]]
    assert packed.tolist() == [[0b1001_0011, 0b0000_0001]]


def test_an_int2_block_by_hand() -> None:
    # Root mean square 2.29, so that a level begins at 2.28: 3, 1, −1, 1; scale (12 + 1 + 2 + 0) / 12 = 1.25.
    packed, scale = encode(torch.tensor([[4.0, 1.0, -2.0, 0.0]]), "int2")
    assert scale.tolist() == [[1.25]]
    assert scale.dtype == torch.bfloat16
    # −3, −1, 1, 3 are 0 to 3, the first in the lowest bits.
    assert packed.tolist() == [[0b10_01_10_11]]


def test_a_short_int2_block_counts_only_its_own_numbers() -> None:
    # Five numbers beside a whole block: their root mean square is 1.61, and with 123 zeros it would be 0.32.
    x = torch.ones(1, WIRE_BLOCK + 5)
    x[0, 0], x[0, -5:] = 3.0, torch.tensor([1.0, -1.0, 1.0, -1.0, 3.0])
    packed, scale = encode(x, "int2")
    assert packed.shape == (1, WIRE_BLOCK // 4 + 2)
    assert round_trip(x, "int2").tolist() == x.tolist()
    assert scale[0, 1] == 1


@given(x=rows())
def test_what_int2_loses_is_shorter_than_what_was_sent(x: Tensor) -> None:
    lost = round_trip(x, "int2") - x
    # As error feedback needs. In the worst block one number is all: 9 of Σq² = 136 are its own; bf16 rounds the scale.
    for block, rest in zip(x.split(WIRE_BLOCK, dim=1), lost.split(WIRE_BLOCK, dim=1), strict=True):
        assert (rest.norm(dim=1) <= block.norm(dim=1) * (1 - 9 / 136) ** 0.5 * (1 + 2**-8)).all()


def test_rounding_noise_around_zero_has_no_sign_in_int2() -> None:
    x = torch.tensor([[1e-17, -1e-17, 3.0, -3.0]], dtype=torch.float64)
    packed, _ = encode(x, "int2")
    assert packed.tolist() == [[0b00_11_10_10]]


def test_normal_numbers_lose_an_eighth_in_int2() -> None:
    x = torch.randn(1, 1000 * WIRE_BLOCK, generator=torch.Generator().manual_seed(0))
    # 0.1188 with the best four equidistant levels (Max 1960); scales that fit each block are a little better.
    assert float((round_trip(x, "int2") - x).square().mean()) == pytest.approx(0.1165, rel=0.01)


def test_each_block_has_its_own_scale() -> None:
    x = torch.cat([torch.full((1, WIRE_BLOCK), 1e6), torch.full((1, 1), 1e-6)], dim=1).double()
    torch.testing.assert_close(round_trip(x, "int4"), x, rtol=1e-6, atol=0)


def compressed(devices: int, elements: int, wire: str) -> CompressedMean:
    return CompressedMean(elements, wire, VirtualCommunicator(devices), torch.zeros(0, dtype=torch.float64))


def mean_of(mean: CompressedMean, vectors_NX: Tensor) -> Tensor:
    (mean_X,) = mean.mean([vectors_NX.clone()])
    return mean_X


def test_a_compressed_mean_by_hand() -> None:
    mean = compressed(2, 2, "int4")
    assert mean_of(mean, torch.tensor([[7.0, 3.4], [7.0, 2.5]]).double()).tolist() == [7, 2]  # 3 and 2: 2.5, to even
    errors = mean.state_dict()
    torch.testing.assert_close(errors["sent_error"][:, 1], torch.tensor([0.4, 0.5]).double())
    assert errors["mean_error"].flatten()[1] == 0.5
    # 3.8 and 3.1 travel as 4 and 3; their mean and the last one's half make 4.
    assert mean_of(mean, torch.tensor([[7.0, 3.4], [7.0, 2.6]]).double()).tolist() == [7, 4]
    assert errors["mean_error"].flatten()[1] == 0


def test_what_fp16_cannot_hold_follows_with_the_next_messages() -> None:
    mean = compressed(2, 1, "fp16")
    told = [float(mean_of(mean, torch.full((2, 1), value).double())) for value in (100_000.0, 0.0)]
    assert told == [65_504.0, pytest.approx(34_496.0, rel=1e-3)]


@pytest.mark.parametrize("wire", WIRES[1:])
@given(devices=st.integers(1, 4), elements=st.integers(1, 600), seed=st.integers(0, 2**32))
def test_a_mean_and_what_it_left_out_are_the_true_mean(wire: str, devices: int, elements: int, seed: int) -> None:
    random, mean = torch.Generator().manual_seed(seed), compressed(devices, elements, wire)
    total, told = torch.zeros(elements, dtype=torch.float64), torch.zeros(elements, dtype=torch.float64)
    for _ in range(3):
        vectors_NX = torch.randn(devices, elements, generator=random, dtype=torch.float64)
        total += vectors_NX.mean(0)
        told += mean_of(mean, vectors_NX)
        errors = mean.state_dict()
        left = errors["sent_error"][:, :elements].mean(0) + errors["mean_error"].flatten()[:elements]
        torch.testing.assert_close(told + left, total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wire", WIRES[1:])
@pytest.mark.parametrize(("devices", "elements"), [(2, 1), (3, 1000), (4, 512)])
def test_a_compressed_mean_sends_what_was_planned(wire: str, devices: int, elements: int) -> None:
    told: list[object] = []
    communicator = VirtualCommunicator(devices, lambda transfer, background: told.append(transfer))
    mean = CompressedMean(elements, wire, communicator, torch.zeros(0, dtype=torch.float64))
    mean_of(mean, torch.ones(devices, elements, dtype=torch.float64))
    assert tuple(told) == mean_transfers(elements, devices, wire, element_bytes=8)


def test_the_sum_detects_a_forgotten_error() -> None:
    mean = compressed(3, 50, "int4")
    vectors_NX = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean_of(mean, vectors_NX)
    mean.sent_error_LX.zero_()
    told = mean_of(mean, torch.zeros(3, 50, dtype=torch.float64))
    errors = mean.state_dict()
    left = errors["sent_error"][:, :50].mean(0) + errors["mean_error"].flatten()[:50]
    assert not torch.allclose(told + left, vectors_NX.mean(0), rtol=1e-3)
