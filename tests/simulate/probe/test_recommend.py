"""From a probe's figures to rank, heads and batch: by hand."""

from __future__ import annotations

from simulate.probe.recommend import Needs, recommend
from tests.simulate.probe.figures import DROWNED, probe_of


def test_the_layer_that_needs_most_decides() -> None:
    needs = Needs.of(probe_of((3, 20), (5, 18)))
    assert (needs.half, needs.most) == (5, 20)


def test_heads_share_what_is_needed_but_each_follows_half_by_itself() -> None:
    needs = Needs.of(probe_of((6, 50)))
    assert [needs.together(heads) for heads in (1, 4, 16, 50)] == [50, 13, 4, 1]
    # Rounded up to a multiple of 4; with many heads the 6 directions of one head decide.
    assert [needs.rank(heads) for heads in (1, 4, 16, 50)] == [52, 16, 8, 8]


def test_no_rank_exceeds_the_smallest_layer() -> None:
    needs = Needs.of(probe_of((9, 50), limit=10))
    assert (needs.rank(1), needs.together(1), needs.rank(8)) == (10, 10, 10)


def test_the_recommendation_has_ranges_and_reasons() -> None:
    advice = recommend(probe_of((3, 20), (5, 18), upper=64), heads=4, devices=4)
    assert (advice.rank.low, advice.rank.estimate, advice.rank.high) == (5, 8, 20)
    # 20 directions need 3 heads of rank 8, on 4 devices 4; the paper's 64 directions need 8.
    assert (advice.heads.low, advice.heads.estimate, advice.heads.high) == (4, 4, 8)
    assert advice.batch_samples is not None
    assert (advice.batch_samples.low, advice.batch_samples.estimate, advice.batch_samples.high) == (30, 40, 60)
    rank, heads, mark, gradient, batch, limits = advice.reasoning
    assert rank.startswith("rank 8 a head with 4 heads (estimate; range 5 to 20)") and "median of the layers 19" in rank
    assert heads.startswith("heads 4 (estimate; range 4 to 8")
    assert "64" in mark and "rank 16 with 4 heads" in mark
    assert "80%" in gradient
    assert batch.startswith("batch 40 samples over all devices, 10 a device (estimate; range 30 to 60")
    assert "50 dense steps" in limits


def test_a_drowned_gradient_has_no_batch() -> None:
    advice = recommend(probe_of((3, 20), noise=DROWNED), heads=4, devices=4)
    assert advice.batch_samples is None
    assert "cannot be told" in advice.reasoning[4]


def test_a_network_that_did_not_change_says_so() -> None:
    probe = probe_of((3, 20))
    still = probe.model_copy(update={"layers": [probe.layers[0].model_copy(update={"round_update": None})]})
    assert recommend(still, 4, 4).reasoning[0].startswith("rank: the warm-up changed no adapted layer")


def test_candidates_below_and_above_are_marked() -> None:
    needs = Needs.of(probe_of((6, 30), limit=128))
    marks = {
        (rank, heads): list(needs.marks(rank, heads)) for rank, heads in ((4, 4), (4, 8), (8, 4), (30, 4), (64, 4))
    }
    assert "rank x heads = 16 is below the 30 directions" in marks[4, 4][0]
    assert "rank 4 of one head is below the 6 directions" in marks[4, 8][0]
    assert marks[8, 4] == marks[30, 4] == []
    assert "rank 64 is above the 30 directions" in marks[64, 4][0]
    assert all(list(needs.marks(needs.rank(heads), heads)) == [] for heads in range(1, 40))
