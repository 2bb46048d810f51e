"""One image file of any kind becomes pixels of 8 bits, or the message says what is wrong with it."""

import struct
import zlib

import numpy as np
import pytest
import tifffile
from pictures import RNG, grey, write
from PIL import Image
from trainer.errors import TrainerError
from trainer.images import read_image


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
