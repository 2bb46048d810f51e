"""Batches: in an order that follows from seed and epoch, enlarged, normalised, and augmented the same again."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_training import checked
from trainer.data.batches import DataModule, EpochOrder, Part, Preprocessing
from trainer.data.rows import Images


def images(count, shape=(8, 8)):
    pixels = torch.full((count, 1, *shape), 255, dtype=torch.uint8)
    pixels[..., : shape[-1] // 2] = 90
    labels, classes, groups = np.arange(count) % 2, ["a", "b"], np.arange(count)
    targets = torch.from_numpy(labels)
    return Images(pixels, targets, classes, labels, classes, groups, np.array([]), list("x" * count))


def part_of(count, shape=(8, 8), augment="none", side=16):
    preprocessing = Preprocessing(shape, side, [0.5] * 3, [0.25] * 3)
    return Part(images(count, shape), np.arange(count), preprocessing, augment)


# Pixels


@pytest.mark.parametrize("shape", [(8, 8), (4, 8, 8)])
def test_a_part_is_enlarged_normalised_and_grey_in_three_channels(shape):
    pixels, label = part_of(2, shape)[1]
    assert pixels.shape == (3, *[16] * len(shape))
    assert torch.allclose(pixels[..., -1], torch.tensor(2.0))
    assert torch.allclose(pixels[..., 0], torch.tensor((90 / 255 - 0.5) / 0.25))
    assert label == 1


def test_a_batch_is_prepared_as_its_images():
    for shape in ((8, 8), (4, 8, 8)):
        part = part_of(3, shape)
        batch = part.preprocessing(part.pixels)
        assert torch.allclose(batch, torch.stack([part[i][0] for i in range(3)]))


@pytest.mark.parametrize("shape", [(16, 16), (8, 16, 16)])
@pytest.mark.parametrize("augment", ["light", "strong"])
def test_augmentation_changes_an_image_and_repeats_with_its_epoch(shape, augment):
    part = part_of(1, shape, augment)
    state = torch.get_rng_state()
    first, again, other = (part[0, epoch][0] for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())
    assert first.shape == part[0][0].shape
    assert torch.isfinite(first).all()


def test_a_white_volume_stays_bright_however_much_light_is_added():
    part = part_of(1, (8, 16, 16), "strong")
    part.pixels[:] = 255
    for epoch in range(8):
        volume = part[0, epoch][0]
        # Outside of the turned volume it is black, or grey on the edge; no voxel within is.
        assert volume[:, 4, 8, 8].min() >= (0.59 - 0.5) / 0.25


# Order


def order(count, world=1, rank=0, seed=0, epoch=0, balance=False):
    found = EpochOrder(part_of(count), seed, world, rank, balance)
    found.set_epoch(epoch)
    return list(found)


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order():
    first, second = order(20), order(20, epoch=1)
    assert sorted(place for place, _ in first) == sorted(place for place, _ in second) == list(range(20))
    assert [place for place, _ in first] != [place for place, _ in second]
    assert first == order(20)
    # The second epoch of one seed is no epoch of another.
    assert [place for place, _ in second] != [place for place, _ in order(20, seed=1)]


def test_two_processes_together_see_the_steps_of_one():
    alone, shares = order(16), [order(16, 2, rank) for rank in (0, 1)]
    for step in range(4):
        seen = [key for share in shares for key in share[2 * step : 2 * step + 2]]
        assert sorted(seen) == sorted(alone[4 * step : 4 * step + 4])


@pytest.mark.parametrize("balance", [False, True])
def test_an_epoch_that_goes_through_the_images_thrice_is_three_epochs(balance):
    once, thrice = (EpochOrder(part_of(5), 3, 1, 0, balance, repeat=times) for times in (1, 3))
    expected = []
    for epoch in (3, 4, 5):
        once.set_epoch(epoch)
        expected += list(once)
    thrice.set_epoch(1)
    assert list(thrice) == expected
    assert len(thrice) == 15
    views = EpochOrder(part_of(5), 3, 1, 0, balance, views=2, repeat=3)
    assert [view for _, view in views] == [0] * 5 + [1] * 5 + [0] * 5


def test_a_balanced_order_draws_every_class_as_often():
    part = part_of(2000)
    part.strata = torch.tensor([0] * 1600 + [1] * 400)
    drawn = list(EpochOrder(part, 0, 1, 0, True))
    assert float(part.strata[[place for place, _ in drawn]].float().mean()) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("count", "steps"), [(9, 2), (10, 3), (1, 1), (8, 2)])
def test_a_last_step_of_one_image_is_left_out(count, steps):
    data = DataModule({"train": part_of(count)}, checked(batch_size=4))
    data.trainer = SimpleNamespace(world_size=1, global_rank=0)
    assert len(data.train_dataloader()) == len(list(data.train_dataloader())) == steps


def test_micro_batches_and_processes_share_a_step():
    data = DataModule({"train": part_of(32)}, checked(batch_size=16, accumulate=2, devices=2))
    data.trainer = SimpleNamespace(world_size=2, global_rank=1)
    assert [len(labels) for _, labels in data.train_dataloader()] == [4] * 4
