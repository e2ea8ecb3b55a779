"""Products that layers share, against the plain operations that they stand for, and what they call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from simulate.layers.per_device import ReplicatedLinear
from simulate.layers.products import THIN_ROWS, copies_linear, row_parts, sum_of_rows, thin_product
from tests.simulate.layers.test_lora import Calls, random

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        pytest.param(5, 1, id="few"),
        pytest.param(THIN_ROWS, 1, id="just so many"),
        pytest.param(6304, 8, id="ViT's 32 samples of 197 tokens: 788 each, as 7 does not divide them"),
        pytest.param(2053, 1, id="a prime number of rows"),
    ],
)
def test_rows_are_taken_in_equal_parts(rows: int, parts: int) -> None:
    assert row_parts(rows) == parts


@pytest.mark.parametrize(("heads", "rows"), [(1, 3), (1, 2 * THIN_ROWS), (1, 2053), (3, 5)])
def test_a_thin_product_is_the_plain_one(heads: int, rows: int) -> None:
    x_HMI, columns_HIR = random(heads, rows, 4).detach(), random(heads, 2, 4).detach().mT
    got = thin_product(x_HMI, columns_HIR, 0.5)
    torch.testing.assert_close(got, 0.5 * (x_HMI @ columns_HIR), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_sum_of_rows_is_the_plain_one(dtype: torch.dtype) -> None:
    g_CMO = torch.tensor([[[1.0, 2.0], [3.0, 5.0]], [[-1.0, 0.5], [0.25, 4.0]]], dtype=dtype)
    assert sum_of_rows(g_CMO).tolist() == [[4.0, 7.0], [-0.75, 4.5]]


@pytest.mark.parametrize("with_bias", [True, False])
def test_copies_of_a_linear_layer_have_the_gradients_of_finite_differences(with_bias: bool) -> None:
    x, weight, bias = random(3, 4, 5), random(3, 2, 5), random(3, 2) if with_bias else None
    assert torch.autograd.gradcheck(copies_linear, (x, weight, bias))


def test_a_weights_gradient_is_not_copied() -> None:
    """Autograd's own product leaves it transposed, and accumulating copies it: all weights of all devices."""
    weight, bias = nn.Parameter(random(3, 2, 5).detach()), nn.Parameter(random(3, 2).detach())
    layer = ReplicatedLinear(weight, bias)
    given: Tensor = random(12, 2).detach()
    with Calls() as calls:
        layer(random(12, 5).detach()).backward(given)
    assert weight.grad is not None and weight.grad.is_contiguous()
    assert not {"copy_", "clone", "sum"} & set(calls.of)
