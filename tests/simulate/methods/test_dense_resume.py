"""Restored dense methods continue bit for bit: in mid-round, right after a merge, with messages on their way."""

from __future__ import annotations

import pytest
import torch

from simulate.config.method_options import AdapterOptions
from simulate.config.method_table import method_options
from simulate.methods.diloco.train import Diloco
from simulate.methods.gathered_gradients import GatheredGradients
from simulate.methods.powersgd.train import PowerSgd
from simulate.methods.sapipe.train import Sapipe
from tests import tiny
from tests.selection import variants

DENSE = [name for name, table in tiny.VARIANTS.items() if not issubclass(method_options(table["name"]), AdapterOptions)]
TRAIN = {"steps": 14}
# With T = 4 and a delay of 2: one step into the second round, on its way; and right after the second merge.
AWKWARD = [pytest.param(5, id="in mid-round"), pytest.param(8, id="after a merge", marks=pytest.mark.slow)]


@pytest.mark.parametrize("steps_before", AWKWARD)
@pytest.mark.parametrize("name", variants("resume", DENSE))
def test_a_restored_method_continues_bit_for_bit(name: str, steps_before: int) -> None:
    tiny.assert_resumes(name, steps_before)


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("diloco", Diloco),
        ("sapipe", Sapipe),
        ("powersgd", PowerSgd),
        ("signsgd", GatheredGradients),
    ],
)
def test_what_a_method_keeps_is_missed(monkeypatch: pytest.MonkeyPatch, name: str, owner: type) -> None:
    monkeypatch.setattr(owner, "extra_state", lambda method: {})
    with pytest.raises(AssertionError):
        tiny.assert_resumes(name, 5)


def test_a_method_that_has_trained_returns_to_a_state_without_moments() -> None:
    run = tiny.variant_run("local-sgd, reset", train=TRAIN)
    method = tiny.build(run)
    tiny.train(method, 0, 4)  # the merge after the fourth step forgot all moments
    saved = {key: tensor.clone() for key, tensor in method.state.state_dict().items()}
    first = tiny.train(method, 4, 3)
    method.state.load_state_dict(saved)
    assert torch.equal(tiny.train(method, 4, 3).losses, first.losses)
