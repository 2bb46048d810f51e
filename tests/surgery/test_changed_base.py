"""What became of the base: old gradients and inference mode at `apply`, and values that changed since."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import medpeft


def mlp(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", ["ssf", "bias", "full"])
def test_apply_clears_the_gradients_of_before(method):
    model = mlp(0)
    model(X).sum().backward()
    medpeft.apply(model, method, head="2")
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_optimizer_over_all_parameters_moves_nothing_that_is_frozen():
    model = mlp(0)
    model(X).sum().backward()
    medpeft.apply(model, "ssf", head="2")
    frozen = model[0].weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(X).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, frozen)


def test_apply_inside_inference_mode_is_refused():
    model = mlp(0)
    keys = list(model.state_dict())
    with torch.inference_mode():
        made_inside = mlp(0)
        with pytest.raises(medpeft.MedpeftError, match=r"inside torch\.inference_mode cannot train"):
            medpeft.apply(model, "ssf", head="2")
    with pytest.raises(medpeft.MedpeftError, match=r"inside torch\.inference_mode cannot train"):
        medpeft.apply(made_inside, "ssf", head="2")
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        medpeft.apply(model, "ssf", head="2")
    assert medpeft.check(model, X).tensors == 4


def load(model):
    model.load_state_dict(mlp(1).state_dict(), strict=False)


def write_data(model):
    model[0].weight.data.copy_(mlp(1)[0].weight)


def flip(model):
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.flip(1).clone())


def permute(model):
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight[torch.arange(8).roll(1)])


def quantise(model):
    weight = model[0].weight.data
    weight.copy_(torch.round(weight * 16) / 16)


def parametrise(model):
    nn.utils.parametrizations.spectral_norm(model[0])


CHANGES = [load, write_data, flip, permute, quantise, parametrise]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", ["bias", "ssf", "svdiff"])
def test_the_original_values_are_not_put_into_a_base_that_has_changed(change, method):
    model = medpeft.apply(mlp(0), method, head="2")
    change(model)
    before = model(X).detach()
    for action in (medpeft.remove, lambda model: medpeft.disabled(model).__enter__()):
        with pytest.raises(medpeft.MedpeftError, match=r"'0\.weight'.* changed after apply"):
            action(model)
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("change", CHANGES)
def test_check_says_what_has_changed(change):
    model = medpeft.apply(mlp(0), "bias", head="2")
    change(model)
    if change is parametrise:
        with pytest.raises(
            medpeft.MedpeftError, match=r"0\.weight is no longer there: was its layer re-param"
        ):
            medpeft.check(model, X)
    else:
        note = medpeft.check(model, X).notes[-1]
        assert note.startswith("'0.weight' has other values than at apply: the model trains beside them")


def test_what_is_trained_beside_other_weights_is_saved_for_them(tmp_path):
    model = medpeft.apply(mlp(0), "bias", head="2")
    load(model)
    medpeft.save(model, tmp_path / "a.safetensors")
    loaded = medpeft.load(mlp(1), tmp_path / "a.safetensors")
    assert torch.equal(loaded(X), model(X))


@pytest.mark.parametrize("change", CHANGES[:-1])
def test_singular_values_of_other_weights_are_neither_checked_nor_saved_nor_merged(change, tmp_path):
    model = medpeft.apply(mlp(0), "svdiff", head="2")
    change(model)
    reason = r"0.? has other weights than those that 'svdiff' took apart at apply"
    with pytest.raises(medpeft.MedpeftError, match=reason):
        medpeft.check(model, X)
    with pytest.raises(medpeft.CheckpointError, match=reason):
        medpeft.save(model, tmp_path / "a.safetensors")
    for action in (medpeft.merge, lambda model: medpeft.merged(model).__enter__()):
        with pytest.raises(medpeft.MedpeftError, match="0: its weight is not the one that was taken apart"):
            action(model)


REPARAMETRISED = {
    nn.utils.parametrizations.spectral_norm: "parametrize.remove_parametrizations",
    nn.utils.parametrizations.weight_norm: "parametrize.remove_parametrizations",
    nn.utils.weight_norm: "remove_weight_norm",
    nn.utils.spectral_norm: "remove_spectral_norm",
    lambda layer: prune.l1_unstructured(layer, "weight", 0.3): "prune.remove",
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("method", ["lora", "ssf", "oft"])
@pytest.mark.parametrize("change", REPARAMETRISED)
def test_a_layer_reparametrised_after_apply_is_neither_merged_nor_saved(change, method, tmp_path):
    model = medpeft.apply(mlp(0), method, target="0", head="2").eval()
    change(model[0])
    model[0].requires_grad_(False).adapters.requires_grad_(True)
    hint = f"is computed in every forward since apply.*{REPARAMETRISED[change]}"
    before = model(X)
    for action in (medpeft.merge, lambda model: medpeft.merged(model).__enter__()):
        with pytest.raises(medpeft.MedpeftError, match=hint):
            action(model)
    assert torch.equal(model(X), before)
    with pytest.raises(medpeft.CheckpointError, match=hint):
        medpeft.save(model, tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtypes", [(torch.float16,), (torch.bfloat16, torch.float32), (torch.float64,)])
def test_a_model_that_is_cast_is_the_same_base(dtypes):
    model, plain, x = medpeft.apply(mlp(0), "bias", head="2"), mlp(0), X
    for dtype in dtypes:
        model, plain, x = model.to(dtype), plain.to(dtype), x.to(dtype)
    # What was kept for the biases was not rounded in between.
    near = {"rtol": 0, "atol": 1e-2 if len(dtypes) > 1 else 0}
    with medpeft.disabled(model):
        torch.testing.assert_close(model(x), plain(x), **near)
    torch.testing.assert_close(medpeft.remove(model)(x), plain(x), **near)


def test_without_original_values_to_put_back_other_weights_do_no_harm():
    model = medpeft.apply(mlp(0), "ssf", head=None)
    load(model)
    with medpeft.disabled(model):
        assert torch.equal(model(X), mlp(1)(X))
    assert torch.equal(medpeft.remove(model)(X), mlp(1)(X))


def test_own_weights_loaded_again_are_the_same_base():
    model = medpeft.apply(mlp(0), "ssf", head="2")
    model.load_state_dict(model.state_dict())
    assert not medpeft.check(model, X).notes
    assert torch.equal(medpeft.remove(model)(X), mlp(0)(X))


def test_frozen_statistics_that_were_estimated_anew_are_found():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
    medpeft.apply(model, "ssf", head="3")
    model[1].running_mean.normal_()
    with pytest.raises(medpeft.MedpeftError, match=r"1\.running_mean has other values .* must not be reset"):
        medpeft.check(model, X)
    with pytest.raises(medpeft.MedpeftError, match=r"'1\.running_mean' changed after apply"):
        medpeft.remove(model)


def test_weights_tied_after_apply_are_the_same_base():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    model[1].weight.data.copy_(model[0].weight)
    medpeft.apply(model, "ssf", head="2")
    model[1].weight = model[0].weight
    medpeft.remove(model)


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_an_averaged_model_has_the_base_of_apply(decay, tmp_path):
    model = medpeft.apply(mlp(0), "lora", target="0", head="2", rank=2)
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(decay))
    for _ in range(100):
        with torch.no_grad():
            model[0].adapters.lora.up.add_(0.01)
        average.update_parameters(model)
    assert not torch.equal(average.module[0].weight, model[0].weight)  # torch averages frozen weights too
    medpeft.save(average.module, tmp_path / "average.safetensors")
    loaded = medpeft.load(mlp(0), tmp_path / "average.safetensors")
    assert torch.allclose(loaded(X), average.module(X), atol=1e-5)


def test_a_base_that_was_trained_a_little_is_another(tmp_path):
    model = medpeft.apply(mlp(0), "lora", target="0", head="2", rank=2)
    with torch.no_grad():
        model[0].weight.add_(1e-5 * torch.randn(8, 8).sign())  # as a step of Adam at a small rate
    medpeft.save(model, tmp_path / "a.safetensors")
    with pytest.raises(medpeft.CheckpointError, match=r"'0\.weight'"):
        medpeft.load(mlp(0), tmp_path / "a.safetensors")


class Packed(nn.Linear):
    """A linear layer of four bits a number, as bitsandbytes keeps them."""

    def __init__(self):
        super().__init__(8, 8)
        self.weight = nn.Parameter(torch.randint(0, 256, (32, 1), dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize("method", ["svdiff", "loha", "shira"])
def test_a_packed_weight_is_refused(method):
    model = nn.Sequential(Packed(), nn.Tanh(), nn.Linear(8, 2))
    with pytest.raises(medpeft.MedpeftError, match="weight of 0, which is quantised: exclude it"):
        medpeft.apply(model, method, target="0", head="2")
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize(("method", "options"), [("svdiff", {}), ("lora", {"dora": True})])
def test_a_weight_of_integers_is_not_changed(method, options):
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    model[0].weight = nn.Parameter(torch.randint(-9, 9, (8, 8), dtype=torch.int8), requires_grad=False)
    with pytest.raises(medpeft.MedpeftError, match="weight of 0, which is quantised"):
        medpeft.apply(model, method, target="0", head="2", **options)
