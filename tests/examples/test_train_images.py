"""One image file of any kind becomes pixels of 8 bits, or the message says what is wrong with it."""

import struct
import zlib

import numpy as np
import pytest
import tifffile
from pictures import RNG, grey, write
from PIL import Image
from trainer.errors import TrainerError
from trainer.files.images import decode, load
from trainer.scripts.pixels import to_uint8


def png(deep):
    """A PNG of 16-bit colour (H, W, 3), which Pillow cannot write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">2I5B", deep.shape[1], deep.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_eight_bit_grey_and_colour_come_through_unchanged(tmp_path):
    flat, colour = grey(), RNG.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    assert np.array_equal(decode(write(tmp_path / "grey.png", flat)), flat)
    assert np.array_equal(decode(write(tmp_path / "colour.png", colour)), colour)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_twelve_bits_stored_in_sixteen_use_the_whole_range(tmp_path, suffix):
    ramp = np.linspace(100, 4095, 400).reshape(20, 20).astype(np.uint16)
    read = decode(write(tmp_path / f"ramp.{suffix}", ramp))
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
    assert np.abs(decode(path) - (deep - low) * 255.0 / (high - low)).max() < error


def test_a_constant_deep_image_becomes_black(tmp_path):
    path = write(tmp_path / "flat.png", np.full((8, 8), 700, np.uint16))
    assert not decode(path).any()


def test_palettes_and_transparency_become_colour(tmp_path):
    colour = Image.fromarray(np.repeat(grey(77)[..., None], 3, axis=2))
    colour.convert("RGBA").save(tmp_path / "alpha.png")
    colour.quantize().save(tmp_path / "palette.png")
    for name in ("alpha.png", "palette.png"):
        assert np.array_equal(decode(tmp_path / name), np.asarray(colour))


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with pytest.raises(TrainerError, match=r"broken\.png could not be read as an image"):
        decode(path)


def test_a_stack_of_pages_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros((5, 8, 8), np.uint16), photometric="minisblack")
    with pytest.raises(TrainerError, match=r"stack\.tif could not be read .* it holds 5 pages"):
        decode(tmp_path / "stack.tif")


def test_planes_that_are_neither_grey_nor_colour_are_refused(tmp_path):
    with pytest.raises(TrainerError, match=r"it has the shape \(8, 8, 5, 2\); a grey or RGB image"):
        decode(np.zeros((8, 8, 5, 2), np.uint16))


def test_one_value_that_is_no_number_does_not_blacken_a_picture(tmp_path):
    ramp = np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20)
    expected = to_uint8(ramp)
    for value, shade in ((np.nan, 0), (-np.inf, 0), (np.inf, 255)):
        broken = ramp.copy()
        broken[3, 4] = value
        tifffile.imwrite(tmp_path / "float.tif", broken)
        read = decode(tmp_path / "float.tif")
        assert read[3, 4] == shade
        read[3, 4] = expected[3, 4]
        assert np.array_equal(read, expected)
    assert not to_uint8(np.full((4, 4), np.nan)).any()


# Volumes


def nifti(path, values, affine):
    nibabel = pytest.importorskip("nibabel")
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return path


@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
def test_a_volume_of_nifti_lies_as_itk_orders_it(tmp_path, suffix):
    # Values 0, 10, …: the index along z, y and x of an image whose axes run left, back and up, as ITK's do.
    z, y, x = np.indices((3, 4, 5))
    volume = (50 * z + 10 * y + x).astype(np.uint8)
    path = nifti(tmp_path / f"itk.{suffix}", volume.transpose(2, 1, 0), np.diag([-1.0, -1, 1, 1]))
    assert np.array_equal(decode(path), volume)
    turned = nifti(tmp_path / f"ras.{suffix}", volume.transpose(2, 1, 0)[::-1, ::-1], np.eye(4))
    assert np.array_equal(decode(turned), volume)


def test_a_slice_of_nifti_is_an_image_and_a_series_in_time_is_refused(tmp_path):
    flat = grey()
    assert decode(nifti(tmp_path / "slice.nii", flat[..., None], np.eye(4))).shape == (20, 20)
    with pytest.raises(TrainerError, match="one volume"):
        decode(nifti(tmp_path / "time.nii", np.zeros((4, 4, 4, 2), np.uint8), np.eye(4)))


def test_volumes_are_resized_and_do_not_mix_with_images():
    volume = np.zeros((10, 12, 14), np.uint8)
    volume[5:] = 200
    loaded = load([volume, volume[:, :, :12]], 8)
    assert loaded.pixels.shape == (2, 1, 8, 8, 8)
    assert loaded.pixels[:, 0, 0].max() < 20 < 180 < loaded.pixels[:, 0, -1].min()
    assert load([volume, volume], 16).pixels.shape == (2, 1, 10, 12, 14)
    with pytest.raises(TrainerError, match="Some of the images are volumes, and some are not"):
        load([volume, grey()], 8)
