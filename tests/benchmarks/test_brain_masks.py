"""The default volumes as files: two tasks of one structure each, on the same images."""

import brain_masks
import numpy as np
import pandas as pd
import pytest
import torch
from small_training import checked
from trainer.data.rows import Rows
from trainer.data.sources import read_data


def test_each_tissue_is_a_task_of_its_own_on_the_same_images(tmp_path, monkeypatch):
    pytest.importorskip("nibabel")
    draw = np.random.default_rng(0)
    rows = []
    for place in ("0 80 0", "0 80 40"):
        for side in ("one", "other"):
            block = draw.integers(0, 256, (8, 8, 8), dtype=np.uint8)
            labels = draw.integers(0, 3, (8, 8, 8), dtype=np.uint8)
            rows.append((block, f"{place} {side} side", [labels], place))
    table = pd.DataFrame(rows, columns=["item", "name", "mask", "patient"])
    monkeypatch.setattr(brain_masks, "brain_rows", lambda: Rows(table))
    brain_masks.write(tmp_path)
    grey, white = [
        read_data(checked(task="segment", data=str(tmp_path / file), image_size=8))
        for file in ("grey.csv", "white.csv")
    ]
    assert grey.names == white.names
    assert np.array_equal(grey.groups, white.groups)
    assert len(set(grey.groups)) == 2
    assert torch.equal(grey.pixels, white.pixels)
    masks = np.stack([labels for _, _, [labels], _ in rows])
    assert int(grey.targets.labels.sum()) == int((masks == 1).sum())
    assert int(white.targets.labels.sum()) == int((masks == 2).sum())
    assert not (grey.targets.labels & white.targets.labels).any()
