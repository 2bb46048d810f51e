"""Gaps between subgroups are named with what they rest on."""

import math

import numpy as np
import pytest
import torch
from trainer.judging.subgroups import describe_worst, gaps
from trainer.tasks import Outcome
from trainer.tasks.classify import Classify

WORDS = {"f1": "macro-F1", "auroc": "AUROC"}


def scores(f1, auroc, images, low, high):
    return {"f1": f1, "auroc": auroc, "images": images, "intervals": {"f1": [low, high]}}


def test_the_gap_is_between_the_highest_and_the_lowest_that_are_defined():
    found = {
        "f": scores(0.9, math.nan, 50, 0.8, 1),
        "m": scores(0.7, 0.6, 40, 0.6, 0.75),
        "x": scores(0.8, math.nan, 9, 0.2, 1),
    }
    assert gaps(found, WORDS) == {"f1": {"gap": pytest.approx(0.2), "highest": "f", "lowest": "m"}}
    told = describe_worst(found, "f1", WORDS)
    assert told == "The worst subgroup is 'm': macro-F1 0.700 on 40 images, 0.200 below 'f'."
    assert describe_worst(found, "auroc", WORDS) == ""


def test_what_may_be_chance_is_called_so():
    found = {"f": scores(0.9, 1.0, 50, 0.7, 1), "m": scores(0.7, 0.6, 5, 0.4, 0.9)}
    told = describe_worst(found, "f1", WORDS)
    assert "Their 95 % intervals overlap: this may be chance." in told
    assert told.endswith("Fewer than 20 images say little.")


def test_each_subgroup_has_scores_and_intervals_of_its_own_images():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (60,), generator=generator)
    logits = torch.randn(60, 2, generator=generator) + torch.nn.functional.one_hot(labels, 2)
    outcome, sexes = Outcome(logits, labels, {"temperature": 1.0}), ["f", "m", "m"] * 20
    task = Classify(["a", "b"])
    found = task.score_subgroups(outcome, sexes, np.arange(60) // 2, seed=0)
    own = torch.tensor([sex == "f" for sex in sexes])
    assert found["f"]["images"] == 20
    assert found["f"]["macro_f1"] == task.scores(outcome.rows(own))["macro_f1"]
    low, high = found["m"]["intervals"]["macro_f1"]
    assert low <= found["m"]["macro_f1"] <= high
    assert found["m"]["intervals"]["bootstrap"]["images"] == 40
    assert "The worst subgroup is" in task.subgroup_table(found)
