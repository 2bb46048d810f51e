"""Mean ranks, Friedman's test and Nemenyi's critical difference are Demšar's; a line of runs names their result."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from study.figures_ranks import draw_ranks
from study.page import Page, write_volume
from study.ranks import Ranks, critical_difference, rank_rows
from study.runs import digest_of, line_of
from test_study_summary import MIDDLE, STRONG, WEAK, record

KINDS = {"full": MIDDLE, "ssf": STRONG, "bias": WEAK}


def runs_of(seeds, fractions=(1.0,)):
    return [record(n, s, k, fraction=f) for f in fractions for s in seeds for n, k in KINDS.items()]


def test_the_critical_difference_is_that_of_the_paper():
    # Table 5, q of 2, 3 and 10 rows at 0.05; and the example of four rows on 14 data sets, which has 1.25.
    for rows, q in ((2, 1.960), (3, 2.343), (10, 3.164)):
        found = critical_difference(6, rows) / np.sqrt(rows * (rows + 1) / 36)
        assert found == pytest.approx(q, abs=1e-3)
    assert critical_difference(14, 4) == pytest.approx(1.25, abs=0.005)


def test_rows_are_ranked_in_the_blocks_that_have_all_of_them():
    ranks = rank_rows([*runs_of(range(10)), record("full", 10, STRONG), record("ssf", 10, WEAK)])
    assert ranks.means.to_dict() == {"ssf": 1.0, "full": 2.0, "bias": 3.0}
    assert (ranks.blocks, ranks.splits) == (10, 10)
    # χ² = 12 · 10 / 12 · (1 + 4 + 9 − 12) = 20, with two degrees of freedom: p = exp(−10).
    assert ranks.p == pytest.approx(np.exp(-10))
    assert "common" not in ranks.words()


def test_equal_scores_share_their_rank_and_few_blocks_or_rows_are_not_ranked():
    tied = [record(name, s, MIDDLE) for name in ("a", "b") for s in range(10)]
    assert rank_rows(tied) is None
    ranks = rank_rows(tied + [record("c", s, STRONG) for s in range(10)])
    assert ranks.means.to_dict() == {"c": 1.0, "a": 2.5, "b": 2.5}
    assert rank_rows(runs_of(range(9))) is None


def test_shares_of_a_split_are_blocks_that_are_not_independent():
    ranks = rank_rows(runs_of(range(5), (0.1, 1.0)))
    assert (ranks.blocks, ranks.splits) == (10, 5)
    assert "Shares of one split have their test images in common" in ranks.words()


def test_lines_join_the_longest_stretches_that_do_not_differ():
    means = pd.Series({"a": 1.0, "b": 1.5, "c": 2.2, "d": 4.0})
    assert Ranks(means, 20, 20, 0.01, 1.0).groups() == [(1.0, 1.5), (1.5, 2.2)]
    assert Ranks(means, 20, 20, 0.01, 0.4).groups() == []
    assert Ranks(means, 20, 20, 0.01, 3.5).groups() == [(1.0, 4.0)]


def test_the_ranks_are_drawn_and_said_on_the_page(tmp_path):
    draw_ranks(rank_rows(runs_of(range(10))), "a model", tmp_path / "picture.png")
    assert np.asarray(Image.open(tmp_path / "picture.png").convert("L")).std() > 10
    write_volume(runs_of(range(5), (0.1, 1.0)), Page("How many?", "study.py volume", "30 runs"), tmp_path)
    assert (tmp_path / "ranks-a_model-one_set.png").stat().st_size > 100
    assert "Mean ranks over 10 blocks of runs" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_line_of_a_run_holds_what_it_takes_to_run_it_again():
    run = record("ssf", 3, MIDDLE, fraction=0.1)
    run.metrics["settings"] |= {"method": "ssf", "depth": 0.5, "repeat": 10}
    run.metrics.update(versions={"torch": "2.15.0"}, digest="abc")
    line = line_of(run)
    assert [line[name] for name in ("row", "share", "seed", "lr", "epochs", "repeat", "depth")] == [
        "ssf", 0.1, 3, 0.001, 1, 10, 0.5
    ]  # fmt: skip
    assert (line["macro_f1"], line["torch"], line["run"]) == (pytest.approx(0.8), "2.15.0", "abc")


def test_predictions_have_one_digest_if_they_say_the_same_of_every_image():
    same, other = record("ssf", 0, MIDDLE).predictions, record("ssf", 0, MIDDLE, order=1).predictions
    assert digest_of(same) == digest_of(same.assign(**{"p(benign)": "0.1"}))
    assert digest_of(same) != digest_of(other)
    findings = pd.DataFrame({"path": ["a"], "positive(effusion)": ["1"]})
    assert digest_of(findings) != digest_of(findings.replace("1", "0"))
