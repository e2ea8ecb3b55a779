"""SparseLoCo against its slow twin, two merges by hand, packed positions, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from simulate.comm.sparse import SparseMean, pack_positions, unpack_positions
from simulate.comm.transfers import Sparsity, positions_bytes
from simulate.comm.virtual import VirtualCommunicator
from simulate.config.run import Run
from tests import tiny
from tests.reference.late import LateSparselocoTwin
from tests.reference.paced import PacedSparselocoTwin
from tests.reference.sparseloco import SparselocoTwin
from tests.simulate.methods.parity import assert_trains_like, hand_run, of_linear, parity_run, set_copies

RUNS: dict[str, tuple[type, Run]] = {
    "int2": (SparselocoTwin, parity_run("sparseloco", merge_every=5)),
    "streaming int8": (SparselocoTwin, parity_run("sparseloco, streaming int8", merge_every=4)),
    "late": (LateSparselocoTwin, parity_run("sparseloco, late", merge_every=5, merge_delay=3)),
    "paced": (PacedSparselocoTwin, parity_run("sparseloco, paced", merge_every=5, steps_taken=((5, 2, 1), (3, 1, 3)))),
}


@pytest.mark.parametrize("name", list(RUNS))
def test_every_variant_trains_like_the_twin(name: str) -> None:
    assert_trains_like(*RUNS[name])


def forgetful(self: SparseMean, parts: list[Tensor]) -> list[Tensor]:
    self.error_LX.zero_()
    return ORIGINAL(self, parts)


ORIGINAL = SparseMean._compress


def test_parity_detects_errors_that_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SparseMean, "_compress", forgetful)
    with pytest.raises(AssertionError):
        assert_trains_like(*RUNS["int2"])


def test_two_merges_by_hand() -> None:
    """Of two entries each device sends the larger; the other decays by a half and goes with the next change."""
    mean = SparseMean(2, Sparsity(0.5, 0.5), "full", VirtualCommunicator(2), torch.zeros(1, dtype=torch.float64))
    first = mean.mean([torch.tensor([[4.0, 2.0], [1.0, -3.0]]).double()])[0]
    assert first.tolist() == [2.0, -1.5]  # (4 + 0) / 2, (0 − 3) / 2
    assert mean.error_LX.tolist() == [[0.0, 2.0], [1.0, 0.0]]
    second = mean.mean([torch.tensor([[0.5, 1.0], [1.0, 1.0]]).double()])[0]
    assert second.tolist() == [0.75, 1.0]  # 0.5·2 + 1 = 2 of the first device; 0.5·1 + 1 = 1.5 of the second
    assert mean.error_LX.tolist() == [[0.5, 0.0], [0.0, 1.0]]


def test_the_outer_rate_scales_the_mean() -> None:
    run = hand_run("sparseloco", density=1.0, wire="full", outer_learning_rate=0.5)
    method, weight = of_linear(run, value=1.0)
    set_copies(weight, 0.8, 0.6)
    method.merge(3)
    # Everything travels: θ = 1 + 0.5·(0.7 − 1)
    torch.testing.assert_close(weight.flatten(), torch.tensor([0.85, 0.85]).double())


@pytest.mark.parametrize("count", [1, 2, 7, 4096])
def test_positions_take_twelve_bits(count: int) -> None:
    index = torch.stack([torch.randperm(4096)[:count], torch.full((count,), 4095)])
    packed = pack_positions(index)
    assert packed.shape == (2, positions_bytes(count))
    assert torch.equal(unpack_positions(packed, count), index)


def test_every_run_of_4096_entries_sends_its_share() -> None:
    """Small entries travel where their run has no larger ones; so a position needs only twelve bits."""
    vector = torch.zeros(1, 2 * 4096 + 100)
    vector[0, :4096] = torch.arange(4096) + 1000
    vector[0, 5000], vector[0, 8200] = 1e-3, -1e-3
    mean = SparseMean(vector.numel(), Sparsity(1 / 4096, 1.0), "full", VirtualCommunicator(1), vector)
    sent = mean.mean([vector])[0]
    assert sent.nonzero().flatten().tolist() == [4095, 5000, 8200]


def test_a_quorum_is_refused() -> None:
    run = tiny.variant_run("sparseloco").model_dump()
    with pytest.raises(ValueError, match=r"quorum lets merges go on .* try --set method\.name=diloco"):
        Run.model_validate({**run, "cluster": {**run["cluster"], "quorum": 2}})
