"""Save and load: a file holds what training changed, and loads it bit for bit."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from checkpoints import refusal, saved_file, trained
from golden.model import Golden, example
from models import example as example_of
from models import make, randomise
from places import IMPORTABLE
from safetensors.torch import load_file
from torch import nn

import medpeft
from medpeft.adapters.record import own_state

# Every method on the families that show it at its most awkward: a CNN, a transformer, one whose parent reads the weight.
FRESH = {
    "full": ("resnet", {}),
    "linear_probe": ("vit", {}),
    "bn": ("resnet", {"batchnorm": "adapt"}),
    "bias": ("beit", {}),
    "bitfit": ("vit", {}),
    "ln": ("swin", {}),
    "norm": ("resnet", {}),
    "attention": ("hf_vit", {}),
    "tsa": ("resnet", {"batchnorm": "adapt"}),
    "ssf": ("beit", {}),
    "lora": ("swinv2", {"rank": 2}),
    "adaptformer": ("vit", {"bottleneck": 4}),
    "svdiff": ("multihead_attention", {"target": "*"}),
    "lora+bias": ("multihead_attention", {"rank": 2}),
}


@pytest.fixture
def file(tmp_path):
    return saved_file(tmp_path / "derm.safetensors")


def test_a_fresh_process_computes_the_same_bits_for_every_method(tmp_path):
    torch.save({method: family for method, (family, _) in FRESH.items()}, tmp_path / "families.pt")
    outputs = {}
    for method, (family, options) in FRESH.items():
        model = trained(make(family, torch.float32), method, **options)
        medpeft.save(model, tmp_path / f"{method}.safetensors")
        with torch.no_grad():
            out = model(example_of(family, torch.float32))
        outputs[method] = out if isinstance(out, torch.Tensor) else out[0]
    script = """
import sys, torch, medpeft
torch.set_num_threads(1)
from models import example, make
folder, found = sys.argv[1], {}
for method, family in torch.load(folder + "/families.pt").items():
    model = medpeft.load(make(family, torch.float32), f"{folder}/{method}.safetensors").eval()
    with torch.no_grad():
        out = model(example(family, torch.float32))
    found[method] = out if isinstance(out, torch.Tensor) else out[0]
