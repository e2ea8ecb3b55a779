"""Seconds of a step from measured rates: numbers a person can work out, and what must not change without them."""

from __future__ import annotations

import math

import pytest

from simulate.config.hardware import Device, Kernels
from simulate.config.profiles import load_profile
from simulate.config.run import Run, build_run
from simulate.costs.flops import pass_flops
from simulate.costs.kernel_time import (
    Curve,
    Folded,
    KernelRates,
    Product,
    attention_s,
    block_products,
    forward_s,
    outer_product,
    pass_s,
    products_s,
)
from simulate.costs.step_time import device_step_s, merge_compute_s, round_time
from tests import tiny

FLAT = Kernels(
    products=[[1.0, 1e9]], attention=[[1.0, 1e9]], elementwise=[[1.0, 1e30]], optimizer=[[1.0, 1e30]],
    step_s=0.0, layer_s=0.0, adapter_s=0.0,
)  # fmt: skip


def vit_run() -> Run:
    """Return a tiny dense run on images."""
    sizes = {"layers": 2, "width": 16, "attention_heads": 2, "image": 8, "patch": 2, "colours": 3, "classes": 4}
    return build_run({"model": {"name": "vit", **sizes}, "method": {"name": "ddp"}, "train": {"micro_batch": 2}})


def device(kernels: Kernels | None) -> Device:
    """Return a shipped device of 403 GFLOP/s with other rates."""
    return load_profile("laptop_cpu").device[0].model_copy(update={"kernels": kernels})


def rates(**figures: object) -> KernelRates:
    """Return rates of a run in fp32."""
    found = KernelRates.of("fp32", device(FLAT.model_copy(update=figures)))
    assert found is not None
    return found


def test_a_curve_goes_through_its_points_and_stays_level_beyond() -> None:
    curve = Curve.of([[10, 1e9], [1000, 4e9]])
    assert [curve.rate(size) for size in (1, 10, 1000, 1e6)] == pytest.approx([1e9, 1e9, 4e9, 4e9])
    assert curve.rate(100) == pytest.approx(2e9)  # halfway between the logarithms
    grid = [curve.rate(10 ** (exponent / 10)) for exponent in range(5, 40)]
    assert grid == sorted(grid)


def test_products_take_their_operations_at_the_rate_of_their_size() -> None:
    # A cube of 30 has 54,000 operations over 2,700 elements; a thin one of rank 3 has 5,400 over 1,080.
    cube, thin = Product(30, 30, 30), Product(30, 30, 3)
    assert (cube.intensity, thin.intensity) == (20, 5)
    found = products_s((cube, thin), rates(products=[[5, 1e6], [20, 1e7]]))
    assert found == pytest.approx(54_000 / 1e7 + 5_400 / 1e6)


@pytest.mark.parametrize("run", [tiny.ddp_run(), tiny.lte_run(reset="b"), tiny.lte_run(reset="none")])
def test_products_are_all_operations_of_a_step(run: object) -> None:
    """With too few rows to fold anything, the products and attention are what simulate.costs.flops counts."""
    run = run.model_copy(update={"train": run.train.model_copy(update={"micro_batch": 1})})  # type: ignore[attr-defined]
    shape = run.model.shape()
    products = (*block_products(run, shape, run.method.name == "lte"), outer_product(shape, run.train.micro_batch))
    assert not any(isinstance(product, Folded) for product in products)
    counted = sum(product.flops for product in products) + 3 * shape.mixing_flops
    assert counted == pytest.approx(pass_flops(run, shape))


def test_heads_with_many_rows_take_their_products_in_the_weight() -> None:
    run = tiny.lte_run(reset="b", train={"micro_batch": 8})  # 64 rows, and layers 16 to 64 wide
    shape = run.model.shape()
    first = shape.adapted[0]
    folded = [product for product in block_products(run, shape, True) if isinstance(product, Folded)]
    assert Folded(first.in_features, 2, first.out_features, first.count) in folded


