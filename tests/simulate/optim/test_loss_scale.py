"""Tests of autocast: products in the lower dtype, gradients in the weights' own, and a loss scale for each device."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from simulate.comm.virtual import VirtualCommunicator
from simulate.common.errors import InputError
from simulate.config.run import Run, build_run
from simulate.layers.cross_entropy import soft_losses, token_losses
from simulate.layers.per_device import ReplicatedLayerNorm, replicate
from simulate.methods.base import Method
from simulate.methods.build_network import build_model
from simulate.methods.registry import build_method
from simulate.models.fake_batch import example_batch
from simulate.models.peak_memory import cpu_peak_bytes
from simulate.optim import loss_scale as precision
from simulate.optim.loss_scale import AUTOCAST_DTYPES, LossScale, check_autocast
from tests import tiny
from tests.gpus import DeviceModule, Properties, stand_in
from tests.reference.local_sgd import LocalSgdTwin
from tests.reference.lte import LteTwin
from tests.selection import others_slow, selected
from tests.simulate.methods.adapter_parity import engine_draw

pytestmark = pytest.mark.numeric

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addmm_", "baddbmm_", "addmv", "mv"}
LOW = {"dtype": "fp32", "autocast": "bf16", "steps": 14}
HALF = {"dtype": "fp32", "autocast": "fp16", "steps": 14}


class Products(TorchDispatchMode):
    """Recorder of the dtypes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.formats: dict[str, set[torch.dtype]] = defaultdict(set)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            self.formats[name] |= {arg.dtype for arg in args if isinstance(arg, Tensor)}
        return func(*args, **(kwargs or {}))


def passes(method: Method) -> Products:
    """Run one forward and backward pass, as a step does."""
    with Products() as products:
        method.loss.backpropagate(*tiny.batches(method.run).batch(0, range(4)), method.gradient_rows)
    return products


FP16_TOO = ("lte", "ddp", "daso", "sapipe", "topk", "adamix")


@pytest.mark.parametrize(
    ("name", "autocast"),
    others_slow(
        [*((name, "bf16") for name in tiny.VARIANTS), *((name, "fp16") for name in FP16_TOO)],
        [*((name, "bf16") for name in selected("autocast")), ("lte", "fp16"), ("daso", "fp16")],
    ),
)
def test_every_product_is_made_in_the_lower_format_and_every_gradient_in_the_weights(name: str, autocast: str) -> None:
    method = tiny.build(tiny.variant_run(name, train={**LOW, "autocast": autocast}))
    formats = passes(method).formats
    assert set.union(*formats.values()) == {AUTOCAST_DTYPES[autocast]}
    gradients = [p.grad for p in method.model.parameters() if p.grad is not None]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert {p.dtype for p in method.model.parameters()} == {torch.float32}


def test_without_autocast_products_have_the_format_of_the_weights() -> None:
    formats = passes(tiny.build(tiny.variant_run("lte", train={"dtype": "fp32"}))).formats
    assert set.union(*formats.values()) == {torch.float32}


@pytest.mark.parametrize("model", [{}, tiny.LLAMA], ids=["gpt", "llama"])
@pytest.mark.parametrize("name", ["lte", "lte, frozen a", "lora", "ddp", "local-sgd"])
def test_gradients_are_those_of_exact_products_to_rounding(name: str, model: dict[str, Any]) -> None:
    """bf16 has eight bits: errors are 1 % of a gradient's norm, and a missing factor would change most of it."""
    gradients = []
    for autocast in ("none", "bf16", "fp16"):
        method = tiny.build(tiny.variant_run(name, 4, model, {**LOW, "autocast": autocast}))
        shake(method)
        if method.loss_scale is not None:  # no overflow is wanted here
            method.loss_scale.scale_C.fill_(256.0)
        passes(method)
        gradients.append({n: p.grad for n, p in method.model.named_parameters() if p.grad is not None})
    exact, *rounded = gradients
    for (key, gradient), low in itertools.product(exact.items(), rounded):
        assert (low[key] - gradient).norm() < 0.03 * gradient.norm(), key


@torch.no_grad()
def shake(method: Method) -> None:
    """Set all factors away from zero, so that every gradient depends on every factor."""
    draw = torch.Generator().manual_seed(3)
    for parameter in method.model.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))


def under_autocast(twin: Any, run: Run) -> Any:
    """Run all plain models of a twin under torch's own autocast."""
    for device in twin.devices:
        plain = device.model.forward

        def forward(inputs: Tensor, plain: Callable[[Tensor], Tensor] = plain) -> Tensor:
            with torch.autocast("cpu", dtype=AUTOCAST_DTYPES[run.train.autocast]):
                return plain(inputs).float()

        device.model.forward = forward
    return twin


