"""Data sets of Hugging Face are read with their classes and splits."""

import numpy as np
import pytest
from pictures import grey
from PIL import Image
from trainer.errors import TrainerError
from trainer.sources import read_data


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
    images = read_data(f"hf:{tmp_path / 'saved'}", 20, group_column="sex")
    assert images.classes == ["mass", "none"]
    assert images.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert images.parts.tolist() == ["train"] * 4 + ["val", "test"]
    assert images.groups[0] == images.groups[1] != images.groups[2]
    assert images.subgroups == ["f", "m"] * 3
    assert np.array_equal(images.pixels[2, 0].numpy(), pixels[2])


def test_a_data_set_of_hugging_face_that_is_not_there_says_so(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(
        TrainerError, match=r"--data hf:.*nowhere could not be loaded: .* Give a name on the hub"
    ):
        read_data(f"hf:{tmp_path / 'nowhere'}", 20)
