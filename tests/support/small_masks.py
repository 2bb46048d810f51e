"""Small images with masks: bright discs, balls and squares on noise."""

import numpy as np
from PIL import Image


def disc(side, rng, dimensions=2):
    """An image and its mask: a disc or a ball of random place and size."""
    places = np.indices((side,) * dimensions)
    center = rng.uniform(0.3, 0.7, dimensions) * side
    away = sum((place - middle) ** 2 for place, middle in zip(places, center, strict=True))
    mask = (away < (rng.uniform(0.15, 0.25) * side) ** 2).astype(np.uint8)
    image = np.clip(rng.normal(70 + 100 * mask, 20), 0, 255).astype(np.uint8)
    return image, mask


def draw_discs(folder, count=16, side=32, value=255):
    """Folders images/ and masks/ of discs."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        image, mask = disc(side, rng)
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
        # 16 bit where the value needs them
        Image.fromarray(mask.astype(np.min_scalar_type(value)) * value).save(folder / "masks" / f"{i}.png")
    return folder


def save(array, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path)
    return path


def draw_balls(folder, count=10, side=16, axes="LPS"):
    """Folders imagesTr/ and labelsTr/ of NIfTI volumes, of voxels of 1 × 2 × 3 mm in a given orientation."""
    import nibabel

    rng = np.random.default_rng(0)
    ornt = nibabel.orientations
    for i in range(count):
        image, mask = disc(side, rng, 3)
        affine = np.diag([1.0, 2.0, 3.0, 1.0])
        affine[:3, 3] = (5, -7, 11)
        for values, place in ((image, f"imagesTr/case{i}_0000"), (mask, f"labelsTr/case{i}")):
            back = ornt.ornt_transform(ornt.axcodes2ornt("RAS"), ornt.axcodes2ornt(axes))
            file = folder / f"{place}.nii.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(values, affine).as_reoriented(back), file)
    return folder
