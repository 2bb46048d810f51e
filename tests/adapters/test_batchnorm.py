"""BatchNorm statistics stay as they are unless asked to adapt."""

import copy
import pickle

import pytest
import torch
from models import example, make, output

import medpeft

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def statistics(model):
    return {name: b.clone() for name, b in model.named_buffers() if name.endswith(STATISTICS)}


def moved(model):
    """Names of the statistics that a forward in train mode changes."""
    before = statistics(model)
    with torch.no_grad():
        output(model.train(), example("resnet"))
    return {name for name, b in statistics(model).items() if not torch.equal(b, before[name])}


@pytest.mark.parametrize("method", ["bias", "bn", "tsa", "ssf", "lora", "svdiff", "linear_probe"])
def test_statistics_are_frozen_by_default_also_when_the_user_asks_for_training(method):
    model = medpeft.apply(make("resnet"), method)

    assert moved(model) == set()
    assert model.training
    assert not model.bn1.training


def test_full_fine_tuning_adapts_them_by_default():
    model = medpeft.apply(make("resnet"), "full")

    assert moved(model) == set(statistics(model))


@pytest.mark.parametrize("method", ["bn", "ssf", "tsa"])
def test_they_adapt_when_asked_and_come_back_on_removal(method):
    model = make("resnet")
    before = statistics(model)
    medpeft.apply(model, method, batchnorm="adapt")

    assert moved(model) == set(before)
    with medpeft.disabled(model):
        assert all(torch.equal(b, before[name]) for name, b in statistics(model).items())
    medpeft.remove(model)
    assert all(torch.equal(b, before[name]) for name, b in statistics(model).items())


def test_full_fine_tuning_can_freeze_them():
    assert moved(medpeft.apply(make("resnet"), "full", batchnorm="frozen")) == set()


def test_an_unknown_policy_is_refused():
    with pytest.raises(
        medpeft.MedpeftError, match="batchnorm='off' is not known: choose one of 'frozen', 'adapt'"
    ):
        medpeft.apply(make("resnet"), "bn", batchnorm="off")


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_freezes_its_own(again):
    model = medpeft.apply(make("resnet"), "bias")
    twin = again(model)

    assert moved(twin) == set()
    medpeft.remove(twin)
    assert moved(twin) == set(statistics(twin))
    assert moved(model) == set()


@pytest.mark.parametrize("asked", [True, False])
def test_removal_leaves_the_mode_that_was_asked_for_last(asked):
    model = medpeft.apply(make("resnet").train(), "bias")
    model.train(asked)
    assert not model.bn1.training

    medpeft.remove(model)

    assert model.bn1.training == asked
    assert "train" not in vars(model.bn1)


def test_a_norm_with_a_fused_activation_is_frozen_with_all_its_parts():
    model = make("efficientnet")
    assert type(model.bn1).__name__ == "BatchNormAct2d"
    medpeft.apply(model, "bn").train()

    assert not model.bn1.training
    assert model.bn1.act.training
    assert moved(model) == set()
