"""Tests of Adam with moments in 8 bits: bitsandbytes' own steps, and no block shared by two devices."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simulate.common.errors import InputError
from simulate.config.run import build_run
from simulate.costs.memory import peak_memory
from simulate.measure.one_device import measure_memory_bytes
from simulate.optim import adamw8bit as eight_bit
from simulate.optim.adamw8bit import CODES, MOMENTS, SCALES, AdamW8bit, check_installed, moment_of
from simulate.optim.moments import prune_moments
from simulate.rules.optimizer import BLOCK_ELEMENTS, CPU_CHUNK_ELEMENTS
from tests import tiny
from tests.selection import others_slow
from tests.simulate.costs.test_memory import ONE_MEMORY, TOLERANCE, WIDE, planned_bytes

pytestmark = [
    pytest.mark.numeric,
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
]

EIGHT = {"dtype": "fp32", "optimizer_state": "8bit", "steps": 14}
LARGE = {"width": 96, "attention_heads": 4}
"""Widths that give matrices of more than 4,096 elements, some of them no multiple of a block."""


def stepped(start: Tensor, gradients: list[Tensor], decay: float = 0.1) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a parameter after steps of AdamW8bit, and its state."""
    parameter = nn.Parameter(start.clone())
    optimizer = AdamW8bit([{"params": [parameter], "lr": 0.01, "weight_decay": decay}], betas=(0.9, 0.99))
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach(), dict(optimizer.state[parameter])


def draws(*shape: int, count: int = 4) -> list[Tensor]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randn(*shape, generator=draw) * 10.0**-index for index in range(count)]


