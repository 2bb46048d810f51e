"""The figures show what was measured, and their labels do not overlap."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from trainer.figure import draw_training
from trainer.reliability import draw_reliability


def test_the_reliability_diagram_shows_how_often_each_confidence_is_right(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    original = Axes.bar
    monkeypatch.setattr(
        Axes, "bar", lambda self, *args, **more: drawn.append(args) or original(self, *args, **more)
    )
    probabilities = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.4, 0.6], [0.4, 0.6]])
    draw_reliability({"one": probabilities}, torch.tensor([0, 1, 1, 1]), tmp_path / "figure.png")
    shares, counts = drawn[0][1], drawn[1][1]
    assert {i: (shares[i], counts[i]) for i in np.flatnonzero(counts)} == {8: (1.0, 2), 14: (0.5, 2)}
    assert np.asarray(Image.open(tmp_path / "figure.png").convert("L")).std() > 20


def test_labels_of_many_long_classes_do_not_overlap(tmp_path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [f"a very long class name number {i}" for i in range(9)]
    record = {"train_loss": 1.0, "val_loss": 1.1, "val_macro_f1": 0.4}
    drawn = []
    original = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, path: (drawn.append(self), original(self, path)))
        counts = np.full((9, 9), 1234).tolist()
        draw_training([record] * 30, 7, counts, names, "title", tmp_path / "figure.png")
    axes = drawn[0].axes[2]
    renderer = FigureCanvasAgg(drawn[0]).get_renderer()
    for labels in (axes.texts[:9], axes.get_yticklabels()):
        boxes = [label.get_window_extent(renderer) for label in labels]
        assert not any(a.overlaps(b) for a, b in pairwise(boxes))
    right = max(text.get_window_extent(renderer).x1 for text in axes.texts)
    assert right < drawn[0].bbox.x1
