"""Check that a user's network is repeatable: the same weights, samples and step give the same result, anywhere.

A run is resumed, launched on several machines and simulated on one, and all of these must train alike. So a network may
draw nothing at random and keep nothing beside its parameters, and its start weights must follow from the run's seed.
Each is found out by running the network, since its layers' types do not tell. simulate.models.tracing calls this.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from simulate.common.errors import InputError

TOLERANCE = 1e-6
"""Largest difference of two equal passes, relative to the largest output: sums may be taken in another order."""
PERTURBATION = 0.1
"""Standard deviation of the noise that makes parameters differ from those that earlier passes had."""
JUST_BELOW_ONE = 1 - 2**-24


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Start the global generators of torch, Python and numpy at a seed, and put them back afterwards."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def check_start_weights(name: str, build: Callable[[], nn.Module]) -> None:
    """Raise InputError if two builds from one seed differ: other processes, or a resumed run, would start elsewhere."""
    with seeded(0):
        network = build()
    one = network.state_dict()
    named = dict(network.named_parameters(remove_duplicate=False))
    if strange := next((key for key in one if key not in named and key not in dict(network.named_buffers())), None):
        raise InputError(
            f"model.name = {name!r}: its state_dict has {strange}, which is neither a parameter nor a buffer, so that "
            "an export would lack it; leave state_dict as torch makes it, and keep constants in buffers"
        )
    with seeded(0):
        other = build().state_dict()
    for key, tensor in one.items():
        if isinstance(tensor, Tensor) and not (key in other and _equal(tensor, other[key])):
            raise InputError(
                f"model.name = {name!r}: {key} has other start weights whenever the network is built, so that no run "
                "could be repeated; draw them from torch's, numpy.random's or random's global generator, which the run "
                "seeds"
            )


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())


def check_passes(name: str, network: nn.Module, forward: Callable[[], Tensor]) -> None:
    """Raise InputError if passes over the same samples differ in training or evaluation, or write to buffers.

    Whether anything drawn reaches the outputs is tried with the lowest and the highest draws, which leave no
    probability between 0 and 1 unnoticed.
    """
    for mode in ("training", "evaluation"):
        network.train(mode == "training")
        before = {key: buffer.clone() for key, buffer in network.named_buffers()}
        weights, states = _digests(network), _states()
        outputs = []
        for extreme in (0.0, JUST_BELOW_ONE):
            with _Draws(extreme):
                outputs.append(forward())
        outputs.append(forward())
        for key, buffer in network.named_buffers():
            if key not in before or not _equal(buffer, before[key]):
                raise InputError(
                    f"model.name = {name!r}: {mode} writes to the buffer {key}, which belongs to no device's "
                    "parameters, so that devices would disagree on it; compute it anew from the samples in each pass"
                )
        _check_written(name, network, weights)
        alike = all(_close(outputs[0], other) for other in outputs[1:])
        if not alike or states != _states():
            raise InputError(
                f"model.name = {name!r}: passes of {mode} over the same samples give different outputs: the network "
                "draws at random (dropout, drop path, noise) or counts its passes, outside of the run's seed, so that "
                "no run could be repeated or resumed; build it with these set to 0"
            )


def check_history(name: str, used: nn.Module, fresh: nn.Module, forward: Callable[[nn.Module], Tensor]) -> None:
    """Raise InputError if a network after passes computes something else than a fresh one with the same weights.

    Both get other weights than the passes had: what was kept of those shows.
    """
    with torch.no_grad():
        for key, parameter in used.named_parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=PERTURBATION)
                fresh.get_parameter(key).copy_(parameter)
    weights = _digests(used)
    for mode in (True, False):
        if not _close(forward(fresh.train(mode)), forward(used.train(mode))):
            raise InputError(
                f"model.name = {name!r}: a pass leaves something behind in the network (a mean of weights, a computed "
                "weight that is kept) which later passes use and no checkpoint has; compute it anew in each pass"
            )
    _check_written(name, used, weights)


def _digests(network: nn.Module) -> dict[str, tuple[int, float, float]]:
    """Return what changes with a parameter's values: the number of writes that torch sees, and two sums."""
    return {
        key: (parameter._version, float(values.sum()), float(values.square().sum()))
        for key, parameter in network.named_parameters()
        for values in [parameter.detach().double()]
    }


def _check_written(name: str, network: nn.Module, before: dict[str, tuple[int, float, float]]) -> None:
    after = _digests(network)
    # A NaN differs from itself; its text does not.
    if written := next((key for key in before if str(after[key]) != str(before[key])), None):
        raise InputError(
            f"model.name = {name!r}: passes write to the parameter {written} (an embedding's max_norm, a clipped "
            "weight), which devices and exports would not have alike; compute the limited weight from it in each pass"
        )


def _states() -> str:
    """Return the states of Python's and numpy's generators."""
    name, keys, *rest = np.random.get_state()
    return repr((random.getstate(), name, list(keys), rest))


def _close(one: Tensor, other: Tensor) -> bool:
    scale = float(one.abs().nan_to_num(posinf=0.0).max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=TOLERANCE * scale, equal_nan=True)


class _Draws(TorchDispatchMode):
    """Replaces what torch draws from [0, 1) by one number, and a decision by whether that number is below 1/2."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip it, torch would import its compiler first, which takes longer than all checks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        kind = func._schema.name.removeprefix("aten::").rstrip("_")
        if kind in ("rand", "rand_like", "uniform"):
            low, high = (args[1], args[2]) if kind == "uniform" and len(args) > 2 else (0.0, 1.0)
            result.fill_(low + (high - low) * self.number)
        elif kind == "bernoulli":
            # A probability of 0 or 1 decides the same for any number. In place, the first argument is what is written.
            in_place = func._schema.name.endswith("_")
            chance = args[1] if len(args) > 1 else (kwargs or {}).get("p", 0.5 if in_place else args[0])
            result.copy_(torch.full_like(result, self.number) < chance)
        return result
