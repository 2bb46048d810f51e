"""What --task segment does without data, and which settings it refuses."""

import numpy as np
import pytest
import torch
from small_training import checked, messages
from trainer.data.sources import read_data

# Default data


def test_the_default_crops_share_no_pixel_and_half_of_them_is_stained():
    data = read_data(checked(task="segment", image_size=64))
    assert data.pixels.shape == (64, 1, 64, 64)
    assert data.classes == ["stained"]
    assert 0.3 < data.targets.labels.float().mean() < 0.6


def test_the_default_volumes_keep_a_block_with_its_mirror_image():
    pytest.importorskip("nilearn")
    settings = checked(task="segment", volumes=True, image_size=40)
    data = read_data(settings)
    assert data.classes == ["grey matter", "white matter"]
    assert data.pixels.shape[2:] == (40, 40, 40)
    by_name = dict(zip(data.names, range(len(data)), strict=True))
    pairs = [(i, by_name.get(name.replace("one", "other"))) for name, i in by_name.items() if "one" in name]
    own, other = map(list, zip(*[pair for pair in pairs if pair[1] is not None], strict=True))
    # The template is symmetric: a mirror image in another part would give its mask away.
    assert torch.equal(data.targets.labels[own], data.targets.labels[other].flip(3))
    assert np.array_equal(data.groups[own], data.groups[other])


# Settings


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "segment", "--class-weights"], "--class-weights is for --task classify or multilabel"),
        (
            ["--task", "segment", "--cache-features", "x", "--method", "linear_probe"],
            "--cache-features is for",
        ),
        (["--patch-size", "32"], "--patch-size is for --task segment"),
        (["--structure", "a"], "--structure is for --task segment"),
        (["--task", "segment", "--patch-size", "300"], "at most --image-size 160"),
        (["--task", "segment", "--structure", "a", "--structure", "a"], "names one twice: a, a"),
        (["--task", "segment", "--model", "monai:DenseNet121", "--no-pretrained"], "gives (1, 2)"),
        (
            ["--task", "segment", "--model", "torchvision:resnet18", "--no-pretrained"],
            "features on several scales",
        ),
    ],
)
def test_settings_that_make_no_sense_for_masks_are_refused(capsys, flags, message):
    assert message in messages(capsys, *flags)
