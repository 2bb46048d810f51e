"""Differentially private training with Opacus: gradients of every image, for every method, in its default mode."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from every_method import CASES, adapted
from per_sample import assert_same, deterministic, images_like, loss_of, one_at_a_time
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import medpeft

opacus = pytest.importorskip("opacus")

# torch says so of every module whose input needs no gradient, and Opacus' hooks are meant for that.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:Secure RNG turned off")


def sampled(model, images, module):
    """Gradients of every image as Opacus' default mode collects them."""
    watched = opacus.GradSampleModule(module, loss_reduction="sum")
    y = watched(images)
    sum(loss_of(of_image[None]) for of_image in y).backward()
    found = {name: p.grad_sample for name, p in model.named_parameters() if p.requires_grad}
    watched.cleanup()
    return found


@pytest.mark.parametrize("case", CASES)
def test_opacus_gets_the_gradient_of_every_image(case):
    more = {"batchnorm": "frozen"} if case == "full" else {}
    # transformers' models return no tensor, which is refused below.
    family = "vit" if CASES[case][0] == "hf_vit" else None
    model, x = adapted(case, family, **more)
    images = images_like(x)
    expected = one_at_a_time(deterministic(model), images)
    assert_same(sampled(model, images, medpeft.private(model)), expected)


@pytest.mark.parametrize(
    "method", ["linear_probe", "ln", "norm", "attention", "bitfit", "houlsby", "pfeiffer"]
)
def test_methods_of_plain_layers_need_nothing(method):
    model, x = adapted(method, "vit")
    images = images_like(x)
    expected = one_at_a_time(deterministic(model), images)
    assert_same(sampled(model, images, model), expected)


def mlp(method="lora", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    return medpeft.apply(model, method, target="0", head="2", **options).train()


X = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3


def made_private(module, noise=0.0, clip=1e6, size=4, **options):
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
    return opacus.PrivacyEngine().make_private(
        module=module,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(X, Y), size),
        noise_multiplier=noise,
        max_grad_norm=clip,
        **options,
    )


def train(model, optimizer, loader, loss_function=F.cross_entropy):
    for images, labels in loader:
        optimizer.zero_grad()
        loss_function(model(images), labels).backward()
        optimizer.step()


@pytest.mark.parametrize("method", ["lora", "oft", "ssf+bias"])
def test_without_it_opacus_refuses_such_methods(method):
    with pytest.raises((TypeError, ValueError), match=r"missing 1 required|sample gradient is not init"):
        train(*made_private(mlp(method)))


@pytest.mark.parametrize(("family", "method"), [("beit", "bias"), ("beit", "bitfit"), ("resnet", "norm")])
def test_without_it_opacus_refuses_layers_that_train_and_have_buffers(family, method):
    model, _ = adapted(method, family)
    with pytest.raises(NotImplementedError, match="a trainable layer with buffers"):
        opacus.GradSampleModule(model)