@pytest.mark.parametrize("name", ["local-sgd", "lte, forgetful"])
def test_whole_runs_agree_with_plain_networks_under_autocast(name: str) -> None:
    run = tiny.variant_run(name, 2, train={**LOW, "learning_rate": 0.01})
    fast, plain = tiny.train(tiny.build(run)), build_model(run)
    if name == "local-sgd":
        twin = under_autocast(LocalSgdTwin(run, plain), run)
    else:
        draw = engine_draw(run)
        twin = under_autocast(LteTwin(run, plain, lambda *head: draw(*head).float()), run)
    data = tiny.batches(run)
    losses = torch.stack([twin.step(*data.batch(step, range(2)), step) for step in range(run.train.steps)])
    assert fast.losses[0].mean() / fast.losses[-1].mean() > 1.05  # it has learned
    assert ((fast.losses - losses).abs() / losses).max() < 0.01


NETWORKS: dict[str, dict[str, Any]] = {
    "torch's own attention": {"name": "tests.networks:Encoder", "context": 16},
    "convolutions": {"name": "tests.networks:Convolutional", "image": 8, "classes": 10},
}


@pytest.mark.parametrize("autocast", AUTOCAST_DTYPES)
@pytest.mark.parametrize("method", others_slow(["lte", "ddp", "local-sgd"], ["lte"]))
@pytest.mark.parametrize("network", NETWORKS)
def test_networks_without_a_name_train_under_autocast(network: str, method: str, autocast: str) -> None:
    """The networks have masks, layers that run copy by copy, and convolutions as products over patches."""
    options = {"name": method, "rank": 2} if method == "lte" else {"name": method}
    train = {"steps": 4, "micro_batch": 2, "clip_norm": 100.0}
    results = []
    for format_ in ("none", autocast):
        table = {"model": NETWORKS[network], "method": options, "train": {**train, "autocast": format_}}
        run = build_run({**table, "data": {"path": "made-up"}, "cluster": {"devices": 2}})
        trained = build_method(run, VirtualCommunicator(2), tiny.CPU)
        if trained.loss_scale is not None:
            trained.loss_scale.scale_C.fill_(256.0)
        torch.manual_seed(0)
        losses = trained.loss.backpropagate(*example_batch(run.model, 4), trained.gradient_rows)
        results.append((losses, [p.grad for p in trained.model.parameters() if p.grad is not None]))
    (exact, gradients), (low, rounded) = results
    assert torch.allclose(low, exact, rtol=0.02) and not torch.equal(low, exact)
    assert {gradient.dtype for gradient in rounded} == {torch.float32}
    norms = [torch.stack([g.norm() for g in given]) for given in (gradients, rounded)]
    assert torch.allclose(norms[0], norms[1], rtol=0.05, atol=0.01 * float(norms[0].max()))


def test_norms_are_made_in_the_weights_format() -> None:
    norm = nn.LayerNorm(8)
    layer = ReplicatedLayerNorm(norm, replicate(norm.weight, 2), replicate(norm.bias, 2))
    x = torch.randn(4, 8)
    assert layer(x.bfloat16()).dtype == torch.float32
    assert torch.equal(layer(x.bfloat16()), layer(x.bfloat16().float()))


