"""Image and mask are flipped, turned and cut together, as it follows from seed, image and epoch."""

import numpy as np
import pytest
import torch
from small_masks import disc
from trainer.data.batches import Preprocessing
from trainer.data.joint import MaskedPart
from trainer.data.rows import Images
from trainer.files.structures import Masks


def part_of(dimensions, augment, side=24, patch=None, share=1.0):
    """Images that are their masks, in grey."""
    rng = np.random.default_rng(0)
    masks = torch.from_numpy(np.stack([disc(side, rng, dimensions)[1] for _ in range(3)]))
    keep = torch.zeros_like(masks)
    keep[..., : round(share * side)] = 1
    masks = masks * keep
    pixels = (20 + 200 * masks)[:, None]
    rows, strata = np.arange(3), np.zeros(3, dtype=np.int64)
    targets = Masks(masks, torch.ones(3, dimensions))
    images = Images(pixels, targets, ["disc"], strata, ["disc"], rows, np.array([]), list("abc"))
    preprocessing = Preprocessing((side,) * dimensions, side, [0.0] * 3, [1.0] * 3)
    return MaskedPart(images, rows, preprocessing, augment, 0, patch)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("augment", ["light", "strong"])
def test_the_mask_follows_its_image(dimensions, augment):
    part = part_of(dimensions, augment)
    moved = 0
    for epoch in range(6):
        image, (mask, sides) = part[1, epoch]
        bright = image[0] > 0.35
        assert mask.dtype == torch.uint8
        assert set(mask.unique().tolist()) <= {0, 1}
        both = 2 * (bright & (mask > 0)).sum() / (bright.sum() + (mask > 0).sum())
        assert both > 0.85
        moved += int(not torch.equal(mask, part.labels[1]))
        assert sides.tolist() == [1.0] * dimensions
    assert moved >= 5


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_same_epoch_gives_the_same_and_another_epoch_another(dimensions):
    part = part_of(dimensions, "light", patch=8)
    state = torch.get_rng_state()
    first, again, other = (part[0, epoch] for epoch in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1][0], again[1][0])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("dimensions", [2, 3])
def test_crops_lie_on_each_other_and_see_the_structure(dimensions):
    part = part_of(dimensions, "none", 24, patch=8, share=0.5)
    with_structure = 0
    for epoch in range(40):
        image, (mask, _) = part[0, epoch]
        assert image.shape == (3, *[8] * dimensions)
        assert torch.equal((image[0] > 0.35).byte(), mask)
        with_structure += int(mask.any())
    assert with_structure >= 15


def test_an_empty_and_a_full_mask_are_cut_anywhere():
    part = part_of(2, "none", patch=8)
    for value in (0, 1):
        part.labels[:] = value
        assert part[0, 3][1][0].float().mean() == value


def test_without_an_epoch_nothing_is_changed():
    part = part_of(2, "strong", patch=8)
    image, (mask, _) = part[2]
    assert image.shape == (3, 24, 24)
    assert torch.equal(mask, part.labels[2])
