"""Modules that the adapters of a method share, unions of methods of different kinds, and a method in a user's own file."""

import copy
import importlib
import pickle
import re
import subprocess
import sys

import pytest
import torch
from models import example, make, output, randomise_adapters
from places import ROOT, TESTS
from safetensors import safe_open
from torch import nn

import medpeft
from medpeft.adapters.record import adapted_layers

SHARING = {"vera": {"rank": 6}, "fact": {"rank": 3}, "repadapter": {"bottleneck": 4}}


def adapted(method, family="hf_vit"):
    return randomise_adapters(medpeft.apply(make(family), method, **SHARING[method]), size=0.3)


def adapters_of(model, method):
    return [adapters[method] for _, _, adapters in adapted_layers(model) if method in adapters]


def shared_modules(model, method):
    """Id of every module that more than one of the adapters holds."""
    held = [id(module) for adapter in adapters_of(model, method) for module in adapter.shared.values()]
    return {key for key in held if held.count(key) > 1}


@pytest.mark.parametrize("method", SHARING)
def test_what_is_shared_stays_shared_in_copies_and_moves_and_counts_once(method):
    model, x = adapted(method), example("hf_vit")
    expected, shared = output(model, x), len(shared_modules(model, method))
    assert shared > 0

    moved = copy.deepcopy(model).to(torch.float32).to(torch.float64)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), moved):
        assert len(shared_modules(twin, method)) == shared
        assert not shared_modules(twin, method) & shared_modules(model, method)
        torch.testing.assert_close(output(twin, x), expected, rtol=1e-3, atol=1e-3)
    once = sum(p.numel() for p in {*model.parameters()} if p.requires_grad)
    assert (
        medpeft.report(model).trainable
        == medpeft.plan(make("hf_vit"), method, **SHARING[method]).trainable
        == once
    )
    groups = medpeft.parameter_groups(model, lr=1e-3, weight_decay=0.1)
    assert sum(p.numel() for group in groups for p in group["params"]) == once


@pytest.mark.parametrize("method", SHARING)
def test_what_is_shared_is_saved_once_and_loads_into_a_base_and_in_place(method, tmp_path):
    model, x, file = adapted(method), example("hf_vit"), tmp_path / "shared.safetensors"
    medpeft.save(model, file)

    with safe_open(file, "pt") as opened:
        saved = [opened.get_tensor(name).numel() for name in opened.keys()]  # noqa: SIM118 - it has no __contains__
    assert len(saved) == sum(p.requires_grad for p in model.parameters())
    assert sum(saved) == medpeft.report(model).trainable
    for target in (make("hf_vit"), medpeft.apply(make("hf_vit"), method, seed=9, **SHARING[method])):
        loaded = medpeft.load(target, file)
        assert torch.equal(output(loaded, x), output(model, x))
        assert len(shared_modules(loaded, method)) == len(shared_modules(model, method))


@pytest.mark.parametrize("method", SHARING)
def test_what_is_shared_is_registered_once_on_the_model_or_on_the_first_layer_of_a_container(method):
    whole = adapted(method)
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    medpeft.apply(layers, method, target="*", head=None, **SHARING[method])

    for model, home in ((whole, whole), (layers, layers[0])):
        held = {id(module) for adapter in adapters_of(model, method) for module in adapter.shared.values()}
        names = [name for name, module in model.named_modules(remove_duplicate=False) if id(module) in held]
        assert len(names) == len(held)
        assert {id(module) for module in home.adapters["shared"].values()} == held


def test_all_layers_of_one_width_share_the_factors_of_fact():
    model = medpeft.apply(make("swin"), "fact", rank=3)

    widths = {}
    for adapter in adapters_of(model, "fact"):
        factors = adapter.factors
        widths.setdefault(len(factors.u), set()).add(id(factors))
    assert {width: len(ids) for width, ids in widths.items()} == {8: 1, 16: 1}


