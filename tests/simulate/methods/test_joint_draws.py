"""LTE whose heads' A are orthogonal to one another: the rows, who can draw them, and runs against the slow twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simulate.common.errors import InputError
from simulate.config.run import Run
from simulate.layers.formats import Draws
from simulate.layers.lora import AdapterSpec, LoraLinear, hartley, lora_layers
from simulate.methods.build_network import build_model
from simulate.methods.lte.train import Lte
from tests import tiny
from tests.reference.joint_draw import hartley_matrix, joint_draw, random_orthogonal
from tests.reference.lora import Draw
from tests.reference.lte import LteTwin
from tests.reference.lte_frozen_a import LteFrozenATwin
from tests.simulate.methods.adapter_parity import TRAIN

Twin = Callable[[Run, nn.Module, Draw], LteTwin]
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def layer(inputs: int, rank: int, heads: int, draws: Draws = "joint", first: int = 0, seed: int = 5) -> LoraLinear:
    """Return a layer of 3 outputs with some heads, from the `first` on."""
    spec = AdapterSpec(rank, 1.0, heads_per_device=1, reset_less=False, first_device=first, seed=seed, draws=draws)
    return LoraLinear(torch.zeros(3, inputs, dtype=torch.float64), None, "layer", spec, heads)


def eye(size: int, scale: float = 1.0) -> Tensor:
    return scale * torch.eye(size, dtype=torch.float64)


def test_the_transform_by_hand() -> None:
    # Of two numbers: sum and difference over sqrt(2). Of four: cos + sin is 1, 1, −1, −1 a quarter turn apart.
    pairs = torch.tensor([[3.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    expected = torch.tensor([[4.0, 2.0], [2.0, -2.0]], dtype=torch.float64) / 2**0.5
    torch.testing.assert_close(hartley(pairs), expected, **EXACT)
    unit = torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(hartley(unit), torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64) / 2, **EXACT)


@pytest.mark.parametrize("size", [1, 2, 7, 16, 30])
def test_the_transform_is_its_matrix_and_orthonormal(size: int) -> None:
    torch.testing.assert_close(hartley(eye(size)), hartley_matrix(size), **EXACT)
    torch.testing.assert_close(hartley(hartley(eye(size))), eye(size), **EXACT)


def test_two_heads_of_rank_one_in_the_plane_stand_upright() -> None:
    (first,), (second,) = layer(2, 1, 2).a.detach().unbind()
    assert float(first @ second) == pytest.approx(0, abs=1e-14)
    assert (float(first @ first), float(second @ second)) == pytest.approx((2, 2))  # sqrt(I / r) is sqrt(2)


@pytest.mark.parametrize(("inputs", "rank", "heads"), [(8, 2, 4), (12, 3, 4), (5, 5, 1)])
def test_heads_that_fill_the_inputs_see_every_direction_alike(inputs: int, rank: int, heads: int) -> None:
    a_HRI = layer(inputs, rank, heads).a.detach()
    torch.testing.assert_close(torch.einsum("hri,hrj->ij", a_HRI, a_HRI), eye(inputs, inputs / rank), **EXACT)


def test_independent_heads_do_not_see_every_direction_alike() -> None:
    a_HRI = layer(8, 2, 4, draws="own").a.detach()
    values = torch.linalg.eigvalsh(torch.einsum("hri,hrj->ij", a_HRI, a_HRI))
    assert values[0] < 0.5 * 4 < 1.5 * 4 < values[-1]  # of a mean of I/r = 4


def test_where_heads_do_not_fit_groups_of_them_do() -> None:
    rows_XI = layer(7, 3, 5).a.detach().flatten(0, 1)  # two heads of rank 3 in 7 inputs: {0, 1}, {2, 3}, {4}
    gram_XX = rows_XI @ rows_XI.T
    for start in (0, 6, 12):
        group = gram_XX[start : start + 6, start : start + 6]
        torch.testing.assert_close(group, eye(len(group), 7 / 3), **EXACT)
    assert gram_XX[:6, 6:12].abs().max() > 0.1 and gram_XX[6:12, 12:].abs().max() > 0.1


def test_directions_are_random() -> None:
    """Entries of rows average to zero, over draws, and no pair of places goes together."""
    drawn = torch.stack([layer(16, 4, 1, seed=seed).a.detach()[0] for seed in range(400)]).flatten(0, 1)
    # Rows have the squared norm I/r = 4, a quarter a place; 1,600 of them leave about 0.0125 of a mean.
    assert drawn.mean(0).abs().max() < 0.06
    assert (drawn.T @ drawn / len(drawn) - eye(16, 1 / 4)).abs().max() < 0.06


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda: layer(9, 3, 1, seed=6).a, id="another seed"),
        pytest.param(lambda: layer(9, 3, 1).draw_a(1), id="another merge"),
        pytest.param(lambda: layer(9, 3, 1, first=1).a, id="another head of the group"),
        pytest.param(lambda: layer(9, 3, 1, first=3).a, id="another group"),
    ],
)
def test_no_two_addresses_draw_the_same(other: Callable[[], Tensor]) -> None:
    assert (layer(9, 3, 1).a - other()).abs().max() > 0.1


@pytest.mark.parametrize("first", range(5))
@pytest.mark.parametrize("local", [1, 2])
def test_one_process_draws_exactly_what_all_have(first: int, local: int) -> None:
    everyone, alone = layer(7, 3, 6), layer(7, 3, local, first=first)
    for steps_done in (0, 7):
        drawn = everyone.draw_a(steps_done)
        assert torch.equal(alone.draw_a(steps_done), drawn[first : first + local])
        assert torch.equal(alone.draw_a(steps_done, all_heads=6), drawn)


@pytest.mark.parametrize("size", [1, 7, 16])
def test_the_slow_twins_matrix_is_orthogonal(size: int) -> None:
    q_II = random_orthogonal(size, (0, "layer", 0, 0))
    torch.testing.assert_close(q_II @ q_II.T, eye(size), **EXACT)


def parity_run(**method: Any) -> Run:
    return tiny.lte_run(3, {"layers": 1}, TRAIN, merge_every=4, **{"draws": "joint", **method})


def history_of(twin_class: Twin, run: Run, draw: Draw) -> tiny.History:
    twin, data = twin_class(run, build_model(run), draw), tiny.batches(run)
    losses = [twin.step(*data.batch(step, range(3)), step) for step in range(run.train.steps)]
    return tiny.History(torch.stack(losses), twin.merged_state())


@pytest.mark.parametrize(
    ("twin_class", "method"),
    [
        pytest.param(LteFrozenATwin, {"frozen_a": True, "reset": "b"}, id="frozen A, one group"),
        pytest.param(LteFrozenATwin, {"frozen_a": True, "reset": "ab", "rank": 6}, id="redrawn, groups of two"),
        pytest.param(LteTwin, {"rank": 6, "merge_transport": "reduce"}, id="trained A"),
    ],
)
def test_it_trains_like_the_twin_that_draws_whole_matrices(twin_class: Twin, method: dict[str, Any]) -> None:
    run = parity_run(**method)
    tiny.assert_parity(tiny.train(tiny.build(run)), history_of(twin_class, run, joint_draw(run)))


def test_parity_detects_heads_that_draw_by_themselves() -> None:
    run = parity_run(frozen_a=True, reset="b")
    fast = tiny.train(tiny.build(parity_run(frozen_a=True, reset="b", draws="own")))
    with pytest.raises(AssertionError):
        tiny.assert_parity(fast, history_of(LteFrozenATwin, run, joint_draw(run)))


def test_the_run_reaches_its_layers() -> None:
    engine = tiny.build(tiny.lte_run(4, frozen_a=True, reset="b", draws="joint", rank=4))
    assert isinstance(engine, Lte)
    for adapted in lora_layers(engine.model):
        rows_XI: Tensor = adapted.a.flatten(0, 1)  # 16 rows in 16 inputs, or in 64
        torch.testing.assert_close(rows_XI @ rows_XI.T, eye(16, rows_XI.shape[1] / 4), **EXACT)


def test_another_way_to_draw_is_refused_in_a_line() -> None:
    with pytest.raises(InputError, match="draws") as caught:
        tiny.lte_run(draws="alike")
    assert "\n" not in str(caught.value) and "own" in str(caught.value) and "joint" in str(caught.value)
