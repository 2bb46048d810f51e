"""Predictions as a CSV with a line an image, for the handlers of MONAI."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor


class Table:
    """What `ClassificationSaver` takes as its `saver`.

    Args:
        file: to write.
        folder: of the images, whose paths below it are written.
        columns: of the values of an image, in their order.
        first_value_names: where the first value of an image is a position among names, such as grades.
    """

    def __init__(
        self, file: str, folder: str, columns: Sequence[str], first_value_names: Sequence[str] = ()
    ) -> None:
        self.file, self.folder = Path(file), folder
        self.columns, self.first_value_names = list(columns), list(first_value_names)
        self.rows: list[list[Any]] = []

    def save_batch(self, batch_data: Tensor, meta_data: Mapping[str, Sequence[str]]) -> None:
        """Keep the values (B, C) of images, whose paths are in `filename_or_obj`."""
        for values, path in zip(batch_data.tolist(), meta_data["filename_or_obj"], strict=True):
            if self.first_value_names:
                values[0] = self.first_value_names[int(values[0])]
            self.rows.append([os.path.relpath(path, self.folder), *values])

    def finalize(self) -> None:
        """Write the file."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("w", newline="", encoding="utf-8") as opened:
            writer = csv.writer(opened)
            writer.writerow(["path", *self.columns])
            writer.writerows(self.rows)
        self.rows = []
