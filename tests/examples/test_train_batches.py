"""Batches: enlarged, normalised, augmented by their seeds, and filled up without a part in the loss."""

import numpy as np
import pytest
import torch
from trainer.batches import Part, make_transform, training_batches
from trainer.images import Images
from trainer.order import Order


def images(count):
    pixels = torch.full((count, 1, 8, 8), 255, dtype=torch.uint8)
    return Images(pixels, np.zeros(count, np.int64), ["a"], np.arange(count))


def test_a_part_is_enlarged_normalised_and_grey_in_three_channels():
    part = Part(images(2), np.array([1]), make_transform(16, [0.5] * 3, [0.25] * 3))
    pixels, label = part[0]
    assert pixels.shape == (3, 16, 16)
    assert torch.equal(pixels, torch.full((3, 16, 16), 2.0))
    assert label == 0


@pytest.mark.parametrize("augment", ["light", "strong"])
def test_augmentation_changes_an_image_and_repeats_with_its_seed(augment):
    part = Part(images(1), np.array([0]), make_transform(16, [0.5] * 3, [0.5] * 3, augment))
    state = torch.get_rng_state()
    first, again, other = (part[0, seed][0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_what_fills_up_a_batch_has_no_part_in_the_loss():
    images = Images(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), np.array([1, 0]), ["a", "b"], np.arange(2))
    part = Part(images, np.arange(2), make_transform(8, [0.5] * 3, [0.5] * 3, "light"))
    loaded, labels = next(iter(training_batches(part, Order(2, 2, seed=0, world=2, rank=1), 0)))
    assert loaded.shape == (2, 3, 8, 8)
    logits = torch.tensor([[0.3, 0.1], [9.0, -9.0]])
    counted = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert counted[1] == 0 < counted[0]