@pytest.mark.parametrize("dtype", AUTOCAST_DTYPES.values())
def test_losses_of_half_logits_are_worked_out_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, targets = (torch.randn(50, 30) * 4).to(dtype), torch.randint(30, (50,))
    shares = torch.softmax(torch.randn(50, 30), 1)
    for ours, target in ((token_losses, targets), (soft_losses, shares)):
        exact = logits.float().requires_grad_()
        expected = nn.functional.cross_entropy(exact, target, reduction="none")
        (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
        low = logits.clone().requires_grad_()
        losses = ours(low.mul(1), target)
        (gradient,) = torch.autograd.grad(losses.sum(), low)
        assert losses.dtype == torch.float32 and gradient.dtype == dtype
        assert torch.allclose(losses, expected, atol=1e-5)
        last_bit = float(torch.finfo(dtype).eps)  # a sum in another order may round to the neighbour
        assert torch.allclose(gradient, expected_gradient.to(dtype), rtol=last_bit, atol=1e-7)


def test_the_scale_follows_torchs_rule_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GradScaler for each row is the twin."""
    monkeypatch.setattr(precision, "GROWTH_STEPS", 3)
    draw = torch.Generator().manual_seed(0)
    bad_TC = torch.rand(60, 4, generator=draw) < torch.tensor([0.0, 0.1, 0.4, 1.0])
    ours = LossScale(4, tiny.CPU)
    twins = [torch.amp.GradScaler("cpu", init_scale=precision.START_SCALE, growth_interval=3) for _ in range(4)]
    weights = [nn.Parameter(torch.ones(3)) for _ in twins]
    for bad_C in bad_TC:
        gradient = torch.ones(4, 3)
        gradient[bad_C] = torch.inf
        ours.update(ours.finite_rows([gradient]))
        for twin, weight, own in zip(twins, weights, gradient, strict=True):
            twin.scale(torch.zeros(1))  # its state is made late
            weight.grad = own.clone()
            twin.step(torch.optim.SGD([weight], lr=0.0))
            twin.update()
        assert ours.scale_C.tolist() == [twin.get_scale() for twin in twins]


def test_gradients_are_unscaled_by_their_rows_own_scale() -> None:
    scale = LossScale(2, tiny.CPU)
    scale.scale_C.copy_(torch.tensor([4.0, 16.0]))
    assert scale.scaled(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [4.0, 8.0, 48.0, 64.0]
    gradient = torch.full((4, 2, 2), 16.0)  # two heads a device
    scale.unscale([gradient])
    assert gradient[:, 0, 0].tolist() == [4.0, 4.0, 1.0, 1.0]


def spoiled(method: Method, row: int, at_step: int) -> tiny.History:
    """Train three steps, with an infinite gradient of one row in one of them."""
    parameter, steps = next(method.model.parameters()), itertools.count()

    def spoil(gradient: Tensor) -> Tensor:
        if next(steps) != at_step:
            return gradient
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        gradient.view(method.gradient_rows, -1)[row] = torch.inf
        return gradient

    parameter.register_hook(spoil)
    return tiny.train(method, 0, 3)


@pytest.mark.parametrize("name", ["local-sgd", "local-sgd, apollo", "lte", "lte, muon", "daso"])
def test_a_device_without_finite_gradients_leaves_out_its_own_step_only(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "START_SCALE", 2.0**8)  # no other overflow is wanted here
    run = tiny.variant_run(name, train=HALF)
    plain, other = tiny.build(run), tiny.build(run)
    tiny.train(plain, 0, 3)
    row, rows = 1, plain.gradient_rows
    spoiled(other, row, at_step=1)
    for key, tensor in plain.stepper.tensors().items():
        mine, theirs = (t.view(rows, -1) for t in (tensor, other.stepper.tensors()[key]))
        others = [r for r in range(rows) if r != row]
        assert torch.equal(mine[others], theirs[others]), key
    changed = [k for k, t in plain.stepper.tensors().items() if not torch.equal(t, other.stepper.tensors()[k])]
    assert changed
    assert other.loss_scale is not None and plain.loss_scale is not None
    assert other.loss_scale.scale_C[row] == plain.loss_scale.scale_C[row] / 2
    assert all(torch.isfinite(t).all() for t in other.stepper.tensors().values())


NEEDS_LIBRARY = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.mark.parametrize("eight_bit", ["fp32", pytest.param("8bit", marks=NEEDS_LIBRARY)])
def test_a_step_that_is_left_out_changes_nothing_of_its_device(eight_bit: str) -> None:
    """This holds in the first step too, when moments begin."""
    large = {"width": 64, "attention_heads": 2}
    for at_step in (0, 1):
        method = tiny.build(tiny.variant_run("local-sgd", 4, large, {**HALF, "optimizer_state": eight_bit}))
        if at_step:
            tiny.train(method, 0, 1)
        before = {key: tensor.clone() for key, tensor in method.stepper.tensors().items()}
        method.loss.backpropagate(*tiny.batches(method.run).batch(at_step, range(4)), 4)
        next(p.grad for p in method.model.parameters() if p.grad is not None)[2] = torch.nan
        method.stepper.step(method.rate_factor(at_step))
        for key, tensor in method.stepper.tensors().items():
            left_out = tensor.view(4, -1)[2]
            if key in before:
                assert torch.equal(left_out, before[key].view(4, -1)[2]), key
            elif "codes" not in key:  # of codes without a scale
                assert not left_out.any(), key


def test_a_step_that_all_leave_out_needs_no_copies() -> None:
    """The plan of a device alone counts no memory for copies of its parameters."""
    method = tiny.build(tiny.variant_run("lora", 1, {"width": 64, "attention_heads": 2}, HALF))
    tiny.train(method, 0, 1)
    before = {key: tensor.clone() for key, tensor in method.stepper.tensors().items()}
    counts = [state["step"].clone() for state in method.stepper.state.values()]
    method.loss.backpropagate(*tiny.batches(method.run).batch(1, range(1)), 1)
    next(p.grad for p in method.model.parameters() if p.grad is not None).fill_(torch.nan)
    assert (
        cpu_peak_bytes(lambda: method.stepper.step(method.rate_factor(1)))
        < sum(t.nbytes for t in before.values()) // 20
    )
    assert all(torch.equal(tensor, before[key]) for key, tensor in method.stepper.tensors().items())
    assert [state["step"] for state in method.stepper.state.values()] == [count + 1 for count in counts]


@pytest.mark.parametrize("name", ["ddp", "lora", "sapipe, none"])
def test_devices_that_share_a_gradient_leave_the_step_out_together(name: str) -> None:
    method = tiny.build(tiny.variant_run(name, train=HALF))
    assert method.loss_scale is not None and len(method.loss_scale.scale_C) == 1
    spoiled(method, 0, at_step=1)
    assert method.loss_scale.scale_C.item() <= precision.START_SCALE / 2
    assert all(torch.isfinite(t).all() for t in method.state.state_dict().values() if t.is_floating_point())


@pytest.mark.parametrize("name", ["topk", "signsgd", "powersgd", "ddp, int8", "sapipe"])
def test_gradients_of_devices_apart_count_as_zero_where_they_are_not_finite(name: str) -> None:
    """Other devices are not affected, and the compression errors stay finite."""
    method, plain = (tiny.build(tiny.variant_run(name, train=HALF)) for _ in range(2))
    spoiled(method, 1, at_step=1)
    tiny.train(plain, 0, 3)
    assert method.loss_scale is not None and plain.loss_scale is not None
    assert (plain.loss_scale.scale_C / method.loss_scale.scale_C).tolist() == [1.0, 2.0, 1.0, 1.0]
    assert all(torch.isfinite(t).all() for t in method.state.state_dict().values() if t.is_floating_point())


@pytest.mark.parametrize("name", ["local-sgd", "lte", "lte, frozen a"])
def test_a_device_goes_the_same_way_alone_and_beside_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All start from a scale that is too high, so that each has to lower its own."""
    monkeypatch.setattr(precision, "START_SCALE", 2.0**26)
    monkeypatch.setattr(precision, "GROWTH_STEPS", 2)
    run, devices, steps = tiny.variant_run(name, 3, train={**HALF, "steps": 40}), 3, 3
    together = tiny.build(run)
    data, losses, scales = tiny.batches(run), [], []
    for step in range(steps):
        losses.append(together.step(*data.batch(step, range(devices)), step))
        assert together.loss_scale is not None
        scales.append(together.loss_scale.scale_C.clone())
    assert torch.stack(scales).min() < 2.0**26
    for device in range(devices):
        alone = tiny.build(run, range(device, device + 1))
        for step in range(steps):
            loss = alone.step(*data.batch(step, range(device, device + 1)), step)
            assert loss.item() == pytest.approx(losses[step][device].item(), rel=1e-3)
            assert alone.loss_scale is not None and alone.loss_scale.scale_C.item() == scales[step][device].item()


@pytest.mark.parametrize("name", others_slow(["lte", "ddp", "topk", "daso", "relora, warm start"], ["lte", "daso"]))
def test_a_run_with_a_loss_scale_resumes_bit_for_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "START_SCALE", 2.0**20)
    monkeypatch.setattr(precision, "GROWTH_STEPS", 3)
    tiny.assert_resumes(name, 5, train_keys=HALF)


def test_fp64_and_autocast_exclude_each_other() -> None:
    with pytest.raises(InputError, match=r"train\.autocast = 'bf16'.*train\.dtype=fp32"):
        build_run({"train": {"autocast": "bf16", "dtype": "fp64"}})


def test_a_gpu_without_bf16_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = stand_in(monkeypatch, DeviceModule(Properties("Tesla T4", 7, 5)))
    train = build_run({"train": {"autocast": "bf16"}}).train
    with pytest.raises(InputError, match=r"Tesla T4 has no bf16 arithmetic; try --set train\.autocast=fp16"):
        check_autocast(train, torch.device("cuda"))
    check_autocast(train, tiny.CPU)
    gpu.bf16 = True
    check_autocast(train, torch.device("cuda"))