def test_a_frozen_a_saves_the_product_that_only_its_gradient_reads() -> None:
    """Where the trained product is folded on the way back, s·g·B (64 rows, O to R) serves the gradient of A alone."""
    train = {"micro_batch": 8}
    frozen, both = (tiny.lte_run(reset="b", frozen_a=value, train=train) for value in (True, False))
    shape = frozen.model.shape()
    lists = [[*block_products(run, shape, True)] for run in (frozen, both)]
    saved = 0.0
    for x in shape.adapted:
        saved += Product(2, 64, x.in_features, x.count).flops  # A's gradient itself
        folds = 2 * x.out_features <= 64
        saved += Product(64, x.out_features, 2, x.count).flops if folds else 0.0
    assert sum(p.flops for p in lists[1]) - sum(p.flops for p in lists[0]) == pytest.approx(saved)
    assert any(2 * x.out_features <= 64 for x in shape.adapted) and any(2 * x.out_features > 64 for x in shape.adapted)


@pytest.mark.parametrize(("micro_batch", "is_written"), [(1, False), (8, True)])
def test_columns_need_no_product_with_a(micro_batch: int, is_written: bool) -> None:
    """Rank 8 of 16 inputs, two heads: 20·16 <= 64·8 rows x rank are written into W's copies, 8·8 are not."""
    columns, joint = (
        tiny.lte_run(2, train={"micro_batch": micro_batch}, rank=8, reset="b", frozen_a=True, draws=draws)
        for draws in ("columns", "joint")
    )
    shape, rows = columns.model.shape(), 8 * micro_batch
    products, dense = (block_products(run, shape, True) for run in (columns, joint))
    (up,) = (x for x in shape.adapted if x.name.endswith("mlp.up"))
    assert (Folded(up.in_features, 0, up.out_features, up.count) in products) == is_written
    # Forward and back, W's own product, and row by row those with B; then the gradient of B.
    of_b = Product(rows, 8, up.out_features, up.count)
    assert (of_b in products) == (not is_written)
    assert sum(p.flops for p in products) < sum(p.flops for p in dense)
    if not is_written:  # nothing is folded, so that the closed form counts the same operations
        counted = sum(p.flops for p in (*products, outer_product(shape, micro_batch))) + 3 * shape.mixing_flops
        assert counted == pytest.approx(pass_flops(columns, shape))
        sides = sum(x.in_features * x.count for x in shape.adapted if x.in_features == 16)
        assert pass_flops(joint, shape) - pass_flops(columns, shape) == 2 * 2 * rows * 8 * sides


def test_a_step_adds_up_by_hand() -> None:
    run = tiny.ddp_run(train={"dtype": "fp32"})
    shape = run.model.shape()
    starting = rates(step_s=1.0, layer_s=0.25)
    assert pass_s(run, shape, starting) == pytest.approx(1.0 + 8 * 0.25 + pass_flops(run, shape) / 1e9)
    moving = rates(elementwise=[[1.0, 1e3]])
    # 2 samples of 8 tokens; in u = 16: 16 u go in and out of a block's layers; 256 logits a token; each moved 4 times.
    moved = 4 * 4 * 2 * 8 * (2 * 16 * 16 + 256)
    assert pass_s(run, shape, moving) == pytest.approx(moved / 1e3 + pass_flops(run, shape) / 1e9)


def test_families_have_elementwise_work_of_their_own() -> None:
    text, images = tiny.ddp_run(train={"dtype": "fp32"}), vit_run()
    plain, other = (
        rates(elementwise=[[1.0, 1e3]]),
        rates(elementwise=[[1.0, 1e3]], elementwise_of={"vit": [[1.0, 1e6]]}),
    )
    assert pass_s(text, text.model.shape(), other) == pass_s(text, text.model.shape(), plain)
    shape = images.model.shape()
    moved_s = pass_s(images, shape, plain) - pass_s(images, shape, rates())
    assert pass_s(images, shape, other) - pass_s(images, shape, rates()) == pytest.approx(moved_s / 1e3)


def test_attention_that_sees_everything_has_a_rate_of_its_own() -> None:
    text, images = tiny.ddp_run(train={"dtype": "fp32"}), vit_run()
    full = rates(full_attention=[[1.0, 2e9]])
    assert attention_s(text, text.model.shape(), full) == attention_s(text, text.model.shape(), rates())
    shape = images.model.shape()
    assert attention_s(images, shape, full) == attention_s(images, shape, rates()) / 2
    assert attention_s(images, shape, full) == pytest.approx(3 * 2 * shape.mixing_flops / 2e9)


