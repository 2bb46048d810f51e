"""A file of features is of known size, goes on after an interruption, and is refused if anything differs."""

import copy
import shutil

import pytest
import torch
from models import randomise
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import medpeft

IMAGES = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
KEY = {"data": "train, version 1", "preprocessing": "none"}


def split(seed=0, target="2"):
    layers = [nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Linear(6, 2)]
    model = medpeft.apply(randomise(nn.Sequential(*layers), seed), "lora", target=target, head="3", rank=2)
    return medpeft.prefix(model, IMAGES[:3])


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float32])
def test_a_file_has_the_features_and_the_size_that_was_forecast(tmp_path, dtype):
    parts = split()
    path = tmp_path / "train.features"
    expected = parts.bytes_on_disk(10, dtype=dtype)
    file = parts.store(path, IMAGES, **KEY, dtype=dtype, batch_size=4)
    assert path.stat().st_size == expected
    assert not file.missing
    features = parts.features(IMAGES).to(dtype or torch.float32)
    for index in range(10):
        torch.testing.assert_close(file[index], features[index : index + 1], rtol=1e-2, atol=1e-3)
    assert torch.equal(file.read(range(10)), torch.cat(list(file)))
    assert file[-1].dtype == (dtype or torch.float32)
    assert len(file) == 10
    opened = parts.open(path, **KEY)
    assert torch.equal(opened.read([7, 2]), file.read([7, 2]))
    assert parts.rest(opened.read([0])).shape == (1, 2)


def test_a_file_is_a_data_set_with_labels_left_out_and_values_that_may_be_changed(tmp_path):
    parts = split()
    file = parts.store(tmp_path / "f", TensorDataset(IMAGES, torch.arange(10)), **KEY)
    batches = list(DataLoader(file, batch_size=5))
    assert [batch.shape for batch in batches] == [(5, 1, 8)] * 2
    file[0].zero_()
    assert torch.equal(file.read([0]), batches[0][0])


class Augmented:
    def __init__(self):
        self.asked = []

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index >= 10:
            raise IndexError
        self.asked.append(index)
        return IMAGES[index] + 100 * self.asked.count(index), "label"


def test_several_views_of_each_image_are_kept(tmp_path):
    parts, images = split(), Augmented()
    file = parts.store(tmp_path / "f", images, **KEY, views=3, batch_size=4)
    assert sorted(images.asked) == sorted(list(range(10)) * 3)
    assert file[4].shape == (3, 8)
    for view in range(3):
        expected = parts.features(IMAGES + 100 * (view + 1))
        torch.testing.assert_close(file.read(range(10), view), expected)
    mixed = file.read([4, 5, 6], [2, 0, 1])
    assert torch.equal(mixed, torch.stack([file[4][2], file[5][0], file[6][1]]))


class Interrupted(Augmented):
    def __getitem__(self, index):
        if len(self.asked) == 7:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def test_a_run_that_was_interrupted_goes_on(tmp_path):
    parts, path = split(), tmp_path / "f"
    with pytest.raises(KeyboardInterrupt):
        parts.store(path, Interrupted(), **KEY, batch_size=3)
    with pytest.raises(medpeft.CheckpointError, match="lacks 4 of 10 rows: call store to go on"):
        parts.open(path, **KEY)
    images = Augmented()
    file = parts.store(path, images, **KEY, batch_size=3)
    assert images.asked == [6, 7, 8, 9]
    assert not file.missing
    parts.open(path, **KEY)
    assert [item.name for item in tmp_path.iterdir()] == ["f"]
    images = Augmented()
    parts.store(path, images, **KEY)
    assert not images.asked


def test_features_of_other_data_another_place_or_another_base_are_refused(tmp_path):
    parts, path = split(), tmp_path / "f"
    parts.store(path, IMAGES, **KEY)
    with pytest.raises(
        medpeft.CheckpointError, match="data: train, version 1 in the file, train, version 2 here"
    ):
        parts.open(path, data="train, version 2", preprocessing="none")
    with pytest.raises(medpeft.CheckpointError, match="preprocessing: none in the file"):
        parts.store(path, IMAGES, data="train, version 1", preprocessing="flipped")
    with pytest.raises(medpeft.CheckpointError, match="images: 10 in the file, 9 here"):
        parts.store(path, IMAGES[:9], **KEY)
    with pytest.raises(medpeft.CheckpointError, match="dtype: float32 in the file, float16 here"):
        parts.store(path, IMAGES, **KEY, dtype=torch.float16)
    with pytest.raises(medpeft.CheckpointError, match=r"others:\n  base: \w+ in the file"):
        split(seed=1).open(path, **KEY)
    model = medpeft.apply(medpeft.remove(parts.model), "linear_probe", head="3")
    probe = medpeft.prefix(model, IMAGES)
    with pytest.raises(
        medpeft.CheckpointError, match="place: the input of '2' in the file, the input of '3'"
    ):
        probe.open(path, **KEY)


