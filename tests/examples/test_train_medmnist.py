"""MedMNIST archives are read with their split and at their size."""

import numpy as np
import pytest
from pictures import RNG
from trainer.errors import TrainerError
from trainer.sources import read_data
from trainer.split import split


def medmnist(path, shape=(28, 28), classes=3, **changed):
    arrays = {}
    for part, count in (("train", 12), ("val", 6), ("test", 9)):
        arrays[f"{part}_images"] = RNG.integers(0, 256, (count, *shape), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(count) % classes)[:, None]
    np.savez(path, **{k: v for k, v in {**arrays, **changed}.items() if v is not None})
    return path


def test_medmnist_keeps_its_split_and_its_size(tmp_path):
    images = read_data(medmnist(tmp_path / "toy.npz"), 64)
    assert images.pixels.shape == (27, 1, 28, 28)
    assert images.classes == ["0", "1", "2"]
    found = split(images, seed=0)
    assert {part: len(rows) for part, rows in found.items()} == {"train": 12, "val": 6, "test": 9}


def test_medmnist_in_colour_is_reduced_to_the_input_size(tmp_path):
    images = read_data(medmnist(tmp_path / "toy.npz", shape=(28, 28, 3)), 16)
    assert images.pixels.shape == (27, 3, 16, 16)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"val_images": None}, "and no val_images"),
        ({"shape": (28, 28, 28)}, "takes 2-d ones"),
        (
            {f"{p}_labels": np.zeros((n, 14), int) for p, n in (("train", 12), ("val", 6), ("test", 9))},
            "several for each image",
        ),
    ],
)
def test_a_medmnist_file_that_does_not_fit_is_refused(tmp_path, changed, message):
    with pytest.raises(TrainerError, match=message):
        read_data(medmnist(tmp_path / "toy.npz", **changed), 16)


def test_a_damaged_archive_is_named(tmp_path):
    (tmp_path / "toy.npz").write_bytes(b"PK no archive")
    with pytest.raises(TrainerError, match=r"toy\.npz could not be read as a NumPy archive"):
        read_data(tmp_path / "toy.npz", 16)
