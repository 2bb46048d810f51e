"""Write the trainer's default volumes as NIfTI: grey and white matter, two tasks of one structure each.

    python benchmarks/brain_masks.py brain
    python examples/train.py --task segment --data brain/grey.csv …

A network that was trained on the one can be adapted to the other (docs/segmentation.md). Both tables have the
same images in the same order, and so the same split for one seed. Needs nilearn and nibabel (extra `brain`).
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from trainer.data.brain import brain_rows

VALUES = {"grey": 1, "white": 2}  # in the masks of the default volumes


def main() -> None:
    """Write into the folder that the command line names."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("folder", type=Path, help="for images, masks and tables")
    write(parser.parse_args().folder)


def write(folder: Path) -> None:
    """Write images, and for each tissue its masks and a table, whose patient is the place in the brain."""
    for name in ("images", *VALUES):
        (folder / name).mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[tuple[str, str, str]]] = {name: [] for name in VALUES}
    for block, name, masks, place in brain_rows().table.itertuples(index=False):
        file = f"{name.replace(' ', '-')}.nii"
        save(block, folder / "images" / file)
        for tissue, value in VALUES.items():
            save((masks[0] == value).astype(np.uint8), folder / tissue / file)
            tables[tissue].append((f"images/{file}", f"{tissue}/{file}", place))
    for tissue, rows in tables.items():
        table = pd.DataFrame(rows, columns=["path", "mask", "patient"])
        table.to_csv(folder / f"{tissue}.csv", index=False)


def save(values: npt.NDArray[Any], path: Path) -> None:
    """Write a block or its mask, of voxels of 1 mm; both have the same axes, whatever these are called."""
    import nibabel  # only here, so that what else is in this file needs no extra

    image = nibabel.Nifti1Image(values, np.eye(4))  # type: ignore[no-untyped-call]  # nibabel's
    nibabel.save(image, path)


if __name__ == "__main__":
    main()
