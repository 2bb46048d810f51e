"""Save, load and inspect: a file holds what training changed, and loads exactly where it belongs or nowhere."""

import copy
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
from golden.model import Golden, example
from models import example as example_of
from models import make, randomise
from safetensors.torch import load_file
from torch import nn

import medpeft

HERE = Path(__file__).parent

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


def trained(model, method="lora", seed=1, **options):
    """An adapted model with other values in everything that trains, in eval mode."""
    medpeft.apply(model, method, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator).to(p.dtype))
        if options.get("batchnorm") == "adapt":
            for name, buffer in model.named_buffers():
                if "running" in name:
                    buffer.mul_(1.5)
    return model.eval()


def bits(model):
    """Everything that a failed call must leave as it was."""
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    return state, [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()], set(vars(model))


def same(before, after):
    return (
        before[1:] == after[1:]
        and before[0].keys() == after[0].keys()
        and all(torch.equal(t, after[0][name]) and t.dtype == after[0][name].dtype for name, t in before[0].items())
    )


def refusal(model, path, **options):
    """The message of a load that must fail and leave the model as it was."""
    before = bits(model)
    with pytest.raises(medpeft.CheckpointError) as caught:
        medpeft.load(model, path, **options)
    assert same(before, bits(model))
    return str(caught.value)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "derm.safetensors"
    medpeft.save(trained(Golden(), "lora+bias"), path, metadata={"classes": ["a", "b", "c"], "epochs": 3})
    return path


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
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=HERE, check=True, timeout=300)

    found = torch.load(tmp_path / "outputs.pt")
    assert {m for m in outputs if not torch.equal(found[m], outputs[m])} == set()
    fresh = {m: make(family, torch.float32)(example_of(family, torch.float32)) for m, (family, _) in FRESH.items()}
    assert not any(torch.equal(outputs[m], y if isinstance(y, torch.Tensor) else y[0]) for m, y in fresh.items())


@pytest.mark.parametrize("method", [*medpeft.methods(), "lora+bias"])
def test_a_file_holds_exactly_what_training_changed(method, tmp_path):
    base, model = Golden(), trained(Golden(), method)
    medpeft.save(model, tmp_path / "a.safetensors")

    saved, state, before = load_file(tmp_path / "a.safetensors"), model.state_dict(), base.state_dict()
    once = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}  # Shared ones under their first name.
    changed = {name for name in once & set(state) if name not in before or not torch.equal(state[name], before[name])}
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


def test_a_model_adapted_in_another_way_is_told_what_differs(file):
    message = refusal(trained(Golden(), {"lora": {"rank": 2}, "bias": {}}), file)
    assert "lora: rank=8 in the file, 2 here" in message
    message = refusal(trained(Golden(), "lora"), file)
    assert "method: lora+bias in the file, lora here" in message
    message = refusal(trained(Golden(), "lora+bias", target="*", head="head"), file)
    assert "adapters at 'layer.conv1.weight'" in message or "adapters at 'blocks.0.attn.proj.weight'" in message
    message = refusal(trained(Golden(), "lora+bias", batchnorm="adapt"), file)
    assert "batchnorm: 'frozen' in the file, 'adapt' here" in message


def test_another_base_is_refused_and_the_part_that_differs_is_named(file):
    other = Golden()
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight[2, 3] += 1e-3
    message = refusal(other, file)
    assert "values: 1 of 13 frozen tensors are not those of its base: 'blocks.0.mlp.fc1.weight'" in message
    assert "check_base=False" in message
    medpeft.load(other, file, check_base=False)

    wide = Golden(width=8)
    message = refusal(wide, file)
    assert "shapes: 'stem.weight' is 4x1x3x3 float32 in the file's base, 8x1x3x3 float32 here" in message
    message = refusal(wide, file, check_base=False)
    assert "'blocks.0.attn.qkv.adapters.lora.down': (16, 4) in the file, (16, 8) in the model" in message
    assert "'head.weight': (3, 4) in the file, (3, 8) in the model" in message

    message = refusal(Golden().half(), file)
    assert "float32 in the file's base, 4x1x3x3 float16 here" in message

    message = refusal(make("resnet", torch.float32), file)
    assert "architecture: Golden in the file, ResNet (resnet26.bt_in1k) here" in message
    message = refusal(make("resnet", torch.float32), file, check_base=False)
    assert "'lora+bias' fits no 'blocks.0.attn.qkv.weight'" in message


