"""The default data: patches of tissue in which staining shows by texture alone, and no part shares a pixel with another."""

import numpy as np
import pytest
from small_training import checked
from trainer.data.sources import read_data
from trainer.data.splits import split
from trainer.data.tissue import PATCH, patch_corners


def test_half_of_the_tissue_patches_are_stained():
    images = read_data(checked())
    assert images.pixels.shape == (576, 1, PATCH, PATCH)
    assert images.strata.mean() == 0.5


def test_tissue_patches_have_equal_brightness():
    means = read_data(checked()).pixels.float().mean((1, 2, 3))
    assert means.std() < 3


def test_tissue_patches_of_different_parts_share_no_pixel():
    images = read_data(checked())
    corners = np.array(patch_corners(512))
    for seed in range(3):
        painted = np.zeros((512, 512), int)
        for bit, rows in enumerate(split(images, checked(seed=seed)).values()):
            for y, x in corners[rows]:
                painted[y : y + PATCH, x : x + PATCH] |= 1 << bit
        assert set(np.unique(painted)) == {1, 2, 4}


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_every_part_of_the_tissue_has_both_classes(part):
    images = read_data(checked())
    assert 0.3 < images.strata[split(images, checked())[part]].mean() < 0.7