torch.save(found, folder + "/outputs.pt")
"""
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": IMPORTABLE},
        check=True,
        timeout=300,
    )

    found = torch.load(tmp_path / "outputs.pt")
    assert {m for m in outputs if not torch.equal(found[m], outputs[m])} == set()
    fresh = {
        m: make(family, torch.float32)(example_of(family, torch.float32)) for m, (family, _) in FRESH.items()
    }
    assert not any(
        torch.equal(outputs[m], y if isinstance(y, torch.Tensor) else y[0]) for m, y in fresh.items()
    )


@pytest.mark.parametrize("method", [*medpeft.methods(), "lora+bias"])
def test_a_file_holds_exactly_what_training_changed(method, tmp_path):
    base, model = Golden(), trained(Golden(), method)
    medpeft.save(model, tmp_path / "a.safetensors")

    saved, before = load_file(tmp_path / "a.safetensors"), base.state_dict()
    # In a file, what adapters share has the name that it would have in the first of them.
    in_file = {id(tensor): name for name, tensor in own_state(model)}
    state = {
        in_file.get(id(tensor), name): tensor for name, tensor in model.state_dict(keep_vars=True).items()
    }
    tensors = (*model.named_parameters(), *model.named_buffers())
    once = {in_file.get(id(tensor), name) for name, tensor in tensors}
    changed = {
        name for name in once & set(state) if name not in before or not torch.equal(state[name], before[name])
    }
    statistics = {n for n, _ in model.named_buffers() if method == "full"}  # They adapt, and nothing ran yet.
    assert set(saved) - statistics == changed
    assert all(torch.equal(saved[name], state[name]) for name in saved)
    medpeft.load(base, tmp_path / "a.safetensors")
    assert torch.equal(base.eval()(example()), model(example()))


@pytest.mark.parametrize("policy", ["frozen", "adapt"])
def test_batchnorm_buffers_are_saved_only_where_they_adapt(policy, tmp_path):
    model = trained(Golden(), "bn", batchnorm=policy)
    medpeft.save(model, tmp_path / "a.safetensors")

    saved = load_file(tmp_path / "a.safetensors")
    assert ("layer.bn1.running_mean" in saved) == (policy == "adapt")
    assert ("layer.bn1.num_batches_tracked" in saved) == (policy == "adapt")
    fresh = medpeft.load(Golden(), tmp_path / "a.safetensors")
    fresh.train()
    assert fresh.layer.bn1.training == (policy == "adapt")
    assert torch.equal(fresh.eval()(example()), model(example()))


def test_a_loaded_model_trains_what_the_saved_one_did(file):
    saved, loaded = trained(Golden(), "lora+bias"), medpeft.load(Golden(), file)

    assert [(n, p.requires_grad) for n, p in loaded.named_parameters()] == [
        (n, p.requires_grad) for n, p in saved.named_parameters()
    ]
    assert str(medpeft.report(loaded)) == str(medpeft.report(saved))
    base = Golden().state_dict()
    assert all(torch.equal(t, base[n]) for n, t in medpeft.remove(loaded).state_dict().items())


def test_loading_into_a_model_adapted_alike_swaps_values_in_place(file):
    model = trained(Golden(), "lora+bias", seed=5)
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    compiled(example())
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    medpeft.load(model, file)

    expected = medpeft.load(Golden(), file).eval()(example())
    assert torch.allclose(compiled(example()), expected, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames, "it was compiled again"
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_saving_twice_writes_the_same_bytes(file, tmp_path):
    model = trained(Golden(), "lora+bias")
    for name in ("a", "b"):
        medpeft.save(model, tmp_path / name, metadata={"classes": ["a", "b", "c"], "epochs": 3})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == file.read_bytes()
    medpeft.save(medpeft.load(Golden(), file), tmp_path / "c", metadata=medpeft.inspect(file).metadata)
    assert (tmp_path / "c").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_precision_survives(dtype, tmp_path):
    base = make("vit", dtype)
    model = trained(copy.deepcopy(base), "lora+bias", rank=2)
    medpeft.save(model, tmp_path / "a.safetensors")
    loaded = medpeft.load(base, tmp_path / "a.safetensors")

    assert {n: p.dtype for n, p in loaded.named_parameters()} == {
        n: p.dtype for n, p in model.named_parameters()
    }
    assert torch.equal(loaded(example_of("vit", dtype)), model(example_of("vit", dtype)))


def test_a_model_converted_after_apply_is_restored_in_its_precision(tmp_path):
    model = trained(make("vit", torch.float32), "lora", rank=2).to(torch.bfloat16)
    medpeft.save(model, tmp_path / "a.safetensors")
    loaded = medpeft.load(make("vit", torch.float32).to(torch.bfloat16), tmp_path / "a.safetensors")
    x = example_of("vit", torch.bfloat16)
    assert loaded.blocks[0].attn.qkv.adapters.lora.down.dtype == torch.bfloat16
    assert torch.equal(loaded(x), model(x))


def test_values_are_not_rounded_into_a_narrower_model_unless_asked(tmp_path):
    medpeft.save(trained(Golden(), "lora"), tmp_path / "a.safetensors")
    narrow = trained(Golden(), "lora")
    narrow.blocks[0].attn.qkv.adapters.to(torch.bfloat16)
    assert "lora.down': float32 in the file, bfloat16 in the model" in refusal(
        narrow, tmp_path / "a.safetensors"
    )
    medpeft.load(narrow, tmp_path / "a.safetensors", check_base=False)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4)] * 2)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_shared_layers_and_tied_weights_are_saved_once(tmp_path):
    model = trained(randomise(Tied()), "lora+bias", target="layers.*")
    medpeft.save(model, tmp_path / "a.safetensors")
    loaded = medpeft.load(randomise(Tied()), tmp_path / "a.safetensors")

    saved = load_file(tmp_path / "a.safetensors")
    assert len(saved) == len({t.data_ptr() for t in saved.values()})
    assert [n for n in saved if "layers.1" in n or n == "head.weight"] == []
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded(torch.arange(5)), model(torch.arange(5)))


def test_tensors_that_are_views_or_not_contiguous_are_saved_by_value(tmp_path):
    model = trained(Golden(), "bias")
    flat = torch.arange(24.0)
    model.head.weight.data = flat[:12].view(4, 3).t()
    model.head.bias.data = flat[2:5]
    medpeft.save(model, tmp_path / "a.safetensors")
    loaded = medpeft.load(Golden(), tmp_path / "a.safetensors")
    assert torch.equal(loaded.head.weight, model.head.weight)
    assert torch.equal(loaded.head.bias, model.head.bias)
    assert (tmp_path / "a.safetensors").stat().st_size < 5000


@pytest.mark.cuda
def test_a_file_saved_on_a_gpu_loads_on_the_cpu_and_back(tmp_path):
    model = trained(Golden(), "lora+bias").cuda()
    medpeft.save(model, tmp_path / "a.safetensors")
    loaded = medpeft.load(Golden(), tmp_path / "a.safetensors")
    assert torch.equal(loaded.head.weight, model.head.weight.cpu())
    again = medpeft.load(Golden().cuda(), tmp_path / "a.safetensors").eval()
    assert torch.equal(again(example().cuda()), model(example().cuda()))