def test_without_noise_and_clipping_a_step_is_a_plain_one():
    private, plain = mlp(), mlp()
    train(*made_private(medpeft.private(private), size=8, poisson_sampling=False))
    train(plain, torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.5), [(X, Y)])
    for found, expected in zip(private.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


def test_it_trains_saves_and_loads_with_batches_drawn_at_random_of_which_some_are_empty(tmp_path):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    module, optimizer, loader = made_private(medpeft.private(model), noise=1.0, clip=1.0, size=1)
    sizes = []
    for images, labels in loader:
        sizes.append(len(images))
        train(module, optimizer, [(images, labels)])
    assert 0 in sizes
    assert max(sizes) > 1
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == [name for name, p in model.named_parameters() if p.requires_grad]
    medpeft.save(model, tmp_path / "private.safetensors")
    fresh = medpeft.load(medpeft.remove(mlp()), tmp_path / "private.safetensors")
    torch.testing.assert_close(fresh.eval()(X), module.eval()(X))


def test_the_gradients_are_those_of_the_dropout_that_was_drawn():
    model = mlp(dropout=0.5)
    with torch.no_grad():
        model[0].adapters.lora.up.normal_()
    watched = opacus.GradSampleModule(medpeft.private(model), loss_reduction="sum")
    watched(X).sum().backward()
    down = model[0].adapters.lora.down.grad_sample
    dropped = (down == 0).all(1)  # (B, r, in) → (B, in): of a dropped element no row of A has a gradient
    assert 0.2 < dropped.float().mean() < 0.8
    assert not (dropped == dropped[0]).all()


def test_without_opacus_watching_it_trains_like_the_model():
    model = mlp()
    private = medpeft.private(model)
    private(X).sum().backward()
    assert model[0].adapters.lora.up.grad.abs().max() > 0
    assert private.eval().model.training is False
    assert torch.equal(private(X), model(X))
    assert private.double()(X.double()).dtype == torch.float64
    assert copy.deepcopy(private).model is not model


def two_outputs(model):
    return nn.Sequential(medpeft.remove(model), Pair())


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def test_what_cannot_be_private_is_refused_in_words(monkeypatch):
    with pytest.raises(medpeft.MedpeftError, match=r"call medpeft\.apply"):
        medpeft.private(nn.Linear(2, 2))
    norm = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    with pytest.raises(medpeft.MedpeftError, match=r"adapt to all images of a batch.*batchnorm='frozen'"):
        medpeft.private(medpeft.apply(norm, "bn", head="2", batchnorm="adapt"))
    with pytest.raises(medpeft.MedpeftError, match="Nothing trains"):
        medpeft.private(mlp().requires_grad_(False))
    monkeypatch.setitem(sys.modules, "opacus.grad_sample.utils", None)
    with pytest.raises(medpeft.MedpeftError, match=r"pip install 'medpeft\[private\]'"):
        medpeft.private(mlp())


def test_a_training_that_would_be_wrong_is_refused_in_words():
    model = mlp()
    watched = opacus.GradSampleModule(medpeft.private(model))
    watched(X)
    with pytest.raises(medpeft.MedpeftError, match="was not used in a backward"):
        watched(X)
    watched.cleanup()
    model[0].weight.requires_grad_(True)
    with pytest.raises(medpeft.MedpeftError, match="Other parameters train than when"):
        watched(X)
    pair = medpeft.apply(two_outputs(mlp()), "lora", target="0.0", head=None).train()
    with pytest.raises(medpeft.MedpeftError, match="returns tuple in place of one tensor"):
        opacus.GradSampleModule(medpeft.private(pair))(X)
    with pytest.raises(medpeft.MedpeftError, match="with one entry an image each"):
        opacus.GradSampleModule(medpeft.private(mlp()))(X, X[:3])


@pytest.mark.parametrize(
    "block", [medpeft.disabled, medpeft.merged, lambda model: medpeft.scaled(model, 0.5)]
)
def test_a_step_is_refused_where_what_trains_does_not_act_as_it_is_and_an_evaluation_is_not(block):
    model = mlp()
    watched = opacus.GradSampleModule(medpeft.private(model))
    with block(model):
        with pytest.raises(
            medpeft.MedpeftError, match="Differentially private training does not work inside"
        ):
            watched(X)
        with torch.no_grad():
            assert torch.equal(watched(X), model(X))
    watched(X).sum().backward()
    assert model[0].adapters.lora.up.grad_sample.any()


@pytest.mark.parametrize("switch", ["train", "eval"])
@pytest.mark.parametrize("where", ["after forward", "in backward"])
def test_after_a_step_that_was_broken_off_training_goes_on(where, switch, monkeypatch):
    model, untouched = mlp(), mlp()
    module, optimizer, loader = made_private(medpeft.private(model), size=8, poisson_sampling=False)
    loss = F.cross_entropy(module(X.roll(1, 0)), Y)
    if where == "in backward":
        with monkeypatch.context() as patch:
            patch.setattr(torch.autograd, "grad", lambda *arguments, **options: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                loss.backward()
    else:
        with pytest.raises(medpeft.MedpeftError, match=r"broken off, call train\(\)"):
            module(X)
    getattr(module, switch)()
    train(module.train(), optimizer, loader)
    train(*made_private(medpeft.private(untouched), size=8, poisson_sampling=False))
    for found, expected in zip(model.parameters(), untouched.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mode", ["functorch", "ew", "ghost"])
def test_other_modes_of_opacus_are_refused_in_words(mode):
    module, optimizer, *criterion, loader = made_private(medpeft.private(mlp()), grad_sample_mode=mode)
    loss_function = criterion[0] if criterion else F.cross_entropy
    with pytest.raises(medpeft.MedpeftError, match="grad_sample_mode='hooks'"):
        train(module, optimizer, loader, loss_function)