@pytest.mark.parametrize("elements", [4096, 5000, CPU_CHUNK_ELEMENTS + 300])
def test_one_copy_steps_as_bitsandbytes_own_optimizer_does(elements: int) -> None:
    start, *gradients = draws(1, elements)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from bitsandbytes.optim import AdamW8bit as Published
    theirs = nn.Parameter(start.clone())
    published = Published([theirs], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for gradient in gradients:
        theirs.grad = gradient.clone()
        published.step()
    ours, state = stepped(start, gradients)
    assert torch.equal(ours, theirs.detach())
    assert torch.equal(state["exp_avg" + CODES], published.state[theirs]["state1"])


@pytest.mark.parametrize("elements", [4096, 5000])
def test_rows_step_as_if_each_were_alone(elements: int) -> None:
    start, *gradients = draws(3, elements)
    together, state = stepped(start, gradients)
    for row in range(3):
        alone, own = stepped(start[row : row + 1], [g[row : row + 1] for g in gradients])
        assert torch.equal(together[row : row + 1], alone)
        assert all(torch.equal(state[key][row : row + 1], own[key]) for key in state if key != "step")


def test_steps_agree_with_a_slow_twin() -> None:
    """Slow twin with full moments, rounded to the nearest value of their block after each step."""
    elements = 2 * BLOCK_ELEMENTS + 100
    start, *gradients = draws(2, elements)
    ours, state = stepped(start, gradients, decay=0.0)
    weights, moments = start.clone(), [torch.zeros_like(start), torch.zeros_like(start)]
    for t, g in enumerate(gradients, 1):
        moments = [0.9 * moments[0] + 0.1 * g, 0.99 * moments[1] + 0.01 * g * g]
        step = moments[0] / (1 - 0.9**t) / ((moments[1] / (1 - 0.99**t)).sqrt() + 1e-8)
        weights -= 0.01 * step
        moments = [rounded(moment, key) for moment, key in zip(moments, MOMENTS, strict=True)]
    # Where a moment lies between two values, a last bit decides; few do.
    assert (ours - weights).norm() < 0.01 * (weights - start).norm()
    for moment, key in zip(moments, MOMENTS, strict=True):
        assert (moment_of(state, key) - moment).norm() < 0.01 * moment.norm()


def rounded(moment_CX: Tensor, key: str) -> Tensor:
    """Return each number as the nearest of 256 in its block of a row."""
    values, result = eight_bit._values(key, moment_CX.device), moment_CX.clone()
    for row in result:
        for block in row.split(BLOCK_ELEMENTS):
            scale = block.abs().max()
            block.copy_(values[(block.unsqueeze(1) / scale - values).abs().argmin(1)] * scale)
    return result


def test_pruning_zeroes_the_smallest_of_each_row() -> None:
    start, gradient = torch.zeros(2, 4096), torch.arange(1.0, 8193.0).view(2, 4096)
    values, state = stepped(start, [gradient])
    parameter = nn.Parameter(values)
    before = {moment: moment_of(state, moment) for moment in MOMENTS}
    prune_moments({parameter: state}, [parameter], 0.9)
    for moment in MOMENTS:
        after = moment_of(state, moment)
        assert not after[:, :3600].any()
        kept = after != 0
        assert torch.equal(after[kept], before[moment][kept])
        assert 0.05 < kept.float().mean() <= 0.1  # neighbours share values, and go together
    assert not moment_of(state, "exp_avg")[moment_of(state, "exp_avg_sq") == 0].any()


@pytest.mark.parametrize("name", others_slow(["local-sgd", "lte", "ddp"], ["lte"]))
def test_a_run_learns_like_one_with_full_moments(name: str) -> None:
    histories = []
    for state in ("fp32", "8bit"):
        run = tiny.variant_run(name, 2, LARGE, {**EIGHT, "optimizer_state": state, "learning_rate": 0.003, "steps": 25})
        histories.append(tiny.train(tiny.build(run)).losses)
    full, eight = histories
    assert full[0].mean() / full[-1].mean() > 1.3
    assert not torch.equal(full, eight)
    assert ((eight - full).abs() / full).mean() < 0.02


@pytest.mark.parametrize("name", ["local-sgd", "lte, pruned"])
def test_a_device_goes_the_same_way_alone_and_beside_others(name: str) -> None:
    run = wide(tiny.variant_run(name, 3, LARGE, EIGHT))
    together, data, steps = tiny.build(run), tiny.batches(run), 3
    for step in range(steps):
        together.step(*data.batch(step, range(3)), step)
    assert any(CODES in key for key in together.stepper.tensors())
    for device in range(3):
        alone = tiny.build(run, range(device, device + 1))
        for step in range(steps):
            alone.step(*data.batch(step, range(device, device + 1)), step)
        for key, tensor in together.stepper.tensors().items():
            own = tensor.view(3, -1)[device].view(alone.stepper.tensors()[key].shape)
            other = alone.stepper.tensors()[key]
            if CODES in key:  # a gradient that is rounded otherwise may cross to the neighbouring code
                assert (own != other).float().mean() < 0.01, key
            else:
                assert (own - other).norm() <= 1e-3 * other.norm(), key


def wide(run: Any) -> Any:
    """Return a run whose factors are large enough for 8 bits."""
    if not hasattr(run.method, "rank"):
        return run
    return run.model_copy(update={"method": run.method.model_copy(update={"rank": 48})})


@pytest.mark.parametrize(
    "name",
    others_slow(
        ["ddp", "local-sgd, reset", "lte, pruned", "lte, forgetful", "relora", "daso"], ["lte, pruned", "daso"]
    ),
)
def test_a_run_with_8_bits_resumes_bit_for_bit(name: str) -> None:
    tiny.assert_resumes(name, 5, train_keys=EIGHT, model=LARGE)


@pytest.mark.parametrize(
    ("name", "context", "micro_batch"),
    others_slow(
        [
            ("ddp", 64, 4), ("ddp", 8, 2), ("lte", 64, 4), ("lte", 8, 2), ("lora", 8, 2), ("daso", 8, 2),
            ("sapipe, none", 8, 2), ("lte, pruned", 8, 2),
        ],
        [("ddp", 64, 4), ("lte, pruned", 8, 2)],
    ),
)  # fmt: skip
def test_memory_with_8_bits_is_planned(name: str, context: int, micro_batch: int) -> None:
    """With long samples activations set the peak, with short ones messages or the step."""
    train = {**EIGHT, "micro_batch": micro_batch}
    run = wide(tiny.variant_run(name, 4, {**WIDE, "context": context}, train))
    assert planned_bytes(run) == pytest.approx(measure_memory_bytes(run, torch.device("cpu")), rel=TOLERANCE)
    full = run.model_copy(update={"train": run.train.model_copy(update={"optimizer_state": "fp32"})})
    assert peak_memory(run, run.model.shape(), ONE_MEMORY).optimizer < (
        0.7 * peak_memory(full, full.model.shape(), ONE_MEMORY).optimizer
    )


def test_moments_take_two_bytes_and_a_scale_for_256() -> None:
    run = tiny.variant_run("ddp", 1, WIDE, EIGHT)
    method, shape = tiny.build(run), run.model.shape()
    tiny.train(method, 0, 1)
    held = sum(t.numel() * t.element_size() for k, t in method.stepper.tensors().items() if k.startswith("optimizer"))
    assert peak_memory(run, shape, ONE_MEMORY).optimizer == held
    codes = [t for k, t in method.stepper.tensors().items() if CODES in k]
    scales = [t for k, t in method.stepper.tensors().items() if SCALES in k]
    assert sum(t.numel() for t in codes) <= 256 * sum(t.numel() for t in scales)


def test_what_needs_full_moments_is_refused() -> None:
    train = {"optimizer_state": "8bit"}
    with pytest.raises(InputError, match=r"sapipe.*compensation=none"):
        build_run({"method": {"name": "sapipe"}, "train": train})
    with pytest.raises(InputError, match=r"average.*merge_optimizer=keep"):
        build_run({"method": {"name": "local-sgd", "merge_optimizer": "average"}, "train": train})
    with pytest.raises(InputError, match="fp64"):
        build_run({"train": {**train, "dtype": "fp64"}})


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eight_bit, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'lte\[quantize\]'"):
        check_installed()
