"""A DICOM file is shown as a viewer with its own window would show it."""

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from dicoms import dicom
from pictures import RNG, grey
from small_training import read
from trainer.errors import TrainerError
from trainer.files.images import decode

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
    assert np.abs(decode(path) - expected).max() <= 0.5
    assert (decode(path) == 0).any()


def test_dicom_without_a_window_uses_the_whole_range(tmp_path):
    shown = decode(dicom(tmp_path / "mr.dcm", STORED))
    assert (shown.min(), shown.max()) == (0, 255)
    assert (np.diff(shown.ravel().astype(int)) >= 0).all()


@pytest.mark.parametrize("window", [{}, {"WindowCenter": 1000, "WindowWidth": 500}])
def test_monochrome1_is_turned_so_that_bone_is_light(tmp_path, window):
    plain = decode(dicom(tmp_path / "two.dcm", STORED, **window))
    turned = decode(dicom(tmp_path / "one.dcm", STORED, PhotometricInterpretation="MONOCHROME1", **window))
    assert np.abs((255 - plain.astype(int)) - turned).max() <= 1
    assert plain.std() > 20


def test_dicom_in_colour_stays_colour(tmp_path):
    colour = RNG.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    path = dicom(
        tmp_path / "us.dcm", colour, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0
    )
    assert np.array_equal(decode(path), colour)


def test_a_folder_of_dicom_keeps_patients_together(tmp_path):
    for i, (name, patient) in enumerate([("a", "p"), ("a", "q"), ("b", "p"), ("b", "")]):
        dicom(tmp_path / name / f"{i}.dcm", grey(), PatientID=patient)
    groups = read(tmp_path).groups
    assert groups[0] == groups[2]
    assert len(set(groups.tolist())) == 3


def test_without_pydicom_the_message_says_what_to_install(tmp_path, monkeypatch):
    path = dicom(tmp_path / "ct.dcm", grey())
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(TrainerError, match=r"ct\.dcm could not be read .* pip install pydicom"):
        decode(path)


# What public reports ran into


def test_a_palette_becomes_the_colours_that_it_stands_for():
    pydicom = pytest.importorskip("pydicom")
    path = Path(pydicom.data.get_testdata_file("examples_palette.dcm"))
    header = pydicom.dcmread(path)
    expected = pydicom.pixels.apply_color_lut(header.pixel_array, header) / 257
    found = decode(path)
    assert found.shape == (350, 800, 3)
    assert np.abs(found - expected).max() <= 0.5


def table_of(values, bits):
    pydicom = pytest.importorskip("pydicom")
    table = pydicom.Dataset()
    table.add_new(0x00283002, "US", [len(values), 0, bits])
    table.add_new(0x00283006, "US", values)
    return pydicom.Sequence([table])


def test_a_voi_lut_sequence_is_applied(tmp_path):
    pixels = (np.arange(400) % 256).astype(np.uint16).reshape(20, 20)
    falling = [255 - i for i in range(256)]
    path = dicom(tmp_path / "lut.dcm", pixels, VOILUTSequence=table_of(falling, 8))
    assert decode(path).ravel()[:3].tolist() == [255, 254, 253]
    # Beside a window the table has its say, and its bits are its range.
    more = {"WindowCenter": 10, "WindowWidth": 4}
    path = dicom(
        tmp_path / "wide.dcm", pixels, VOILUTSequence=table_of([16 * i for i in falling], 12), **more
    )
    assert np.abs(decode(path) - falling[0] * np.array(falling)[pixels] * 16 / 4095).max() <= 0.5


@pytest.mark.parametrize("value", [None, ""])
def test_empty_window_tags_are_no_window(tmp_path, value):
    path = dicom(tmp_path / "empty.dcm", STORED, WindowCenter=value, WindowWidth=value)
    assert np.array_equal(decode(path), decode(dicom(tmp_path / "none.dcm", STORED)))


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_takes_no_part_of_the_range_and_is_black(tmp_path, kind):
    pixels = np.linspace(0, 1000, 400).reshape(20, 20).astype(np.int16)
    inside = decode(dicom(tmp_path / "whole.dcm", pixels[:, :10], PhotometricInterpretation=kind))
    pixels[:, 10:] = -2000
    path = dicom(tmp_path / "padded.dcm", pixels, PixelPaddingValue=-2000, PhotometricInterpretation=kind)
    assert not decode(path)[:, 10:].any()
    assert np.array_equal(decode(path)[:, :10], inside)
    pixels[:, 15:] = -1990
    path = dicom(tmp_path / "range.dcm", pixels, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1990)
    assert not decode(path)[:, 10:].any()


