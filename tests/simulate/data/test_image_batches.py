"""Batches of images: addressed by (seed, device, step), through the whole shard each epoch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from simulate.data.image_batches import ImageBatches
from tests.simulate.data.pictures import images

DEVICES, MICRO_BATCH = 3, 4


def batches(seed: int = 0, **options: object) -> ImageBatches:
    options = {"augment": ("crop", "flip"), "mixup": 0.3, **options}
    return ImageBatches(images(train=26), MICRO_BATCH, DEVICES, seed, **options)  # type: ignore[arg-type]


def test_a_batch_is_the_same_in_any_order_of_calls() -> None:
    forward, backward = batches(), batches()
    ascending = [forward.batch(step, range(DEVICES)) for step in range(12)]
    for step in reversed(range(12)):
        for expected, got in zip(ascending[step], backward.batch(step, range(DEVICES)), strict=True):
            assert torch.equal(expected, got)


@pytest.mark.parametrize("local", [range(0, 1), range(1, 3), range(2, 3)])
def test_a_process_gets_its_own_devices_part_of_the_batch(local: range) -> None:
    part = slice(local.start * MICRO_BATCH, local.stop * MICRO_BATCH)
    for everyone, own in zip(batches().batch(4, range(DEVICES)), batches().batch(4, local), strict=True):
        assert torch.equal(own, everyone[part])


def test_seeds_steps_and_devices_draw_differently() -> None:
    drawn = {
        tuple(batches(seed).rows(device, step).tolist())
        for seed in range(2)
        for device in range(DEVICES)
        for step in range(2)
    }
    assert len(drawn) == 12


def test_every_epoch_has_each_image_of_the_shard_once_in_another_order() -> None:
    data = batches()
    for device, size in enumerate((9, 8, 9)):  # of 26
        assert len(data.shards[device]) == size
        seen = np.concatenate([data.rows(device, step) for step in range(9)])
        epochs = [seen[first : first + size] for first in range(0, len(seen) - size + 1, size)]
        assert all(sorted(epoch) == sorted(data.shards[device]) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs) > 2


def test_a_shard_smaller_than_a_batch_goes_through_several_epochs_in_one() -> None:
    data = ImageBatches(images(train=3), 7, 3, 0)
    assert data.rows(1, 0).tolist() == [data.shards[1][0]] * 7
    assert data.batch(0, range(3))[0].shape == (21, 3, 8, 8)


def test_inputs_and_targets_have_their_shapes_and_types() -> None:
    inputs, targets = batches(mixup=0.0).batch(0, range(DEVICES))
    assert (inputs.shape, inputs.dtype) == ((12, 3, 8, 8), torch.float32)
    assert (targets.shape, targets.dtype) == ((12,), torch.int64)
    inputs, targets = batches(classes=5, dtype=torch.float64).batch(0, range(DEVICES))
    assert (inputs.dtype, targets.dtype, targets.shape) == (torch.float64, torch.float64, (12, 5))
    torch.testing.assert_close(targets.sum(1), torch.ones(12, dtype=torch.float64))


def test_validation_images_are_fixed_held_out_and_not_augmented() -> None:
    data, plain = batches(), ImageBatches(images(train=26), MICRO_BATCH, DEVICES, 9)
    for got, expected in zip(data.validation(100, 3), plain.validation(100, 3), strict=True):
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    labels = torch.cat([targets for _, targets in data.validation(100, 3)])
    assert labels.tolist() == data.images.labels[26:].tolist()
    assert [len(targets) for _, targets in data.validation(100, 3)] == [3, 1]
    chosen = [targets for _, targets in data.validation(2, 3)]
    assert chosen[0].tolist() == data.images.labels[[26, 29]].tolist()


def test_the_accuracy_is_the_share_of_top_classes_that_are_right() -> None:
    outputs = torch.tensor([[1.0, 2.0, 0.0], [3.0, 1.0, 2.0], [0.0, 0.0, 1.0], [9.0, 1.0, 1.0]])
    (right,) = batches().scores(outputs, torch.tensor([1, 2, 2, 0]))
    assert batches().score_names == ("val_accuracy",)
    assert right.tolist() == [1.0, 0.0, 1.0, 1.0]


def test_images_that_were_left_out_are_in_no_batch() -> None:
    data = images(train=12)
    data.labels[[3, 13]] = -1
    kept = ImageBatches(data, 2, 2, 0)
    assert sorted(np.concatenate(kept.shards)) == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]
    assert data.left_out == 2 and len(data.validation) == 3