def test_veras_matrices_are_one_for_each_shape_and_another_seed_gives_others():
    model, other = adapted("vera"), medpeft.apply(make("hf_vit"), "vera", rank=6, projection_seed=1)

    down = {id(adapter.down.matrix) for adapter in adapters_of(model, "vera")}
    assert len(down) == 1
    first, second = (adapters_of(m, "vera")[0].down.matrix for m in (model, other))
    assert first.shape == second.shape
    assert not torch.allclose(first, second)
    assert not any("matrix" in name for name in model.state_dict())


def test_a_gradient_step_on_shared_factors_moves_them_in_every_layer():
    model, x = adapted("fact"), example("hf_vit")
    layers = adapters_of(model, "fact")
    before = layers[0].factors.v.detach().clone()

    output(model, x).sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()

    assert not torch.equal(layers[0].factors.v, before)
    assert all(layer.factors.v is layers[0].factors.v for layer in layers)


@pytest.mark.parametrize(
    "methods",
    [
        "lora+adaptformer",
        "vera+ia3",
        "fact+bias",
        "repadapter+ssf+lora",
        "difffit+lora",
        "oft+norm",
        "tsa+fact",
    ],
)
def test_methods_of_different_kinds_join_by_a_plus(methods, tmp_path):
    family = "coatnet" if "tsa" in methods else "vit"
    model, x = medpeft.apply(make(family), methods), example(family)
    assert set(medpeft.report(model).method.split("+")) == set(methods.split("+"))
    assert {row.method for row in medpeft.report(model).rows} == {*methods.split("+"), "head"}

    medpeft.check(model, x)
    randomise_adapters(model, size=0.3)
    medpeft.save(model, tmp_path / "union.safetensors")
    assert torch.equal(
        output(medpeft.load(make(family), tmp_path / "union.safetensors"), x), output(model, x)
    )
    with medpeft.disabled(model):
        torch.testing.assert_close(output(model, x), output(make(family), x), rtol=1e-12, atol=1e-12)


def test_an_adapter_on_the_input_acts_where_the_input_is_a_keyword():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)

        def forward(self, x):
            return self.first(input=x)

    model, x = Named().double(), torch.randn(3, 4, dtype=torch.float64)
    medpeft.apply(model, "repadapter", target="*", head=None)
    randomise_adapters(model, size=0.3)

    entered = model.first.adapters["repadapter"].enter(x, {})
    assert not torch.allclose(entered, x)
    with medpeft.disabled(model):
        expected = model(entered)
    assert torch.equal(model(x), expected)


def test_check_finds_that_the_forward_of_an_adapter_on_the_input_was_lost():
    model, x = medpeft.apply(make("vit"), "oft", block_size=4), example("vit")
    del model.blocks[1].attn.proj.forward

    with pytest.raises(
        medpeft.MedpeftError, match=r"blocks\.1\.attn\.proj has lost the forward of its adapters"
    ):
        medpeft.check(model, x)


FRESH = """
import sys, torch
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import gain
import medpeft
from models import example, make, output
torch.manual_seed(12345)
torch.set_num_threads(1)
for name in ("vera", "fact", "gain"):
    model = medpeft.load(make("vit"), f"{sys.argv[2]}/{name}.safetensors")
    expected = torch.load(f"{sys.argv[2]}/{name}.pt", weights_only=True)
    difference = (output(model, example("vit")) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-12, f"{name}: {difference}"
"""


def test_a_file_of_a_method_of_ones_own_and_of_shared_modules_loads_in_a_fresh_process(
    tmp_path, monkeypatch, own_registry
):
    page = (ROOT / "docs" / "own-method.md").read_text(encoding="utf-8")
    (tmp_path / "gain.py").write_text(
        re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1), encoding="utf-8"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("gain")
    for method, options in {"vera": {"projection_seed": 4}, "fact": {}, "gain": {"start": 0.9}}.items():
        model = randomise_adapters(medpeft.apply(make("vit"), method, **options), size=0.3)
        medpeft.save(model, tmp_path / f"{method}.safetensors")
        torch.save(output(model, example("vit")).detach(), tmp_path / f"{method}.pt")
    sys.modules.pop("gain")

    run = [sys.executable, "-c", FRESH, str(TESTS / "support"), str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, check=False)

    assert done.returncode == 0, done.stderr
