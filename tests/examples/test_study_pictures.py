"""Pictures of a study show each method with its name, and a crossing only where intervals tell."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from study import figures
from study.summary import AHEAD, BEHIND, UNCLEAR
from study_runs import volume


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    kept = []
    save = figures.Figure.savefig

    def keep(figure, *given, **options):
        kept.append(figure)
        save(figure, *given, **options)

    monkeypatch.setattr(figures.Figure, "savefig", keep)
    return kept


def test_the_first_forty_methods_look_different():
    looks = figures.looks_of([f"method{i}" for i in range(40)] + ["full-frozen", "full-adapt"])
    assert len(set(looks.values())) == 42
    assert looks["full-frozen"][0] == looks["full-adapt"][0] == "#000000"


def crowd():
    """Thirteen methods as a study had them, with one that costs nearly nothing."""
    memory = [0.08, 616, 616, 616, 621, 621, 632, 634, 646, 663, 674, 684, 719]
    score = [0.726, 0.832, 0.825, 0.811, 0.816, 0.803, 0.833, 0.775, 0.801, 0.796, 0.771, 0.779, 0.755]
    table = pd.DataFrame(
        {
            "saved_mib": memory,
            "mean": score,
            "label": [f"some_method_{i}" for i in range(13)],
            "task": "classify",
        }
    )
    return table.assign(low=table["mean"] - 0.04, high=table["mean"] + 0.04)


def test_every_point_has_its_name_beside_it_and_none_covers_another(drawn, tmp_path):
    figures.draw_pareto(crowd(), "saved_mib", "a model on a set", tmp_path / "picture.png")
    (axes,) = drawn[0].axes
    names = [text for text in axes.texts if text.get_text()]
    assert len(names) == 13
    boxes = [text.get_window_extent() for text in names]
    for i, box in enumerate(boxes):
        assert box.count_overlaps(boxes[:i]) == 0, names[i]
        assert box.x0 >= 0
        assert box.x1 <= drawn[0].bbox.x1
    assert np.asarray(Image.open(tmp_path / "picture.png").convert("L")).std() > 10


def test_the_axis_is_on_the_data_and_says_of_a_far_cheaper_method_what_it_costs(drawn, tmp_path):
    figures.draw_pareto(crowd(), "saved_mib", "a model on a set", tmp_path / "picture.png")
    low, high = drawn[0].axes[0].get_xlim()
    assert 560 < low < 616
    assert 719 < high < 760
    assert "← some_method_0, 0.08 MiB" in [text.get_text() for text in drawn[0].axes[0].texts]


@pytest.mark.parametrize(
    ("verdicts", "rings"), [([BEHIND, UNCLEAR, AHEAD], 1), ([UNCLEAR, UNCLEAR, AHEAD], 0)]
)
def test_a_crossing_is_marked_only_where_intervals_tell(drawn, tmp_path, verdicts, rings):
    figures.draw_volume(volume(verdicts), "a model on a set", tmp_path / "picture.png")
    (axes,) = drawn[0].axes
    marks = [line for line in axes.lines if line.get_fillstyle() == "none"]
    assert len(marks) == rings
    assert ("ssf ahead" in [text.get_text() for text in axes.texts]) == bool(rings)