def test_the_base_digest_finds_a_permuted_weight_and_ignores_adaptation(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(512, 768), nn.Linear(768, 4))
    medpeft.save(trained(copy.deepcopy(base), "lora", target="0", head="1"), tmp_path / "a.safetensors")
    medpeft.load(trained(copy.deepcopy(base), "lora", target="0", head="1"), tmp_path / "a.safetensors")
    with torch.no_grad():
        base[0].weight.copy_(base[0].weight.flip(1))
    assert "'0.weight'" in refusal(base, tmp_path / "a.safetensors")


def test_another_number_of_classes_names_num_classes(file):
    message = refusal(Golden(classes=7), file)
    assert "'head.weight': (3, 4) in the file, (7, 4) in the model" in message
    assert "'head.bias': (3,) in the file, (7,) in the model" in message
    assert "num_classes=3" in message


def test_the_head_can_be_skipped_or_drawn_anew_for_another_task(file):
    model = Golden(classes=7)
    own = model.head.weight.detach().clone()
    medpeft.load(model, file, head="skip")
    assert torch.equal(model.head.weight, own)
    assert model.head.weight.requires_grad

    models = Golden(classes=7), Golden(classes=7)
    state = torch.random.get_rng_state()
    drawn = [medpeft.load(model, file, head="reinit").head.weight for model in models]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], own)
    with pytest.raises(medpeft.MedpeftError, match="'strict', 'skip', 'reinit'"):
        medpeft.load(Golden(), file, head="new")


def test_a_backbone_without_a_head_takes_the_adapters(file):
    model = Golden()
    model.head = nn.Identity()
    medpeft.load(model, file, head="skip")
    whole = medpeft.load(Golden(), file)
    assert torch.equal(whole.head(model.eval()(example())), whole.eval()(example()))


def test_a_swap_can_skip_the_head_too(file):
    model = trained(Golden(), "lora+bias", seed=4)
    own = model.head.weight.detach().clone()
    medpeft.load(model, file, head="skip")
    assert torch.equal(model.head.weight, own)
    assert torch.equal(model.stem.bias, medpeft.load(Golden(), file).stem.bias)


def test_every_misfit_is_listed_in_one_error(file, tmp_path):
    from medpeft.file import write
    from medpeft.header import KEY, compose

    header, tensors = medpeft.inspect(file), load_file(file)
    tensors["extra"] = tensors.pop("stem.bias")
    tensors["head.bias"] = torch.zeros(5)
    tensors["layer.bn1.bias"] = torch.zeros(4, dtype=torch.int64)
    said = {k: v for k, v in header.document.items() if k != "content"}
    write(str(tmp_path / "b.safetensors"), tensors, {KEY: compose(said, tensors)})

    message = refusal(Golden(), tmp_path / "b.safetensors")
    assert "'stem.bias': in the model, missing in the file" in message
    assert "'extra': in the file, the model has no such tensor" in message
    assert "'head.bias': (5,) in the file, (3,) in the model" in message
    assert "'layer.bn1.bias': int64 in the file, float32 in the model" in message


def test_inspect_reads_the_header_alone(file):
    length = int.from_bytes(file.read_bytes()[:8], "little")
    shown = medpeft.inspect(file)
    data = bytearray(file.read_bytes())
    data[8 + length :] = bytes(len(data) - 8 - length)  # The tensors are other ones.

    assert medpeft.inspect(bytes(data)).to_dict()["tensors"] == shown.to_dict()["tensors"]
    assert "altered" in refusal(Golden(), bytes(data))
    said = json.loads(json.dumps(shown.to_dict()))
    assert said["methods"]["lora"]["rank"] == 8
    assert said["metadata"] == {"classes": ["a", "b", "c"], "epochs": 3}
    assert said["sites"] == [["lora", "blocks.0.attn.qkv", "weight"]]
    assert said["tensors"]["head.bias"] == {"dtype": "float32", "shape": [3]}
    assert shown.classes == ["a", "b", "c"]
    for text in ("lora+bias", "a, b, c", "epochs: 3", "blocks.0.attn.qkv", "medpeft 0", "Golden", "frozen"):
        assert text in str(shown)


def test_a_timm_model_says_its_architecture_and_the_input_it_expects(tmp_path):
    model = trained(make("vit", torch.float32), "ssf")
    medpeft.save(model, tmp_path / "a.safetensors")
    said = medpeft.inspect(tmp_path / "a.safetensors").to_dict()

    assert said["base"]["architecture"] == "vit_tiny_patch16_224"
    assert said["base"]["tag"] == "augreg_in21k_ft_in1k"
    assert said["input"]["mean"] == list(model.pretrained_cfg["mean"])