def test_a_forward_pass_takes_a_third_of_products_and_starts_and_half_of_the_moves() -> None:
    run = tiny.ddp_run(train={"dtype": "fp32"})
    shape = run.model.shape()
    for figures, share in (({}, 3), ({"step_s": 1.0, "layer_s": 0.25}, 3), ({"elementwise": [[1.0, 1e3]]}, 2)):
        whole_s = pass_s(run, shape, rates(**figures)) - (pass_s(run, shape, rates()) if figures else 0.0)
        part_s = forward_s(shape, 2, 4, rates(**figures)) - (forward_s(shape, 2, 4, rates()) if figures else 0.0)
        assert part_s == pytest.approx(whole_s / share)


def test_adapters_cost_their_own_starting() -> None:
    run = tiny.lte_run(train={"dtype": "fp32"})
    shape = run.model.shape()
    extra = pass_s(run, shape, rates(adapter_s=0.5)) - pass_s(run, shape, rates())
    assert extra == pytest.approx(8 * 0.5)


def test_the_optimizer_goes_by_its_own_rate() -> None:
    run = tiny.ddp_run(train={"dtype": "fp32"})
    shape = run.model.shape()
    slow, fast = (FLAT.model_copy(update={"optimizer": [[1.0, rate]]}) for rate in (1e3, 1e30))
    seconds = [device_step_s(run, shape, [device(kernels)])[0] for kernels in (slow, fast)]
    assert seconds[0] - seconds[1] == pytest.approx((7 + 3) * 4 * shape.parameters / 1e3)


def test_merges_go_by_the_size_of_their_products() -> None:
    run = tiny.lte_run(train={"dtype": "fp32"})
    shape = run.model.shape()
    from simulate.costs.step_time import _rates

    slow, fast = (
        merge_compute_s(run, shape, _rates(run, device(FLAT.model_copy(update={"products": [[1.0, rate]]}))))
        for rate in (1e6, 2e6)
    )
    assert 1.9 < slow / fast <= 2.0


def test_without_points_a_step_is_operations_over_the_peaks_share() -> None:
    run = tiny.ddp_run(train={"dtype": "fp32"})
    shape, plain = run.model.shape(), device(None)
    moved = 7 * 4 * shape.parameters
    expected = pass_flops(run, shape) / (403.2e9 * 0.4) + moved / 51.2e9
    assert device_step_s(run, shape, [plain])[0] == pytest.approx(expected, rel=1e-12)
    assert round_time(run, shape, [plain] * 2, load_profile("laptop_cpu").link).compute_s == pytest.approx(expected)
    assert not math.isclose(device_step_s(run, shape, [device(FLAT)])[0], expected)


def test_packed_weights_go_by_their_own_rates() -> None:
    """A layer is unpacked forward and backward, once more to recompute, and packed at merges, at its size's rate."""
    rates = {"pack": {"int8": [[1.0, 50.0]]}, "unpack": {"int8": [[200.0, 100.0], [300.0, 1000.0]]}}
    measured, without = device(FLAT.model_copy(update=rates)), device(FLAT)
    fast = device(FLAT.model_copy(update={"unpack": {"int8": [[1.0, 1e30]]}, "pack": {"int8": [[1.0, 1e30]]}}))
    for recompute, times in ((False, 2), (True, 3)):
        train = {"dtype": "fp32", "activation_checkpointing": recompute}
        run = tiny.lte_run(train=train, quantize="int8", reset="b")
        shape, link = run.model.shape(), load_profile("laptop_cpu").link
        # Two blocks of four layers: 48 x 16, 16 x 16, 64 x 16 and 16 x 64; the second is between both points.
        assert [x.weights for x in shape.adapted] == [768, 256, 1024, 1024]
        between = 100.0 * 10 ** (math.log(256 / 200) / math.log(300 / 200))
        expected = times * 2 * (768 / 1000 + 256 / between + 2 * 1024 / 1000)
        measured_s, fast_s = (device_step_s(run, shape, [d])[0] for d in (measured, fast))
        assert measured_s - fast_s == pytest.approx(expected)
        merges = [round_time(run, shape, [d] * 2, link).merge_s for d in (measured, fast, without)]
        assert merges[0] - merges[1] == pytest.approx(shape.adapted_parameters / 50.0)
        assert merges[2] == merges[1]
    served = tiny.lte_run(train={"dtype": "fp32"}, quantize="int8", reset="b", merge_transport="server")
    assert round_time(served, served.model.shape(), [measured] * 2, link).merge_s < 1.0
    plain = tiny.lte_run(train={"dtype": "fp32"}, quantize="bf16", reset="b")  # of a format without points
    assert device_step_s(plain, plain.model.shape(), [measured]) == device_step_s(plain, plain.model.shape(), [without])
