"""The figures show what was measured, and their labels do not overlap."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from trainer.figures import draw_reliability, draw_roc, draw_training
from trainer.tasks.classify import Classify


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (figures.append(self), original(self, path)))
    return figures


def test_the_reliability_diagram_shows_how_often_each_confidence_is_right(tmp_path, drawn):
    probabilities = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.4, 0.6], [0.4, 0.6]])
    draw_reliability({"one": probabilities}, torch.tensor([0, 1, 1, 1]), tmp_path / "figure.png")
    upper, lower = drawn[0].axes
    line = upper.get_lines()[-1]
    assert np.allclose(line.get_xydata(), [[0.6, 1.0], [0.95, 0.5]])
    heights = [bar.get_height() for bar in lower.patches]
    assert {i: heights[i] for i in np.flatnonzero(heights)} in ({8: 2, 14: 2}, {9: 2, 14: 2})
    assert np.asarray(Image.open(tmp_path / "figure.png").convert("L")).std() > 15


def test_the_roc_curves_are_those_of_the_classes_that_have_one(tmp_path, drawn):
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(40, 3, generator=generator).softmax(1)
    draw_roc(probabilities, torch.arange(40) % 2, ["a", "b", "c"], tmp_path / "figure.png")
    names = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert [name.split()[0] for name in names] == ["a", "b"]
    draw_roc(probabilities[:, :2], torch.arange(40) % 2, ["a", "b"], tmp_path / "figure.png")
    assert [text.get_text()[0] for text in drawn[1].axes[0].get_legend().get_texts()] == ["b"]


def test_labels_of_many_long_classes_do_not_overlap(tmp_path, drawn):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    names = [f"a very long class name number {i}" for i in range(9)]
    record = {"train_loss": 1.0, "val_loss": 1.1, "val_macro_f1": 0.4}
    counts = torch.full((9, 9), 1234)
    metrics = {"history": [record] * 30, "best_epoch": 7}
    draw_training(metrics, Classify(names), counts, "title", tmp_path / "figure.png")
    axes = drawn[0].axes[2]
    assert {text.get_text() for text in axes.texts} == {"1234"}
    renderer = FigureCanvasAgg(drawn[0]).get_renderer()
    for labels in (axes.texts[:9], axes.get_yticklabels()):
        boxes = [label.get_window_extent(renderer) for label in labels]
        assert not any(a.overlaps(b) for a, b in pairwise(boxes))
    right = max(text.get_window_extent(renderer).x1 for text in axes.texts)
    assert right < drawn[0].bbox.x1