def test_eight_bits_without_a_window_stay_as_they_are(tmp_path):
    pixels = RNG.integers(60, 90, (20, 20), dtype=np.uint8)
    assert np.array_equal(decode(dicom(tmp_path / "us.dcm", pixels)), pixels)


def test_several_frames_are_a_volume(tmp_path):
    frames = RNG.integers(0, 256, (4, 8, 10), dtype=np.uint8)
    assert np.array_equal(decode(dicom(tmp_path / "cine.dcm", frames, NumberOfFrames=4)), frames)


def test_a_folder_of_one_series_is_a_volume_in_the_order_of_its_places(tmp_path):
    volume = RNG.integers(0, 256, (5, 8, 10), dtype=np.uint8)
    for name in ("a", "b"):
        for number, place in enumerate([3, 0, 4, 1, 2]):
            dicom(
                tmp_path / name / "case" / f"IM{number}",
                volume[place],
                SeriesInstanceUID="1.2.3",
                InstanceNumber=number,
                ImagePositionPatient=[0, 0, -2.5 * (4 - place)],
                ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
                PatientID=name,
            )
    assert np.array_equal(decode(tmp_path / "a" / "case"), volume)
    images = read(tmp_path, volumes=True)
    assert images.pixels.shape == (2, 1, 5, 8, 10)
    assert images.names == ["a/case", "b/case"]
    # The patients differ, and copies are one group all the same.
    assert len(set(images.groups.tolist())) == 1
    assert len(read(tmp_path)) == 10
    dicom(tmp_path / "a" / "case" / "other", volume[0], SeriesInstanceUID="1.2.4")
    with pytest.raises(TrainerError, match="DICOM files of 2 series"):
        decode(tmp_path / "a" / "case")


def test_files_without_a_suffix_are_read_beside_others(tmp_path):
    for name in ("a", "b"):
        for i, own in enumerate(("X.dcm", "IM0001", "1.2.840.113619.5")):
            dicom(tmp_path / name / own, grey(50 + 9 * i) + RNG.integers(0, 9, (20, 20), np.uint8))
        (tmp_path / name / "README").write_text("no image")
    images = read(tmp_path)
    assert len(images) == 6
    assert images.notes[0] == "a: 1 files are no images and are passed over: 1 no suffix"


# Against pydicom itself, on the files with which it is tested


def shown_by_pydicom(header):
    """A grey file as pydicom windows it, in shares of the range that its window or table has."""
    pydicom = pytest.importorskip("pydicom")
    values = pydicom.pixels.apply_modality_lut(header.pixel_array, header)
    shown = pydicom.pixels.apply_voi_lut(values, header).astype(np.float64)
    if "WindowCenter" in header and header.WindowCenter is not None:
        low, high = pydicom.pixels.apply_windowing(np.array([-1e9, 1e9]), header)
    elif header.BitsStored == 8 and shown.min() >= 0:
        low, high = 0, 255
    else:
        low, high = shown.min(), shown.max()
    share = (shown - low) / max(high - low, 1e-12)
    return 255 * (1 - share if header.PhotometricInterpretation == "MONOCHROME1" else share)


def grey_files():
    """The files of pydicom's own tests that it can decode here, without the codecs that few have."""
    pydicom = pytest.importorskip("pydicom")
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in sorted((Path(pydicom.__file__).parent / "data" / "test_files").glob("*.dcm")):
            try:
                header = pydicom.dcmread(path)
                if header.PhotometricInterpretation.startswith("MONOCHROME") and header.pixel_array.size:
                    found.append(path)
            # Some are damaged on purpose, others hold no pixels.
            except Exception:
                continue
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_grey_pictures_equal_what_pydicom_shows():
    pydicom = pytest.importorskip("pydicom")
    files = grey_files()
    assert len(files) >= 12
    for path in files:
        found = decode(path)
        assert np.abs(found - shown_by_pydicom(pydicom.dcmread(path))).max() <= 0.51, path.name
        assert found.std() > 1, path.name
