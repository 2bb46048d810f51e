"""A DICOM file is shown as a viewer with its own window would show it."""

import sys

import numpy as np
import pytest
from pictures import RNG, grey
from trainer.errors import TrainerError
from trainer.images import read_image
from trainer.sources import read_data


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
        tmp_path / "ct.dcm",
        STORED,
        RescaleSlope=1,
        RescaleIntercept=-1024,
        WindowCenter=[40, 0],
        WindowWidth=[400, 9],
        **more,
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
    turned = read_image(
        dicom(tmp_path / "one.dcm", STORED, PhotometricInterpretation="MONOCHROME1", **window)
    )
    assert np.abs((255 - plain.astype(int)) - turned).max() <= 1
    assert plain.std() > 20


def test_dicom_in_colour_stays_colour(tmp_path):
    colour = RNG.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    path = dicom(
        tmp_path / "us.dcm", colour, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0
    )
    assert np.array_equal(read_image(path), colour)


def test_dicom_of_several_frames_is_refused(tmp_path):
    path = dicom(tmp_path / "cine.dcm", np.zeros((4, 8, 8), np.uint8), NumberOfFrames=4)
    with pytest.raises(
        TrainerError,
        match=r"cine\.dcm could not be read .* it holds 4 frames; store each in a file of its own",
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
