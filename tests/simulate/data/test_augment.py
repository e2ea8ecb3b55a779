"""Augmentations of whole batches: by hand on a picture of four pixels a side, and against one picture at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from simulate.common.seeding import generator
from simulate.data.augment import PADDING_PART, Draws, crop_and_flip, mix, normalise
from simulate.data.image_batches import ImageBatches
from tests.reference import images as slow
from tests.simulate.data.pictures import images

GENERATOR = np.random.default_rng


def draws(row: int, column: int, flip: bool) -> Draws:
    return Draws(np.array([row]), np.array([column]), np.array([flip]))


PICTURE = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8) + 1


def test_a_shift_moves_the_picture_and_leaves_black() -> None:
    out = crop_and_flip(PICTURE, [draws(1, -1, False)])[0, 0]
    assert out[0].tolist() == [0, 9, 10, 11, 12, 13, 14, 15]  # the second row, one to the right
    assert out[7].tolist() == [0] * 8


def test_a_flip_mirrors_what_was_cropped() -> None:
    assert crop_and_flip(PICTURE, [draws(0, 0, True)])[0, 0, 0].tolist() == [8, 7, 6, 5, 4, 3, 2, 1]
    assert crop_and_flip(PICTURE, [draws(0, -1, True)])[0, 0, 0].tolist() == [7, 6, 5, 4, 3, 2, 1, 0]


def test_no_draw_leaves_pictures_as_they_are() -> None:
    none = Draws.of(GENERATOR(0), 1, 8, ())
    assert torch.equal(crop_and_flip(PICTURE, [none]), PICTURE)


def test_shifts_stay_within_the_padding_and_reach_it() -> None:
    drawn = Draws.of(GENERATOR(0), 4000, 32, ("crop", "flip"))
    assert set(drawn.rows) == set(drawn.columns) == set(range(-32 // PADDING_PART, 32 // PADDING_PART + 1))
    assert abs(drawn.flips.mean() - 0.5) < 0.04  # five standard deviations
    assert not np.array_equal(drawn.rows, drawn.columns)


def test_what_is_not_wanted_does_not_change_the_other_draws() -> None:
    both, crop, flip = (Draws.of(GENERATOR(0), 50, 32, wanted) for wanted in (("crop", "flip"), ("crop",), ("flip",)))
    assert np.array_equal(both.rows, crop.rows) and not crop.flips.any()
    assert np.array_equal(both.flips, flip.flips) and not flip.rows.any()


def test_normalising_gives_mean_0_and_deviation_1() -> None:
    content = torch.randint(0, 256, (50, 2, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scaled = content.double() / 255
    mean, std = scaled.mean((0, 2, 3)).tolist(), scaled.std((0, 2, 3), correction=0).tolist()
    out = normalise(content, mean, std, torch.float64)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(out.square().mean((0, 2, 3)), torch.ones(2, dtype=torch.float64), atol=1e-12, rtol=0)
    assert normalise(torch.full((1, 1, 2, 2), 51, dtype=torch.uint8), [0.2], [0.0], torch.float32).abs().max() < 1e-6


def test_mixing_a_quarter_by_hand() -> None:
    x = torch.tensor([[[8.0], [0.0]], [[4.0], [2.0]]])
    targets = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
    partners = torch.tensor([[1, 0], [0, 1]])
    mixed, shares = mix(x, targets, torch.tensor([0.25, 0.5]), partners)
    assert mixed.flatten().tolist() == [2.0, 6.0, 4.0, 2.0]  # devices do not mix
    assert shares[0].tolist() == [[0.25, 0.75], [0.75, 0.25]]
    assert torch.equal(shares[1], targets[1])


@pytest.mark.parametrize("augment", [(), ("crop",), ("flip",), ("crop", "flip")])
@pytest.mark.parametrize("mixup", [0.0, 0.4])
@pytest.mark.parametrize("colours", [1, 3])
def test_batches_are_those_of_one_picture_at_a_time(augment: tuple[str, ...], mixup: float, colours: int) -> None:
    data = images(size=16, colours=colours)
    batches = ImageBatches(data, 4, 3, seed=5, classes=7, augment=augment, mixup=mixup, dtype=torch.float64)
    for step in range(6):
        inputs, targets = batches.batch(step, range(1, 3))
        expected_inputs, expected_targets = [], []
        for device in (1, 2):
            rows, random = batches.rows(device, step), generator(5, "augment", device, step)
            drawn = Draws.of(random, 4, 16, augment)
            moves = zip(rows, drawn.rows, drawn.columns, drawn.flips, strict=True)
            x = [slow.moved(data.pixels[row], r, c, f) for row, r, c, f in moves]
            x = [slow.normalised(picture, data.mean, data.std) for picture in x]
            y = [slow.one_hot(data.labels[row], 7) for row in rows]
            if mixup:
                share, partners = random.beta(mixup, mixup), random.permutation(4)
                x, y = slow.mixed(x, share, partners), slow.mixed(y, share, partners)
            expected_inputs += x
            expected_targets += y
        torch.testing.assert_close(inputs, torch.from_numpy(np.stack(expected_inputs)), rtol=1e-12, atol=1e-12)
        shares = targets if mixup else torch.nn.functional.one_hot(targets, 7).double()
        torch.testing.assert_close(shares, torch.from_numpy(np.stack(expected_targets)), rtol=1e-12, atol=1e-12)
        assert targets.is_floating_point() == bool(mixup)
