"""MedMNIST archives and data sets of Hugging Face are read with their classes and splits, at their size."""

import numpy as np
import pytest
from pictures import RNG, grey
from PIL import Image
from small_training import checked, read
from trainer.data.sources import read_data
from trainer.data.splits import split
from trainer.errors import TrainerError


def medmnist(path, shape=(28, 28), classes=3, **changed):
    arrays = {}
    for part, count in (("train", 12), ("val", 6), ("test", 9)):
        arrays[f"{part}_images"] = RNG.integers(0, 256, (count, *shape), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(count) % classes)[:, None]
    np.savez(path, **{k: v for k, v in {**arrays, **changed}.items() if v is not None})
    return str(path)


def test_medmnist_keeps_its_split_and_its_size(tmp_path):
    images = read_data(checked(data=medmnist(tmp_path / "toy.npz"), image_size=64))
    assert images.pixels.shape == (27, 1, 28, 28)
    assert images.classes == ["0", "1", "2"]
    found = split(images, checked())
    assert {part: len(rows) for part, rows in found.items()} == {"train": 12, "val": 6, "test": 9}


def test_medmnist_in_colour_is_reduced_to_the_input_size(tmp_path):
    images = read_data(checked(data=medmnist(tmp_path / "toy.npz", shape=(28, 28, 3)), image_size=16))
    assert images.pixels.shape == (27, 3, 16, 16)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"val_images": None}, "and no val_images"),
        ({"shape": (2, 2, 2, 2)}, "is needed"),
        (
            {f"{p}_labels": np.zeros((n, 14), int) for p, n in (("train", 12), ("val", 6), ("test", 9))},
            "several for each image",
        ),
    ],
)
def test_a_medmnist_file_that_does_not_fit_is_refused(tmp_path, changed, message):
    with pytest.raises(TrainerError, match=message):
        read_data(checked(data=medmnist(tmp_path / "toy.npz", **changed), image_size=16))


def test_a_damaged_archive_is_named(tmp_path):
    (tmp_path / "toy.npz").write_bytes(b"PK no archive")
    with pytest.raises(TrainerError, match=r"toy\.npz could not be read as a NumPy archive"):
        read(tmp_path / "toy.npz")


def test_a_saved_data_set_of_hugging_face_is_read_with_its_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    pixels = [grey() for _ in range(6)]
    columns = {
        "picture": [Image.fromarray(array) for array in pixels],
        "finding": [1, 0, 1, 0, 1, 0],
        "patient": ["p", "p", "q", "r", "s", "t"],
        "sex": ["f", "m", "f", "m", "f", "m"],
    }
    features = datasets.Features(
        picture=datasets.Image(),
        finding=datasets.ClassLabel(names=["none", "mass"]),
        patient=datasets.Value("string"),
        sex=datasets.Value("string"),
    )
    whole = datasets.Dataset.from_dict(columns, features=features)
    parts = {"train": whole.select(range(4)), "validation": whole.select([4]), "test": whole.select([5])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    images = read_data(checked(data=f"hf:{tmp_path / 'saved'}", image_size=20, group_column="sex"))
    assert images.classes == ["mass", "none"]
    assert images.targets.tolist() == [0, 1, 0, 1, 0, 1]
    assert images.parts.tolist() == ["train"] * 4 + ["val", "test"]
    assert images.groups[0] == images.groups[1] != images.groups[2]
    assert images.subgroups == ["f", "m"] * 3
    assert np.array_equal(images.pixels[2, 0].numpy(), pixels[2])
    with pytest.raises(TrainerError, match="has the columns picture, finding, patient, sex, and no 'grade'"):
        read_data(checked(data=f"hf:{tmp_path / 'saved'}", image_size=20, label_column="grade"))


def test_a_data_set_of_hugging_face_that_is_not_there_says_so(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(
        TrainerError, match=r"--data hf:.*nowhere could not be loaded: .* Give a name on the hub"
    ):
        read_data(checked(data=f"hf:{tmp_path / 'nowhere'}", image_size=20))
