"""The rule for networks that users bring: one that plain PyTorch trains is trained to the same numbers, or refused.

A refusal is one InputError of one line, when the network is planned. The plain loops are written out here; networks are
those of tests.zoo, and what hypothesis composes of them.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from simulate.common.errors import InputError
from simulate.common.seeding import address
from simulate.config.method_table import METHOD_NAMES
from simulate.config.run import Run, build_run
from simulate.costs.message_schedule import sent_bytes
from simulate.layers.lora import lora_layers
from simulate.methods.build_network import build_model
from simulate.methods.stepper import learning_rate_factor
from simulate.models.repeatable import seeded
from tests import tiny
from tests.selection import others_slow
from tests.zoo import AT_THE_ROOT, REFUSED, TRAINED, Net

STEPS, CONTEXT, TOLERANCE = 4, 6, 1e-9
METHODS = [*METHOD_NAMES, "ddp, int8", "lte, convolutions averaged", "lte, convolutions averaged, frozen biases"]
ADAPTERS = ("lte", "lora", "relora", "mhlora", "adamix")
MIXED = (
    "frozen weight,unused,experts,table,weight norm without bias,in place after norms,own parameters,tied,convolution"
)
"""Parts of one network, for what is tried with every method."""
QUICK = [MIXED, "subclass", "hooked", "frozen bias", "masked", "encoder", "numpy's draws", "block", AT_THE_ROOT]


def run_of(parts: str, method: str = "ddp", devices: int = 1, **train: Any) -> Run:
    keys = {**tiny.VARIANTS[method.partition(", conv")[0]]}
    if "averaged" in method:
        keys |= {"convolutions": "average", "biases": "frozen" if "frozen" in method else "average"}
        keys["fragments"] = 2 if "block" in parts else 1  # which has several adapted layers
    if keys["name"] in ADAPTERS:
        keys["rank"] = 2
    if "merge_every" in keys:
        keys["merge_every"] = 2
    if method == "daso":
        keys = {"name": "daso", "merge_every": 2, "delay_steps": 1, "devices_per_node": 1}
    return build_run(
        {
            "model": {"name": "tests.zoo:Net", "context": CONTEXT, "parts": parts},
            "data": {"path": "made-up"},
            "method": keys,
            "train": {"steps": STEPS, "micro_batch": 3, "learning_rate": 0.01, "dtype": "fp64", "warmup_steps": 2,
                      "weight_decay": 0.1, "clip_norm": 0.5, **train},
            "cluster": {"devices": devices},
        }
    )  # fmt: skip


def plain_network(run: Run) -> nn.Module:
    """Return the network as its user would build it, at the run's seed."""
    with seeded(address(run.train.seed, "weights")):
        return Net(**run.model.keywords()).double()  # type: ignore[attr-defined]


