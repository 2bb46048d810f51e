"""The trainer's split is stratified, repeatable, and never puts one group on two sides."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from small_training import checked
from trainer.data.rows import Images
from trainer.data.splits import divided_groups, join_groups, split, training_subset
from trainer.errors import TrainerError


def images_of(labels, groups=None, parts=None):
    labels = np.asarray(labels, dtype=np.int64)
    classes = [str(i) for i in range(labels.max() + 1)]
    return Images(
        pixels=torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8),
        targets=torch.from_numpy(labels),
        classes=classes,
        strata=labels,
        stratum_names=classes,
        groups=np.arange(len(labels)) if groups is None else np.asarray(groups),
        parts=np.array([] if parts is None else parts),
        names=[str(i) for i in range(len(labels))],
    )


@pytest.fixture
def patients():
    """300 images of 100 patients, in three classes of 60, 30 and 10 %."""
    rng = np.random.default_rng(0)
    of_patient = rng.choice(3, 100, p=[0.6, 0.3, 0.1])
    groups = rng.permutation(np.repeat(np.arange(100), 3))
    return images_of(of_patient[groups], groups)


def test_every_image_is_in_exactly_one_part(patients):
    found = split(patients, checked())
    assert sorted(np.concatenate(list(found.values())).tolist()) == list(range(300))


@pytest.mark.parametrize("seed", range(5))
def test_no_group_is_divided(patients, seed):
    found = split(patients, checked(seed=seed))
    assert divided_groups(patients, found) == 0
    inside = {part: set(patients.groups[rows].tolist()) for part, rows in found.items()}
    assert not inside["train"] & inside["test"]
    assert not inside["train"] & inside["val"]
    assert not inside["val"] & inside["test"]


def test_every_part_has_each_class_in_its_share():
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    found = split(images_of(labels), checked())
    for rows in found.values():
        assert np.allclose(np.bincount(labels[rows]) / len(rows), [0.6, 0.3, 0.1], atol=0.01)


def test_the_fractions_are_kept():
    found = split(images_of([0, 1] * 200), checked(val_fraction=0.1, test_fraction=0.3))
    assert [len(found[part]) for part in ("train", "val", "test")] == [240, 40, 120]


def test_a_seed_repeats_its_split_and_another_gives_another(patients):
    first, again, other = (split(patients, checked(seed=seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(first[part], again[part]) for part in first)
    assert not np.array_equal(first["test"], other["test"])


def test_three_images_a_class_are_enough_and_two_are_not():
    found = split(images_of([0, 1] * 3), checked())
    assert all(len(rows) == 2 for rows in found.values())
    with pytest.raises(TrainerError, match=r"Class '1' has 2 independent images .* needs 3"):
        split(images_of([0, 0, 0, 1, 1]), checked())


def test_copies_do_not_count_as_independent():
    with pytest.raises(TrainerError, match="Class '1' has 1 independent images"):
        split(images_of([0, 0, 0, 1, 1, 1], groups=[0, 1, 2, 3, 3, 3]), checked())


def test_a_split_of_the_data_is_kept():
    parts = ["train", "train", "val", "val", "test", "test"]
    found = split(images_of([0, 1] * 3, parts=parts), checked())
    assert {part: rows.tolist() for part, rows in found.items()} == {
        "train": [0, 1],
        "val": [2, 3],
        "test": [4, 5],
    }


def test_a_missing_validation_part_is_taken_out_of_training():
    images = images_of([0, 1] * 50, parts=["train"] * 80 + ["test"] * 20)
    found = split(images, checked(val_fraction=0.25))
    assert found["test"].tolist() == list(range(80, 100))
    assert len(found["val"]) == 20
    assert sorted([*found["train"], *found["val"]]) == list(range(80))


def test_a_missing_test_part_is_an_error():
    images = images_of([0, 1] * 10, parts=["train"] * 10 + ["val"] * 10)
    with pytest.raises(TrainerError, match="no 'test' images"):
        split(images, checked())


def test_a_class_without_training_images_is_an_error():
    images = images_of([0, 0, 1, 0, 1], parts=["train", "train", "val", "test", "test"])
    with pytest.raises(TrainerError, match="Class '1' has no training image"):
        split(images, checked())


def test_groups_that_the_data_divide_are_counted():
    images = images_of([0, 1, 0, 1], [5, 6, 5, 7], parts=["train", "train", "val", "test"])
    assert divided_groups(images, split(images, checked())) == 1


@pytest.mark.parametrize(("val", "test"), [(0.5, 0.5), (0, 0.2), (0.2, -0.1), (1.5, 0.1)])
def test_fractions_that_leave_nothing_are_refused(val, test):
    with pytest.raises(TrainerError, match="Their sum must stay below 1"):
        checked(val_fraction=val, test_fraction=test)


def test_rows_are_joined_through_any_chain_of_shared_values():
    copies = ["x", "y", "x", "z", "w"]
    patients = ["p", "q", "r", "r", "s"]
    assert join_groups(copies, patients).tolist() == [0, 1, 0, 0, 2]


# Part of the training data


@pytest.mark.parametrize("seed", range(3))
def test_a_smaller_part_of_the_training_data_lies_within_a_larger_one(patients, seed):
    rows = split(patients, checked(seed=seed))["train"]
    parts = [
        set(training_subset(patients, rows, fraction, seed).tolist())
        for fraction in (0.01, 0.1, 0.25, 0.5, 1)
    ]
    assert all(small < large for small, large in pairwise(parts))
    assert parts[-1] == set(rows.tolist())


def test_a_part_of_the_training_data_has_every_class_by_its_share():
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    images = images_of(labels)
    kept = training_subset(images, np.arange(1000), 0.1, seed=0)
    assert np.bincount(labels[kept]).tolist() == [60, 30, 10]
    least = training_subset(images, np.arange(1000), 0.0001, seed=0)
    assert np.bincount(labels[least]).tolist() == [1, 1, 1]


def test_a_part_of_the_training_data_divides_no_group(patients):
    rows = split(patients, checked())["train"]
    kept = training_subset(patients, rows, 0.3, seed=0)
    left = np.setdiff1d(rows, kept)
    assert not set(patients.groups[kept]) & set(patients.groups[left])


def test_another_seed_takes_another_part(patients):
    rows = np.arange(300)
    first, again, other = (training_subset(patients, rows, 0.2, seed).tolist() for seed in (0, 0, 1))
    assert first == again != other


# Cross-validation


def test_every_image_is_tested_in_exactly_one_fold_with_its_group(patients):
    folds = [split(patients, checked(k_folds=5, fold=number)) for number in range(5)]
    assert sorted(np.concatenate([found["test"] for found in folds]).tolist()) == list(range(300))
    for found in folds:
        assert sorted(np.concatenate(list(found.values())).tolist()) == list(range(300))
        assert divided_groups(patients, found) == 0
        assert len(found["val"]) == pytest.approx(45, abs=10)
        assert set(patients.strata[found["test"]]) == {0, 1, 2}


def test_folds_of_data_with_a_split_or_of_too_few_images_are_refused():
    with pytest.raises(TrainerError, match="The data bring their own split, which --k-folds would mix up"):
        split(images_of([0, 1] * 6, parts=["train", "val", "test"] * 4), checked(k_folds=2))
    with pytest.raises(TrainerError, match=r"Class '1' has 4 independent images .* --k-folds 5 needs 5"):
        split(images_of([0] * 20 + [1] * 4), checked(k_folds=5))
