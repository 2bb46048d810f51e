"""A bundle reads a file as the trainer does: the same input of the network, or refused in the same words."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from monai.bundle import ConfigParser
from pictures import grey, write
from PIL import Image
from trainer.data.batches import Preprocessing
from trainer.errors import TrainerError
from trainer.exports.inference import reading
from trainer.files.images import load

# One of the readers that MONAI registers, which no bundle uses.
pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader")
TURNED = np.array([[0, 0.8, 0.2, 3], [-1.1, 0, 0, 5], [0, 0.1, 1.9, -4], [0, 0, 0, 1]])


def preprocessing(stored):
    return Preprocessing(stored, 8, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4])


def input_of_trainer(path, stored):
    loaded = load([path], 8, stored=stored)
    return preprocessing(stored)(loaded.pixels)[0]


def input_of_bundle(path, stored):
    """What the transforms of inference.json make of a file, by the `scripts` that the bundle takes along."""
    trained = SimpleNamespace(preprocessing=preprocessing(stored), takes_volumes=len(stored) == 3)
    written = json.dumps({"preprocessing": {"_target_": "Compose", "transforms": reading(trained)}})
    parser = ConfigParser(json.loads(written.replace('"scripts.', '"trainer.scripts.')))
    return parser.get_parsed_content("preprocessing")({"image": str(path)})["image"].as_tensor()


def refusal_of_bundle(path, stored):
    """What MONAI's error says, and those that led to it."""
    with pytest.raises(RuntimeError) as refused:
        input_of_bundle(path, stored)
    said, error = [], refused.value
    while error is not None:
        said.append(str(error))
        error = error.__cause__
    return "\n".join(said)


def nifti(path, values, affine=None):
    nibabel = pytest.importorskip("nibabel")
    nibabel.save(nibabel.Nifti1Image(values, np.diag([-1.0, -1, 2, 1]) if affine is None else affine), path)
    return path


def draws(*shape):
    return np.random.default_rng(0).integers(0, 4000, shape).astype(np.int16)


@pytest.mark.parametrize("affine", [None, TURNED])
@pytest.mark.parametrize("values", [draws(9, 11, 7), draws(9, 11, 7).astype(">f4"), draws(9, 11, 2) // 16])
def test_a_volume_becomes_the_same_input(tmp_path, values, affine):
    file = nifti(tmp_path / "volume.nii.gz", values, affine)
    found, expected = input_of_bundle(file, (10, 6, 9)), input_of_trainer(file, (10, 6, 9))
    assert found.shape == expected.shape == (3, 8, 8, 8)
    assert np.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("values", [grey(), grey().astype(np.uint16) * 90, np.stack([grey()] * 3, -1)])
def test_a_picture_becomes_the_same_input(tmp_path, values):
    file = write(tmp_path / "picture.png", values)
    assert np.allclose(input_of_bundle(file, (10, 6)), input_of_trainer(file, (10, 6)), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ((9, 11, 7, 3), "one volume"),
        ((9, 11, 7, 1), "one volume"),
        ((9, 11), "one volume"),
        ((9, 11, 1), "is an image, and the network takes a volume"),
    ],
)
def test_what_holds_more_or_less_than_a_volume_is_refused_in_the_same_words(tmp_path, shape, told):
    file = nifti(tmp_path / "file.nii", draws(*shape))
    with pytest.raises(TrainerError, match=told):
        input_of_trainer(file, (8, 8, 8))
    said = refusal_of_bundle(file, (8, 8, 8))
    assert told in said
    assert "file.nii" in said


def test_a_volume_for_a_network_of_pictures_is_refused_by_its_name(tmp_path):
    file = nifti(tmp_path / "file.nii", draws(9, 11, 7))
    with pytest.raises(TrainerError, match=r"file.nii .* it is a volume, and the network takes an image"):
        input_of_trainer(file, (8, 8))


def test_a_picture_that_the_trainer_refuses_is_read_by_no_other_reader_of_monai(tmp_path):
    pages = [Image.fromarray(grey()), Image.fromarray(grey())]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    (tmp_path / "damaged.png").write_bytes(b"no picture")
    assert "pages.tif could not be read as an image: it holds 2 pages" in refusal_of_bundle(
        tmp_path / "pages.tif", (8, 8)
    )
    assert "damaged.png could not be read as an image" in refusal_of_bundle(tmp_path / "damaged.png", (8, 8))
