"""BatchNorm statistics stay as they are unless asked to adapt."""

import copy
import pickle

import pytest
import torch
from models import example, make, output
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

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


X = torch.linspace(-2, 2, 48).view(8, 6)


def norms():
    """Two BatchNorms between linear layers, with statistics that are not those of a new layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 2))
    for layer in (model[1], model[3]):
        layer.running_mean.normal_()
        layer.running_var.uniform_(1, 3)
    return model


def trained(method, base=norms, **options):
    model = medpeft.apply(base(), method, head="4", **options)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.rand_like(parameter) / 4
    return model.eval()


def averaged(model):
    average = AveragedModel(model)
    average.update_parameters(model)
    update_bn([X], average)
    return average.module


def updated(model):
    update_bn([X], model)
    return model


def reset(model):
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.reset_running_stats()
    return model


@pytest.mark.parametrize("method", ["bn", "ssf", "bias"])
@pytest.mark.parametrize("estimate", [updated, averaged, reset])
def test_frozen_statistics_are_neither_reset_nor_estimated_anew(method, estimate, tmp_path):
    model = trained(method)
    expected = model(X)

    model = estimate(model)

    assert torch.equal(model.eval()(X), expected)
    medpeft.check(model, X)
    medpeft.save(model, tmp_path / "a.safetensors")
    assert torch.equal(medpeft.load(norms(), tmp_path / "a.safetensors").eval()(X), expected)
    medpeft.remove(model)
    assert all(layer.momentum == 0.1 for layer in (model[1], model[3]))
    model[1].reset_running_stats()
    assert torch.equal(model[1].running_mean, torch.zeros(6))


def test_statistics_that_adapt_are_estimated_anew():
    model = trained("bn", batchnorm="adapt")
    update_bn([X], model)

    with torch.no_grad():
        torch.testing.assert_close(model[1].running_mean, model[0](X).mean(0))


def as_lightning(model):
    """Reset the statistics as Lightning's StochasticWeightAveraging does, by assignment."""
    for layer in (model[1], model[3]):
        layer.running_mean = torch.zeros_like(layer.running_mean)
        layer.running_var = torch.ones_like(layer.running_var)
    return model


def as_synchronised(model):
    """Convert the BatchNorms and run them in train mode, as on one device each."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model).train()
    for layer in (model[1], model[3]):
        layer.running_mean.mul_(0.9)
    return model


@pytest.mark.parametrize("change", [as_lightning, as_synchronised])
def test_statistics_that_are_not_those_of_apply_are_found_and_not_saved(change, tmp_path):
    model = change(trained("bias"))

    with pytest.raises(medpeft.MedpeftError, match=r"running_mean.* has other values than at apply: frozen"):
        medpeft.check(model, X)
    with pytest.raises(
        medpeft.CheckpointError, match=r"'1\.running_mean' and \d more, frozen by apply, has other values"
    ):
        medpeft.save(model, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def synchronised_norms():
    return nn.SyncBatchNorm.convert_sync_batchnorm(norms())


@pytest.mark.parametrize("batchnorm", ["frozen", "adapt"])
@pytest.mark.parametrize("method", ["bias", "bn", "ssf", "lora"])
@pytest.mark.parametrize(("base", "other"), [(norms, synchronised_norms), (synchronised_norms, norms)])
def test_files_of_a_model_converted_before_apply_and_of_the_plain_one_fit_each_other(
    base, other, method, batchnorm, tmp_path
):
    target = "linear" if method == "lora" else None
    model = trained(method, base, batchnorm=batchnorm, target=target)
    medpeft.save(model, tmp_path / "a.safetensors")

    loaded = medpeft.load(other(), tmp_path / "a.safetensors").eval()
    assert type(loaded[1]) is not type(model[1])
    assert torch.equal(loaded(X), model(X))
    assert not torch.equal(base().eval()(X), model(X))


def test_a_model_converted_after_apply_is_saved_as_what_it_computes(tmp_path):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(trained("bias"))
    medpeft.save(model, tmp_path / "a.safetensors")

    for base in (norms, synchronised_norms):
        assert torch.equal(medpeft.load(base(), tmp_path / "a.safetensors").eval()(X), model(X))
    assert isinstance(medpeft.remove(model)[1], nn.SyncBatchNorm)
    assert torch.equal(model(X), norms().eval()(X))


def test_a_converted_norm_that_lost_its_adapters_is_found_and_not_saved(tmp_path):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(trained("ssf"))

    with pytest.raises(medpeft.MedpeftError, match="has lost the forward of its adapters"):
        medpeft.check(model, X)
    with pytest.raises(medpeft.CheckpointError, match=r"1 \(SyncBatchNorm\) has lost the forward of its ada"):
        medpeft.save(model, tmp_path / "a.safetensors")


@pytest.mark.parametrize(("method", "lost"), [("ssf", "bn1"), ("bn", "bn1.weight")])
def test_norms_that_timm_froze_after_apply_are_found_and_not_saved(method, lost, tmp_path):
    model = freeze_batch_norm_2d(medpeft.apply(make("resnet", torch.float32), method))

    with pytest.raises(medpeft.MedpeftError, match=rf"{lost}.* (has lost its adapter|is no longer there)"):
        medpeft.check(model, example("resnet").float())
    with pytest.raises(
        medpeft.CheckpointError, match=rf"'{lost}' and \d+ more, which '{method}' trains, is no longer"
    ):
        medpeft.save(model, tmp_path / "a.safetensors")