def plain_losses(run: Run, network: nn.Module, device: int = 0) -> Tensor:
    """Return the losses of a plain loop over one device's batches, (steps,), and leave the network trained."""
    trained = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": run.train.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(run.train.adam_beta1, run.train.adam_beta2))
    losses, batches = [], tiny.batches(run)
    for parameter in used_parameters(run, network.train()):
        parameter.grad = torch.zeros_like(parameter)  # a step that does not use it counts as having this gradient
    for step in range(run.train.steps):
        inputs, targets = batches.batch(step, range(device, device + 1))
        for group in optimizer.param_groups:
            group["lr"] = run.train.learning_rate * learning_rate_factor(run.train, step)
        loss = F.cross_entropy(network(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, run.train.clip_norm)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def used_parameters(run: Run, network: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that the loss depends on in some of many passes."""
    for seed in range(30):
        tokens = torch.randint(256, (8, CONTEXT), generator=torch.Generator().manual_seed(seed))
        network(tokens).square().sum().backward()
    used = [parameter for parameter in network.parameters() if parameter.grad is not None]
    network.zero_grad(set_to_none=True)
    return used


@cache
def refusal(parts: str) -> str | None:
    """Return the line with which a network is refused; None where it is planned."""
    try:
        run_of(parts).model.shape()
    except InputError as error:
        assert "\n" not in str(error)
        return str(error)
    return None


def assert_same_weights(given: dict[str, Tensor], network: nn.Module) -> None:
    """Hold a merged model against the plain network's parameters and persistent buffers."""
    expected = network.state_dict()
    assert given.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(given[name], tensor, rtol=TOLERANCE, atol=TOLERANCE), name


def assert_trains_like_plain_pytorch(parts: str) -> None:
    run = run_of(parts)
    assert run.model.shape().all_parameters == sum(p.numel() for p in plain_network(run).parameters())
    history, network = tiny.train(tiny.build(run)), plain_network(run)
    torch.testing.assert_close(history.losses[:, 0], plain_losses(run, network), rtol=TOLERANCE, atol=0.0)
    assert_same_weights(history.weights, network)


@pytest.mark.parametrize("part", others_slow([MIXED, *TRAINED], QUICK))
def test_one_device_trains_like_a_plain_loop(part: str) -> None:
    assert refusal(part) is None
    assert_trains_like_plain_pytorch(part)


@pytest.mark.filterwarnings("ignore")  # torch's own, of what is deprecated or new
@pytest.mark.parametrize("part", others_slow(REFUSED, [part for part in REFUSED if part != "compiled"]))
def test_the_others_are_refused_in_one_line(part: str) -> None:
    assert REFUSED[part][1] in str(refusal(part))


COMPOSED = given(st.lists(st.sampled_from(sorted(TRAINED) * 2 + sorted(REFUSED)), min_size=2, max_size=4))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@COMPOSED
def test_what_is_composed_of_them_is_trained_alike_or_refused(chosen: list[str]) -> None:
    assert_trained_alike_or_refused(chosen)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=3)
@COMPOSED
def test_a_few_of_what_is_composed_of_them(chosen: list[str]) -> None:
    assert_trained_alike_or_refused(chosen)


def assert_trained_alike_or_refused(chosen: list[str]) -> None:
    parts = ",".join(chosen)
    if any(part in REFUSED for part in chosen):
        assert refusal(parts) is not None
    else:
        assert_trains_like_plain_pytorch(parts)


@pytest.mark.parametrize(
    "part", others_slow([MIXED, *TRAINED], [MIXED, "masked", "encoder", "places", "places of one row"])
)
def test_devices_by_themselves_train_like_plain_loops(part: str) -> None:
    """As many samples as tokens: what is no sample must not be divided among devices."""
    run = run_of(part, "local-sgd", devices=2, micro_batch=3)
    method, networks = tiny.build(run), [plain_network(run) for _ in range(2)]
    steps = run.method.steps_apart
    losses = [method.step(*tiny.batches(run).batch(step, range(2)), step) for step in range(steps)]
    for device, network in enumerate(networks):
        expected = plain_losses(run, network, device)[:steps]
        torch.testing.assert_close(torch.stack(losses)[:, device], expected, rtol=TOLERANCE, atol=0.0)


@pytest.mark.parametrize(
    ("part", "method"),
    others_slow(
        [(part, method) for part in [MIXED, *TRAINED] for method in METHODS],
        [(MIXED, method) for method in METHODS],
    ),
)
def test_every_method_counts_what_was_planned_exports_what_it_reports_and_resumes(part: str, method: str) -> None:
    run = run_of(part, method, devices=2)
    engine, frozen = tiny.build(run), [n for n, p in build_model(run).named_parameters() if not p.requires_grad]
    start = plain_network(run).state_dict()
    history = tiny.train(engine)
    assert history.losses.isfinite().all()
    assert engine.communicator.counter.sent_bytes == sent_bytes(run, run.shape(), STEPS)
    # Exported weights fit the plain network, and do there what the devices' network does with them.
    network = plain_network(run).eval()
    network.load_state_dict(history.weights)
    for name in frozen:
        assert torch.equal(history.weights[name], start[name]), name
        assert not any(name in key for key in engine.parameters)
    inputs, _ = tiny.batches(run).batch(0, range(2))
    if method not in ("adamix", "sapipe", "daso"):  # routed by pairs; predicted weights; averages that still travel
        with torch.no_grad():
            torch.testing.assert_close(engine.model.eval()(inputs), network(inputs), rtol=1e-7, atol=1e-9)
    assert len(lora_layers(engine.model)) == (len(run.shape().adapted) if run.method.name in ADAPTERS else 0)
    assert_resumes(run)


def assert_resumes(run: Run) -> None:
    method, restored = tiny.build(run), tiny.build(run)
    tiny.train(method, 0, STEPS // 2)
    saved = copy.deepcopy(method.state.sharded())
    tiny.spoil(restored)
    restored.state.load_sharded(saved)
    unbroken, continued = tiny.train(method, STEPS // 2), tiny.train(restored, STEPS // 2)
    assert torch.equal(unbroken.losses, continued.losses)
    assert all(torch.equal(tensor, continued.weights[name]) for name, tensor in unbroken.weights.items())


def test_what_was_traced_as_unused_and_is_used_later_stops_the_run() -> None:
    method = tiny.build(run_of("unused"))
    part = next(part for name, part in method.model.named_modules() if name == "parts.0")
    part.function = lambda x, layer: layer(x)
    with pytest.raises(InputError, match=r"parts\.0\.layers\.0\.weight got a gradient"):
        method.step(*tiny.batches(method.run).batch(0, range(1)), 0)