def test_training_the_rest_does_not_change_the_key_and_a_change_before_the_place_does(tmp_path):
    parts, path = split(), tmp_path / "f"
    parts.store(path, IMAGES, **KEY)
    with torch.no_grad():
        for parameter in parts.model[2:].parameters():
            parameter.add_(1.0)
    parts.open(path, **KEY)
    with torch.no_grad():
        parts.model[0].weight.add_(1.0)
    with pytest.raises(medpeft.CheckpointError, match="base:"):
        parts.open(path, **KEY)


def test_a_file_that_was_cut_off_or_altered_is_refused(tmp_path):
    parts, path, other = split(), tmp_path / "f", tmp_path / "other"
    parts.store(path, IMAGES, **KEY)
    data = path.read_bytes()
    for cut in (0, 5, 100, 4096, len(data) - 1):
        other.write_bytes(data[:cut])
        with pytest.raises(medpeft.CheckpointError):
            parts.open(other, **KEY)
    other.write_bytes(data + b"0")
    with pytest.raises(medpeft.CheckpointError, match="cut off or added to"):
        parts.open(other, **KEY)
    other.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(
        medpeft.CheckpointError, match="altered: 1 of 10 rows have another digest, the first is row 9"
    ):
        parts.open(other, **KEY)
    row = 8 * 4
    swapped = data[: -2 * row] + data[-row:] + data[-2 * row : -row]
    other.write_bytes(swapped)
    with pytest.raises(medpeft.CheckpointError, match="altered: 2 of 10 rows"):
        parts.open(other, **KEY)
    images = Augmented()
    parts.store(other, images, **KEY)  # computes these two again
    assert images.asked == [8, 9]
    for position in (12, 40, 4100):
        other.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(medpeft.CheckpointError):
            parts.open(other, **KEY)
    other.write_bytes(b"x" * 5000)
    with pytest.raises(medpeft.CheckpointError, match="no file of features"):
        parts.open(other, **KEY)
    with pytest.raises(medpeft.CheckpointError, match="cannot be read"):
        parts.open(tmp_path / "nothing", **KEY)


def test_a_disk_without_room_is_named_before_anything_is_computed(tmp_path, monkeypatch):
    parts, images = split(), Augmented()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 0, 1000))
    with pytest.raises(
        medpeft.CheckpointError, match="would take 8,512 bytes, 32 for each of 1 views of 10 images"
    ):
        parts.store(tmp_path / "f", images, **KEY)
    assert not images.asked
    assert not list(tmp_path.iterdir())


def test_features_too_large_for_their_dtype_are_refused(tmp_path):
    model = medpeft.apply(
        randomise(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))), "linear_probe", head="1"
    )
    with torch.no_grad():
        model[0].weight.mul_(1e6)
    parts = medpeft.prefix(model, IMAGES)
    with pytest.raises(medpeft.MedpeftError, match="not finite in float16: store them as bfloat16"):
        parts.store(tmp_path / "f", IMAGES, **KEY, dtype=torch.float16)
    with pytest.raises(
        medpeft.MedpeftError, match="Features are stored as float32, float16, bfloat16, not as int8"
    ):
        parts.store(tmp_path / "g", IMAGES, **KEY, dtype=torch.int8)


def test_training_from_a_file_is_training_on_images(tmp_path):
    parts = split()
    on_images = copy.deepcopy(parts.model)
    file = parts.store(tmp_path / "f", IMAGES, **KEY)
    for net, inputs in ((parts.rest, lambda: file.read(range(10))), (on_images, lambda: IMAGES)):
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            net(inputs()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(parts.model(IMAGES), on_images(IMAGES))
