"""Volumes in NIfTI files: read as ITK orders their voxels, and masks written back where they came from."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..scripts.volumes import VolumeReader, slice_or_volume


def read_nifti(path: Path) -> npt.NDArray[np.generic]:
    """Read a volume (Z, Y, X): from the feet up, each slice seen from there; one of one slice as (Y, X).

    Raises:
        ImportError: nibabel is not installed.
        ValueError: it holds no volume.
    """
    reader = VolumeReader(as_closest_canonical=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values, _ = reader.get_data(reader.read(path))
    # (X, Y, Z) of right, front, top → (Z, Y, X)
    volume = np.asarray(values).transpose(2, 1, 0)[:, ::-1, ::-1]
    return np.ascontiguousarray(slice_or_volume(volume))


def write_nifti(mask: npt.NDArray[Any], like: Path, path: Path) -> None:
    """Write a mask (Z, Y, X), ordered as `read_nifti` orders it, on the voxels of the file that was read."""
    nibabel = _nibabel()
    image = nibabel.load(like)
    # (Z, Y, X) or (Y, X) → (X, Y, Z) of right, front, top
    canonical = mask.reshape(-1, *mask.shape[-2:])[:, ::-1, ::-1].transpose(2, 1, 0)
    orientation = nibabel.orientations.io_orientation(image.affine)
    usual = np.array([[axis, 1] for axis in range(3)])
    back = nibabel.orientations.ornt_transform(usual, orientation)
    values = nibabel.orientations.apply_orientation(canonical, back)
    header = image.header.copy()
    header.set_data_dtype(values.dtype)
    # How bright a viewer shows the values of the image.
    header["cal_min"] = header["cal_max"] = 0
    nibabel.save(nibabel.Nifti1Image(values, image.affine, header), path)


def canonical_affine(path: Path) -> npt.NDArray[np.float64]:
    """Give where a file's voxels lie, once its axes are ordered as `read_nifti` orders them."""
    nibabel = _nibabel()
    affine: npt.NDArray[np.float64] = nibabel.as_closest_canonical(nibabel.load(path)).affine
    return affine


def voxel_sides(path: Path) -> tuple[float, ...]:
    """Give the sides of a voxel in mm, of (Z, Y, X)."""
    sides = np.linalg.norm(canonical_affine(path)[:3, :3], axis=0)
    return tuple(float(side) for side in sides[::-1])


def _nibabel() -> Any:
    # Its stubs do not know that an image of a NIfTI file has an affine.
    import nibabel

    return nibabel
