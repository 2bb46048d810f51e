"""The reference trainer reads images of every kind that its help names, or says what is wrong."""

import csv
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from trainer.errors import TrainerError
from trainer.images import read_image
from trainer.sources import read_data
from trainer.split import split
from trainer.tissue import PATCH, patch_corners, tissue_patches

BUSI = Path(__file__).resolve().parents[2] / "shared" / "data" / "busi"
RNG = np.random.default_rng(0)


def grey(value=None, side=20):
    if value is not None:
        return np.full((side, side), value, np.uint8)
    return RNG.integers(0, 256, (side, side), dtype=np.uint8)


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for name in ("benign", "malignant"):
        for i in range(4):
            write(tmp_path / "images" / name / f"{i}.png", grey())
    return tmp_path / "images"


@pytest.fixture
def table(folder):
    """Writes a CSV beside the images and gives its path."""

    def write_table(columns, rows):
        with (folder / "table.csv").open("w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
        return folder / "table.csv"

    return write_table


def medmnist(path, shape=(28, 28), classes=3, **changed):
    arrays = {}
    for part, count in (("train", 12), ("val", 6), ("test", 9)):
        arrays[f"{part}_images"] = RNG.integers(0, 256, (count, *shape), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(count) % classes)[:, None]
    np.savez(path, **{k: v for k, v in {**arrays, **changed}.items() if v is not None})
    return path


def png(deep):
    """A PNG of 16-bit colour (H, W, 3), which Pillow cannot write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">2I5B", deep.shape[1], deep.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


# Single images


def test_eight_bit_grey_and_colour_come_through_unchanged(tmp_path):
    flat, colour = grey(), RNG.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    assert np.array_equal(read_image(write(tmp_path / "grey.png", flat)), flat)
    assert np.array_equal(read_image(write(tmp_path / "colour.png", colour)), colour)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_twelve_bits_stored_in_sixteen_use_the_whole_range(tmp_path, suffix):
    ramp = np.linspace(100, 4095, 400).reshape(20, 20).astype(np.uint16)
    read = read_image(write(tmp_path / f"ramp.{suffix}", ramp))
    assert (read.dtype, read.min(), read.max()) == (np.uint8, 0, 255)
    assert (np.diff(read.ravel().astype(int)) >= 0).all()


@pytest.mark.parametrize(("suffix", "error"), [("png", 17), ("tif", 0.51)])
def test_twelve_bits_of_colour_stored_in_sixteen_use_the_whole_range(tmp_path, suffix, error):
    deep, path = RNG.integers(0, 4096, (20, 20, 3), dtype=np.uint16), tmp_path / f"deep.{suffix}"
    if suffix == "png":
        path.write_bytes(png(deep))
    else:
        tifffile.imwrite(path, deep, photometric="rgb")
    low, high = int(deep.min()), int(deep.max())
    assert np.abs(read_image(path) - (deep - low) * 255.0 / (high - low)).max() < error


def test_a_constant_deep_image_becomes_black(tmp_path):
    path = write(tmp_path / "flat.png", np.full((8, 8), 700, np.uint16))
    assert not read_image(path).any()


def test_palettes_and_transparency_become_colour(tmp_path):
    colour = Image.fromarray(np.repeat(grey(77)[..., None], 3, axis=2))
    colour.convert("RGBA").save(tmp_path / "alpha.png")
    colour.quantize().save(tmp_path / "palette.png")
    for name in ("alpha.png", "palette.png"):
        assert np.array_equal(read_image(tmp_path / name), np.asarray(colour))


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with pytest.raises(TrainerError, match=r"broken\.png could not be read as an image"):
        read_image(path)


@pytest.mark.parametrize("pages", [(5, 8, 8), (5, 8, 8, 2)])
def test_a_stack_of_slices_is_refused(tmp_path, pages):
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros(pages, np.uint16), photometric="minisblack")
    with pytest.raises(TrainerError, match=r"stack\.tif could not be read .* pages or slices"):
        read_image(tmp_path / "stack.tif")


def test_planes_that_are_neither_grey_nor_colour_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "many.tif", np.zeros((8, 8, 5), np.uint16), planarconfig="contig")
    with pytest.raises(TrainerError, match=r"many\.tif has the shape \(8, 8, 5\)"):
        read_image(tmp_path / "many.tif")


# Folders


def test_a_folder_gives_one_class_a_subfolder(folder):
    images = read_data(folder, 16)
    assert images.classes == ["benign", "malignant"]
    assert images.labels.tolist() == [0] * 4 + [1] * 4
    assert images.pixels.shape == (8, 1, 16, 16)
    assert images.pixels.dtype == torch.uint8
    assert images.parts is None


def test_one_colour_image_makes_all_colour(folder):
    write(folder / "benign" / "colour.jpg", np.zeros((30, 20, 3), np.uint8))
    images = read_data(folder, 16)
    assert images.pixels.shape == (9, 3, 16, 16)
    assert torch.equal(images.pixels[0, 0], images.pixels[0, 2])


def test_pixels_keep_their_image(folder):
    write(folder / "benign" / "0.png", grey(200))
    assert (read_data(folder, 16).pixels[0] == 200).all()


def test_copies_of_an_image_share_a_group(folder):
    copied = read_image(folder / "benign" / "0.png")
    write(folder / "malignant" / "copy.bmp", copied)
    images = read_data(folder, 16)
    assert len(set(images.groups.tolist())) == 8
    assert images.groups[0] == images.groups[-1]


def test_a_folder_that_is_split_already_keeps_its_split(tmp_path):
    for part in ("train", "valid", "test"):
        for name in ("a", "b"):
            write(tmp_path / part / name / "image.png", grey())
    images = read_data(tmp_path, 16)
    assert images.classes == ["a", "b"]
    assert sorted(images.parts.tolist()) == ["test", "test", "train", "train", "val", "val"]


def test_an_empty_folder_says_what_to_put_there(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(TrainerError, match=r"no images in its 1 subfolders. Put the images of each"):
        read_data(tmp_path, 16)


def test_a_single_class_is_refused(tmp_path):
    write(tmp_path / "only" / "image.png", grey())
    with pytest.raises(TrainerError, match=r"only the class 'only'. At least two"):
        read_data(tmp_path, 16)


def test_missing_data_and_unknown_kinds_are_named(tmp_path):
    with pytest.raises(TrainerError, match=r"nowhere does not exist\. Give a folder"):
        read_data(tmp_path / "nowhere", 16)
    (tmp_path / "data.xlsx").touch()
    with pytest.raises(TrainerError, match=r"is a \.xlsx file\. Give a folder"):
        read_data(tmp_path / "data.xlsx", 16)


# Tables


def test_a_table_names_images_labels_patients_and_parts(table):
    rows = [
        ["benign/0.png", "10", "p1", "train"],
        ["benign/1.png", "2", "p1", "val"],
        ["malignant/0.png", "10", "p2", "test"],
    ]
    images = read_data(table(["path", "label", "patient", "split"], rows), 16)
    assert images.classes == ["2", "10"]
    assert images.labels.tolist() == [1, 0, 1]
    assert images.parts.tolist() == ["train", "val", "test"]
    assert images.groups[0] == images.groups[1] != images.groups[2]


def test_the_patient_column_may_have_another_name(table):
    rows = [["benign/0.png", "a", "7"], ["benign/1.png", "b", "7"]]
    file = table(["path", "label", "case"], rows)
    assert len(set(read_data(file, 16).groups.tolist())) == 2
    assert len(set(read_data(file, 16, "case").groups.tolist())) == 1


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        (["file", "label"], [["x", "a"]], "has the columns file, label, and no 'path'"),
        (["path", "label"], [], "no rows below its header"),
        (["path", "label"], [["benign/0.png", ""]], "1 rows without a 'label', the first on line 2"),
        (["path", "label"], [["gone.png", "a"]], "1 images that do not exist, the first is gone.png"),
        (
            ["path", "label", "split"],
            [["benign/0.png", "a", "hold-out"]],
            "the split 'hold-out'. Use train, val and test",
        ),
    ],
)
def test_a_wrong_table_says_what_is_wrong(table, columns, rows, message):
    with pytest.raises(TrainerError, match=message):
        read_data(table(columns, rows), 16)


def test_a_patient_column_that_is_asked_for_must_exist(table):
    file = table(["path", "label"], [["benign/0.png", "a"]])
    with pytest.raises(TrainerError, match=r"no 'case'.*--patient-column"):
        read_data(file, 16, "case")


# Broken images


@pytest.fixture
def broken(folder):
    """Two files of eight that are no images."""
    for name in ("benign/1.png", "malignant/3.png"):
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return folder


def test_all_broken_images_are_named_and_counted(broken):
    with pytest.raises(TrainerError) as raised:
        read_data(broken, 16)
    message = str(raised.value)
    assert message.startswith("2 of 8 images cannot be read:")
    for expected in ("benign/1.png", "malignant/3.png", "Leave them out with --skip-broken."):
        assert expected in message


def test_broken_images_are_left_out_only_when_asked(broken, table):
    images = read_data(broken, 16, skip_broken=True)
    assert images.labels.tolist() == [0] * 3 + [1] * 3
    assert images.names == [
        f"{name}.png" for name in ("benign/0", "benign/2", "benign/3", *(f"malignant/{i}" for i in range(3)))
    ]
    assert len(images.broken) == 2
    assert len(images.groups) == len(images.pixels) == 6
    rows = [["benign/0.png", "a", "f"], ["benign/1.png", "b", "m"], ["gone.png", "b", "m"], ["benign/2.png", "b", "d"]]
    images = read_data(table(["path", "label", "sex"], rows), 16, group_column="sex", skip_broken=True)
    assert (images.names, images.subgroups) == (["benign/0.png", "benign/2.png"], ["f", "d"])


def test_nothing_but_broken_images_is_an_error_even_when_skipping(folder):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(TrainerError, match="8 of 8 images cannot be read"):
        read_data(folder, 16, skip_broken=True)


# DICOM


def dicom(path, pixels, **header):
    """Writes one file; the header's names are DICOM's keywords."""
    pydicom = pytest.importorskip("pydicom")
    found = pydicom.Dataset()
    found.file_meta = pydicom.dataset.FileMetaDataset()
    found.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    found.file_meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    found.file_meta.MediaStorageSOPInstanceUID = found.SOPInstanceUID = pydicom.uid.generate_uid()
    found.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    bits = 8 * pixels.dtype.itemsize
    plain = {
        "Rows": pixels.shape[-2] if pixels.ndim < 3 or pixels.shape[-1] != 3 else pixels.shape[0],
        "Columns": pixels.shape[-1] if pixels.ndim < 3 or pixels.shape[-1] != 3 else pixels.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
    }
    for name, value in {**plain, **header}.items():
        setattr(found, name, value)
    found.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    found.save_as(path, enforce_file_format=True)
    return path


# Hounsfield units from −1024 on, stored as 0, 1, 2, …: the range of a CT.
STORED = np.arange(0, 2048, 2048 // 400, dtype=np.uint16)[:400].reshape(20, 20)


@pytest.mark.parametrize(
    ("function", "share"),
    [
        (None, lambda x: ((x - 39.5) / 399 + 0.5).clip(0, 1)),
        ("LINEAR_EXACT", lambda x: ((x - 40) / 400 + 0.5).clip(0, 1)),
        ("SIGMOID", lambda x: 1 / (1 + np.exp(-4 * (x - 40) / 400))),
    ],
)
def test_a_dicom_file_is_rescaled_and_windowed(tmp_path, function, share):
    more = {"VOILUTFunction": function} if function else {}
    path = dicom(
        tmp_path / "ct.dcm", STORED, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=[40, 0], WindowWidth=[400, 9], **more
    )
    expected = 255 * share(STORED.astype(float) - 1024)
    assert np.abs(read_image(path) - expected).max() <= 0.5
    assert (read_image(path) == 0).any()


def test_dicom_without_a_window_uses_the_whole_range(tmp_path):
    read = read_image(dicom(tmp_path / "mr.dcm", STORED))
    assert (read.min(), read.max()) == (0, 255)
    assert (np.diff(read.ravel().astype(int)) >= 0).all()


@pytest.mark.parametrize("window", [{}, {"WindowCenter": 1000, "WindowWidth": 500}])
def test_monochrome1_is_turned_so_that_bone_is_light(tmp_path, window):
    plain = read_image(dicom(tmp_path / "two.dcm", STORED, **window))
    turned = read_image(dicom(tmp_path / "one.dcm", STORED, PhotometricInterpretation="MONOCHROME1", **window))
    assert np.abs((255 - plain.astype(int)) - turned).max() <= 1
    assert plain.std() > 20


def test_dicom_in_colour_stays_colour(tmp_path):
    colour = RNG.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    path = dicom(tmp_path / "us.dcm", colour, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0)
    assert np.array_equal(read_image(path), colour)


def test_dicom_of_several_frames_is_refused(tmp_path):
    path = dicom(tmp_path / "cine.dcm", np.zeros((4, 8, 8), np.uint8), NumberOfFrames=4)
    with pytest.raises(
        TrainerError, match=r"cine\.dcm could not be read .* it holds 4 frames; store each in a file of its own"
    ):
        read_image(path)


def test_a_folder_of_dicom_keeps_patients_together(tmp_path):
    for i, (name, patient) in enumerate([("a", "p"), ("a", "q"), ("b", "p"), ("b", "")]):
        dicom(tmp_path / name / f"{i}.dcm", grey(), PatientID=patient)
    groups = read_data(tmp_path, 16).groups
    assert groups[0] == groups[2]
    assert len(set(groups.tolist())) == 3


def test_without_pydicom_the_message_says_what_to_install(tmp_path, monkeypatch):
    path = dicom(tmp_path / "ct.dcm", grey())
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(TrainerError, match=r"ct\.dcm could not be read .* pip install pydicom"):
        read_image(path)


# Hugging Face


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
    with pytest.raises(TrainerError, match=r"--data hf:.*nowhere could not be loaded: .* Give a name on the hub"):
        read_data(f"hf:{tmp_path / 'nowhere'}", 20)


# MedMNIST


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


# The default data


def test_half_of_the_tissue_patches_are_stained():
    images = tissue_patches()
    assert images.pixels.shape == (576, 1, PATCH, PATCH)
    assert images.labels.mean() == 0.5


def test_tissue_patches_have_equal_brightness():
    means = tissue_patches().pixels.float().mean((1, 2, 3))
    assert means.std() < 3


def test_tissue_patches_of_different_parts_share_no_pixel():
    images = tissue_patches()
    corners = np.array(patch_corners(512))
    for seed in range(3):
        painted = np.zeros((512, 512), int)
        for bit, rows in enumerate(split(images, seed).values()):
            for y, x in corners[rows]:
                painted[y : y + PATCH, x : x + PATCH] |= 1 << bit
        assert set(np.unique(painted)) == {1, 2, 4}


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_every_part_of_the_tissue_has_both_classes(part):
    images = tissue_patches()
    assert 0.3 < images.labels[split(images, seed=0)[part]].mean() < 0.7


@pytest.mark.skipif(not BUSI.exists(), reason="needs ../shared/data/busi")
def test_breast_ultrasound_is_read_with_its_one_pair_of_copies():
    images = read_data(BUSI, 32)
    assert images.classes == ["benign", "malignant", "normal"]
    assert np.bincount(images.labels).tolist() == [437, 210, 133]
    assert len(set(images.groups.tolist())) == 779
