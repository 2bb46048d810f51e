"""The figures show what was measured, and their labels do not overlap."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import roc_auc_score
from trainer.judging.thresholds import measures_at
from trainer.pictures.figures import draw_reliability, draw_training
from trainer.pictures.figures_curves import Curve, draw_curves
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


def test_the_curves_are_those_of_the_classes_that_have_one_and_show_the_operating_point(tmp_path, drawn):
    generator = np.random.default_rng(0)
    positive, scores = np.arange(40) % 2 == 0, generator.random(40)
    point = {
        "threshold": 0.5,
        **{name: float(v[0]) for name, v in measures_at(scores, positive, 0.5).items()},
    }
    curves = {
        "one": Curve(scores, positive, point),
        "none": Curve(scores, positive & False, {}),
        "no point": Curve(scores, ~positive, {}),
    }
    draw_curves(curves, "title", tmp_path / "figure.png")
    left, right = drawn[0].axes
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert labels[0] == f"one, area {roc_auc_score(positive, scores):.3f}"
    assert labels[1].startswith("from 0.50: sensitivity")
    assert labels[2].startswith("no point, area")
    assert len(labels) == 3
    at = left.get_lines()[1].get_xydata()[0]
    assert at == pytest.approx([1 - point["specificity"], point["sensitivity"]])
    # The point of this threshold lies on the curve.
    assert np.abs(left.get_lines()[0].get_xydata() - at).sum(1).min() < 0.06
    assert right.get_lines()[1].get_xydata()[0] == pytest.approx([point["sensitivity"], point["ppv"]])


def test_legends_of_many_curves_stay_in_the_picture(tmp_path, drawn):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    positive, scores = np.arange(40) % 2 == 0, np.linspace(0, 1, 40)
    point = {"threshold": 0.5, "sensitivity": 0.5, "specificity": 0.5, "ppv": 0.5}
    curves = {f"a very long class name number {i}": Curve(scores, positive, point) for i in range(15)}
    draw_curves(curves, "title", tmp_path / "figure.png")
    renderer = FigureCanvasAgg(drawn[0]).get_renderer()
    for axes in drawn[0].axes:
        legend = axes.get_legend()
        assert len(legend.get_texts()) == 24
        box = legend.get_window_extent(renderer)
        assert box.y0 >= 0
        assert box.y1 < axes.xaxis.label.get_window_extent(renderer).y0


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
