"""Batches: addressed by (seed, device, step), from shards that do not overlap."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from simulate.common.seeding import address
from simulate.data.batches import TextBatches
from simulate.data.text import Text

CONTEXT, MICRO_BATCH, DEVICES = 8, 4, 3


@pytest.fixture
def positions() -> Text:
    """A text whose tokens are their own positions: a window shows where it was taken."""
    return Text(np.arange(1000), "positions")


def batches(text: Text, devices: int = DEVICES, seed: int = 0) -> TextBatches:
    return TextBatches(text, CONTEXT, MICRO_BATCH, devices, seed)


def test_a_batch_is_the_same_in_any_order_of_calls(text: Text) -> None:
    forward, backward = batches(text), batches(text)
    ascending = {step: forward.batch(step, range(DEVICES)) for step in range(5)}
    for step in reversed(range(5)):
        for expected, got in zip(ascending[step], backward.batch(step, range(DEVICES)), strict=True):
            assert torch.equal(expected, got)


@pytest.mark.parametrize("local", [range(0, 1), range(1, 3), range(2, 3)])
def test_a_process_gets_its_own_devices_part_of_the_batch(text: Text, local: range) -> None:
    everyone, _ = batches(text).batch(4, range(DEVICES))
    own, _ = batches(text).batch(4, local)
    assert torch.equal(own, everyone[local.start * MICRO_BATCH : local.stop * MICRO_BATCH])


def test_devices_steps_and_seeds_draw_differently(positions: Text) -> None:
    shard = 900 // DEVICES
    starts = {
        tuple((window[0].item() - device * shard) for window in batches(positions, seed=seed).batch(step, one)[0])
        for seed in range(3)
        for step in range(3)
        for device, one in enumerate((range(0, 1), range(1, 2), range(2, 3)))
    }
    assert len(starts) == 27


def test_shards_are_disjoint_and_within_the_training_split(positions: Text) -> None:
    data = batches(positions)
    seen: list[set[int]] = [set() for _ in range(DEVICES)]
    for step in range(300):
        inputs, targets = data.batch(step, range(DEVICES))
        for device, (x, y) in enumerate(zip(inputs.chunk(DEVICES), targets.chunk(DEVICES), strict=True)):
            seen[device] |= set(x.flatten().tolist()) | set(y.flatten().tolist())
    for device, tokens in enumerate(seen):
        assert tokens == set(range(300 * device, 300 * (device + 1)))  # all of its third, and nothing else


def test_targets_are_the_next_tokens(positions: Text) -> None:
    inputs, targets = batches(positions).batch(0, range(DEVICES))
    assert inputs.shape == targets.shape == (DEVICES * MICRO_BATCH, CONTEXT)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs - inputs[:, :1], torch.arange(CONTEXT).expand_as(inputs))


def test_a_shard_of_one_window_always_gives_that_window() -> None:
    text = Text(np.arange(100), "positions")  # 90 to train on: 10 shards of 9 tokens, windows of 9
    inputs, _ = batches(text, devices=10).batch(0, range(10))
    assert inputs[:, 0].tolist() == [9 * device for device in range(10) for _ in range(MICRO_BATCH)]


def test_validation_windows_are_fixed_distinct_and_held_out(positions: Text) -> None:
    first, second = (list(batches(positions).validation(20, 8)) for _ in range(2))
    starts = [window[0].item() for inputs, _ in first for window in inputs]
    assert [len(inputs) for inputs, _ in first] == [8, 8, 4]
    assert starts == [window[0].item() for inputs, _ in second for window in inputs]
    assert len(set(starts)) == 20
    assert min(starts) == 900 and max(starts) == 1000 - CONTEXT - 1
    assert all(torch.equal(targets, inputs + 1) for inputs, targets in first)


def test_more_validation_windows_than_there_are_give_each_once(positions: Text) -> None:
    starts = [window[0].item() for inputs, _ in batches(positions).validation(10_000, 64) for window in inputs]
    assert starts == list(range(900, 1000 - CONTEXT))


def test_addresses_do_not_run_into_each_other() -> None:
    places = [(0, "batch", 1, 23), (0, "batch", 12, 3), (0, "batch", 1, 2, 3), (0, "batch1", 23), (1, "batch", 1, 23)]
    seeds = [address(seed, purpose, *where) for seed, purpose, *where in places]
    assert len(set(seeds)) == len(places)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_an_address_means_the_same_number_for_ever() -> None:
    # A change here changes every run that anyone has made.
    assert address(0, "batch", 1, 2) == 7011564002500711692
