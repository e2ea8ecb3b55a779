"""Rank, heads and batch from a probe's figures, by hand."""

from __future__ import annotations

from simulate.probe.recommend import Needs, recommend
from tests.simulate.probe.figures import DROWNED, probe_of


def test_the_layer_that_needs_most_decides() -> None:
    needs = Needs.of(probe_of((3, 20), (5, 18)))
    assert (needs.half, needs.most) == (5, 20)


def test_heads_share_what_is_needed_but_each_follows_most_of_it_by_itself() -> None:
    needs = Needs.of(probe_of((6, 50), limit=128))  # and 100 directions hold 99 %
    assert [needs.together(heads) for heads in (1, 4, 16, 50)] == [100, 25, 7, 2]
    assert [needs.lowest(heads) for heads in (1, 4, 16, 50)] == [100, 25, 7, 6]
    # Rounded up to a multiple of 4; with several heads the 50 directions of one head decide.
    assert [needs.rank(heads) for heads in (1, 4, 16, 50)] == [100, 52, 52, 52]
    assert {needs.highest(heads) for heads in (1, 4, 16, 50)} == {100}


def test_rounds_longer_than_the_probes_need_what_all_of_the_warm_up_needs() -> None:
    probe = probe_of((3, 20), grown=2)
    found = [(needs.steps, needs.half, needs.most) for needs in (Needs.of(probe, every) for every in (5, 10, 11, 100))]
    assert found == [(10, 3, 20), (10, 3, 20), (50, 6, 40), (50, 6, 40)]


def test_no_rank_exceeds_the_smallest_layer() -> None:
    needs = Needs.of(probe_of((9, 50), limit=10))
    assert (needs.rank(1), needs.together(1), needs.rank(8)) == (10, 10, 10)


def test_the_recommendation_has_ranges_and_reasons() -> None:
    advice = recommend(probe_of((3, 20), (5, 18), upper=256), heads=4, devices=4)
    assert (advice.rank.low, advice.rank.estimate, advice.rank.high) == (10, 20, 40)
    # 40 directions need 2 heads of rank 20, on 4 devices 4; the paper's 256 directions need 13, so 16.
    assert (advice.heads.low, advice.heads.estimate, advice.heads.high) == (4, 4, 16)
    assert advice.batch_samples is not None
    assert (advice.batch_samples.low, advice.batch_samples.estimate, advice.batch_samples.high) == (30, 40, 60)
    rank, heads, mark, gradient, batch, limits = advice.reasoning
    assert (
        rank.startswith("rank 20 a head with 4 heads (estimate; range 10 to 40)") and "median of the layers 19" in rank
    )
    assert heads.startswith("heads 4 (estimate; range 4 to 16")
    assert "256" in mark and "rank 64 with 4 heads" in mark
    assert "80%" in gradient
    assert batch.startswith("batch 40 samples over all devices, 10 a device (estimate; range 30 to 60")
    assert "50 dense steps" in limits


def test_a_drowned_gradient_has_no_batch() -> None:
    advice = recommend(probe_of((3, 20), noise=DROWNED), heads=4, devices=4)
    assert advice.batch_samples is None
    assert "cannot be estimated" in advice.reasoning[4]


def test_a_network_that_did_not_change_says_so() -> None:
    probe = probe_of((3, 20))
    still = probe.model_copy(update={"layers": [probe.layers[0].model_copy(update={"round_update": None})]})
    assert recommend(still, 4, 4).reasoning[0].startswith("rank: the warm-up changed no adapted layer")


def test_candidates_below_and_above_are_marked() -> None:
    needs = Needs.of(probe_of((6, 30), limit=128))
    marks = {rank: list(needs.marks(rank, 4)) for rank in (4, 16, 32, 60, 64)}
    assert "rank x heads = 16 is below the 60 directions" in marks[4][0]
    assert "rank 16 of one head is below the 30 directions" in marks[16][0]
    assert marks[32] == marks[60] == []
    assert "rank 64 is above the 60" in marks[64][0]
    assert all(list(needs.marks(needs.rank(heads), heads)) == [] for heads in range(1, 40))


def test_the_largest_rank_that_layers_allow_is_never_too_low() -> None:
    assert list(Needs.of(probe_of((9, 50), limit=10)).marks(10, 2)) == []