def test_a_file_loads_from_a_path_a_string_bytes_and_the_hub(file, monkeypatch):
    import huggingface_hub

    expected = medpeft.load(Golden(), file).eval()(example())
    asked = []

    def download(repository, name, revision=None):
        asked.append((repository, name, revision))
        if repository != "ward/derm":
            raise RuntimeError("404: no such repository")
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for source in (str(file), file.read_bytes(), "hf://ward/derm/a/derm.safetensors", "hf://ward/derm@v2/derm.safetensors"):
        assert torch.equal(medpeft.load(Golden(), source).eval()(example()), expected)
    assert asked == [("ward/derm", "a/derm.safetensors", None), ("ward/derm", "derm.safetensors", "v2")]
    assert "404" in refusal(Golden(), "hf://ward/other/derm.safetensors")
    assert "hf://owner/repository/file" in refusal(Golden(), "hf://ward/derm")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refusal(Golden(), "hf://ward/derm/derm.safetensors")


def test_files_are_saved_read_and_loaded_without_a_socket(file, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    model = medpeft.load(Golden(), file)
    medpeft.save(model, file)
    assert medpeft.inspect(file).classes is None


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

    assert {n: p.dtype for n, p in loaded.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
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
    assert "lora.down': float32 in the file, bfloat16 in the model" in refusal(narrow, tmp_path / "a.safetensors")
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_file_saved_on_a_gpu_loads_on_the_cpu_and_back(tmp_path):
    model = trained(Golden(), "lora+bias").cuda()
    medpeft.save(model, tmp_path / "a.safetensors")
    loaded = medpeft.load(Golden(), tmp_path / "a.safetensors")
    assert torch.equal(loaded.head.weight, model.head.weight.cpu())
    again = medpeft.load(Golden().cuda(), tmp_path / "a.safetensors").eval()
    assert torch.equal(again(example().cuda()), model(example().cuda()))


def test_the_meta_device_is_refused_with_the_reason(file, tmp_path):
    with torch.device("meta"):
        blank = Golden()
    with pytest.raises(medpeft.CheckpointError, match=r"meta device, which holds no values: load the base's weights first"):
        medpeft.load(blank, file)
    assert not hasattr(blank.blocks[0].attn.qkv, "adapters")
    with pytest.raises(medpeft.CheckpointError, match="meta device"):
        medpeft.save(medpeft.apply(blank, "lora"), tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize(
    ("metadata", "part"),
    [
        ({"loss": float("nan")}, "metadata['loss']"),
        ({"folds": [{"model": nn.Identity()}]}, "metadata['folds'][0]['model']"),
        ({"classes": {1: "a"}}, "metadata['classes']"),
        ({"classes": [1, 2]}, "names of the classes"),
        (["a"], "must be a dict"),
        ({"when": torch.tensor(1.0)}, "metadata['when']"),
    ],
)
def test_metadata_that_is_no_json_is_refused_by_name(metadata, part, file):
    before = file.read_bytes()
    with pytest.raises(medpeft.CheckpointError) as caught:
        medpeft.save(trained(Golden(), "lora"), file, metadata=metadata)
    assert part in str(caught.value)
    assert file.read_bytes() == before


def test_metadata_that_contains_itself_or_is_huge_is_refused(tmp_path):
    loop = {}
    loop["again"] = loop
    model = trained(Golden(), "lora")
    with pytest.raises(medpeft.CheckpointError, match="deep"):
        medpeft.save(model, tmp_path / "a", metadata=loop)
    with pytest.raises(medpeft.CheckpointError, match="shorten metadata"):
        medpeft.save(model, tmp_path / "a", metadata={"log": "x" * 2**22})
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_as_apply_left_it_is_not_saved(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(medpeft.MedpeftError, match="not adapted"):
        medpeft.save(Golden(), path)
    model = trained(Golden(), "lora+bias")
    for away in (medpeft.disabled, medpeft.merged):
        with away(model), pytest.raises(medpeft.CheckpointError, match="Within medpeft"):
            medpeft.save(model, path)
    with medpeft.disabled(trained(Golden(), "bias")) as off, pytest.raises(medpeft.CheckpointError, match="Within"):
        medpeft.save(off, path)
    model.blocks[0].attn.qkv = nn.Linear(4, 12)
    with pytest.raises(medpeft.CheckpointError, match=r"'blocks\.0\.attn\.qkv', which 'lora\+bias' trains"):
        medpeft.save(model, path)
    model = trained(Golden(), "ssf")
    model.head = nn.Identity()
    with pytest.raises(medpeft.CheckpointError, match=r"'head\.weight' and 1 more.*was a layer or the head replaced"):
        medpeft.save(model, path)
    assert not path.exists()


def test_wrapped_models_are_told_where_the_adapted_one_is(file):
    wrapped = nn.Sequential(trained(Golden(), "lora+bias"))
    assert "load into its '0'" in refusal(wrapped, file)
    with pytest.raises(medpeft.MedpeftError, match="its '0' is: pass that"):
        medpeft.save(wrapped, file)


def test_a_method_of_ones_own_must_be_registered_before_loading(tmp_path, own_registry, monkeypatch):
    @medpeft.register("shifted")
    class Shifted(medpeft.Adapter):
        """A shift of every linear layer's output."""

        layers = (nn.Linear,)

        def __init__(self, site, *, sizes=(1, 2)):
            super().__init__(site)
            self.shift = nn.Parameter(torch.zeros(site.host.shape[0]))

        def forward(self, x, y):
            return y + self.shift

    model = trained(Golden(), "shifted")
    medpeft.save(model, tmp_path / "a.safetensors")
    assert torch.equal(medpeft.load(Golden(), tmp_path / "a.safetensors").eval()(example()), model(example()))
    medpeft.load(model, tmp_path / "a.safetensors")

    from medpeft import registry

    monkeypatch.delitem(registry._METHODS, "shifted")
    message = refusal(Golden(), tmp_path / "a.safetensors")
    assert "Unknown method 'shifted'" in message
    assert "import the file that registers it" in message


def test_options_that_are_no_json_are_refused(tmp_path, own_registry):
    @medpeft.register("odd")
    def odd(name, parameter, layer, *, only=()):
        """A parameter that an object names."""
        return True

    with pytest.raises(medpeft.CheckpointError, match="the options of 'odd'"):
        medpeft.save(medpeft.apply(Golden(), "odd", only=torch.float16), tmp_path / "a.safetensors")


@pytest.mark.parametrize("method", ["lora+bias", "linear_probe"])
def test_parameters_that_train_and_are_not_saved_are_refused(method, tmp_path):
    model = trained(Golden(), method).requires_grad_(True)
    with pytest.raises(medpeft.CheckpointError, match=r"'stem\.weight' and \d+ more would train, though apply froze it"):
        medpeft.save(model, tmp_path / "adapter.safetensors")
    assert not list(tmp_path.iterdir())

    model = trained(Golden(), method)
    model.auxiliary = torch.nn.Linear(2, 2)
    with pytest.raises(medpeft.CheckpointError, match=r"'auxiliary\.weight' and 1 more would train"):
        medpeft.save(model, tmp_path / "adapter.safetensors")


def test_a_copy_that_fails_half_way_leaves_the_model_as_it_was(file, monkeypatch):
    import medpeft.shards as shards

    like = shards.like

    for model in (Golden(), trained(Golden(), "lora+bias", seed=9)):
        fits = []

        def wrong(value, own, fits=fits):
            fits.append(own)
            return like(value, own) if len(fits) < 4 else torch.zeros(own.numel() + 1)

        monkeypatch.setattr(shards, "like", wrong)
        before = bits(model)
        with pytest.raises(RuntimeError):
            medpeft.load(model, file)
        assert same(before, bits(model))


def test_files_of_schema_1_are_read_for_ever():
    folder = HERE / "golden" / "schema1"
    expected = load_file(folder / "outputs.safetensors")
    assert len(expected) >= 19
    for case, output in expected.items():
        model = medpeft.load(Golden(), folder / f"{case}.safetensors").eval()
        difference = (model(example()) - output).abs().max() / output.abs().max()
        assert difference < 1e-5, f"{case} computes something else: {difference:.1e}"
        assert medpeft.inspect(folder / f"{case}.safetensors").metadata["case"] == case
        assert not torch.allclose(Golden().eval()(example()), output, atol=1e-3), f"{case} does nothing"


def test_every_built_in_method_has_a_golden_file():
    folder = HERE / "golden" / "schema1"
    built_in = {name for name, m in medpeft.registry._METHODS.items() if m.define.__module__.startswith("medpeft.")}
    assert built_in <= {path.stem for path in folder.glob("*.safetensors")}


def test_other_tools_read_the_file(file):
    with safetensors.safe_open(file, framework="pt") as opened:
        assert "head.weight" in opened.keys()  # noqa: SIM118 - it has no __contains__
        assert json.loads(opened.metadata()["medpeft"])["schema"] == 1
