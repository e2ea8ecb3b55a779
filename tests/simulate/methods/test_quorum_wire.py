"""Rounded merges without some devices: against slow twins, and nothing that was learned is lost or counts twice."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simulate.comm.mean_of_some import MeanOfSome
from simulate.comm.virtual import VirtualCommunicator
from simulate.config.run import Run
from simulate.layers.lora import lora_layers
from simulate.methods.lte.merge import LayerMerger
from simulate.methods.quorum import Quorum
from tests import tiny
from tests.reference.quorum_wire import RoundedDilocoTwin, RoundedLocalSgdTwin, RoundedLteTwin, RoundedMeanOfSome
from tests.selection import others_slow
from tests.simulate.methods import adapter_parity, parity
from tests.simulate.methods.test_quorum import plain, with_merges

# Late by one merge and by two, lost and back, alone; the last merge has all.
ROWS = ((5, 5, 2), (5, 0, 1), (0, 4, 0), (5, 5, 0), (5, -1, 3), (4, -1, 5), (5, 5, 4))


def dense(name: str, **method: Any) -> Run:
    run = parity.parity_run(name, merge_every=5, **method)
    train = run.train.model_copy(update={"steps": 34})
    return with_merges(run.model_copy(update={"train": train}), ROWS)


def lte(**method: Any) -> Run:
    method = {"merge_every": 5, "reset": "b", "frozen_a": True, "norms": "average", "heads_per_device": 2, **method}
    run = adapter_parity.parity_run("lte, paced", devices=3, train={"steps": 34}, **plain(method))
    return with_merges(run, ROWS)


DENSE: dict[str, tuple[Any, Run]] = {
    "local-sgd int8": (RoundedLocalSgdTwin, dense("local-sgd", wire="int8")),
    "local-sgd int4": (RoundedLocalSgdTwin, dense("local-sgd", wire="int4")),
    "diloco int8": (RoundedDilocoTwin, dense("diloco", wire="int8", fragments=1)),
    "local-sgd int2": (RoundedLocalSgdTwin, dense("local-sgd", wire="int2")),
}
LTE: dict[str, tuple[Any, Run]] = {
    "gathered int8": (RoundedLteTwin, lte(wire="int8")),
    "gathered int4": (RoundedLteTwin, lte(wire="int4")),
    "served int2": (RoundedLteTwin, lte(wire="int2", merge_transport="server")),
}


@pytest.mark.parametrize("name", others_slow(DENSE, ["local-sgd int4"]))
def test_rounded_weights_train_like_the_twin(name: str) -> None:
    parity.assert_trains_like(*DENSE[name])


@pytest.mark.parametrize("name", others_slow(LTE, ["gathered int8"]))
def test_rounded_factors_train_like_the_twin(name: str) -> None:
    adapter_parity.assert_trains_like(*LTE[name])
