"""LoRA files of peft: it loads what medpeft wrote, and the other way round, with the same outputs."""

import copy
import json
import random
import warnings

import pytest
import torch
from lora_files import PEFT_WARNINGS, close, refused, trained_by_peft
from models import example, make, output, randomise_adapters
from safetensors.torch import load_file, save_file
from torch import nn

import medpeft
from medpeft.interchange import from_peft, lora_file, to_peft

pytestmark = PEFT_WARNINGS

peft = pytest.importorskip("peft")

MODELS = {
    "fused qkv": ("vit", {"rank": 4, "alpha": 6}),
    "one part of a fused qkv": ("vit", {"rank": 3, "parts": "v"}),
    "every linear": ("vit", {"rank": 2, "target": "blocks.*", "parts": "qkvo", "rslora": True, "alpha": 3.0}),
    "separate projections": ("hf_vit", {"rank": 4, "parts": "qkvo"}),
    "heads before parts": ("coatnet", {"rank": 2, "target": "attention"}),
    "convolutions": ("monai_densenet", {"rank": 2, "alpha": 5}),
    "convolutions in 3-d": (
        "monai_unet3d",
        {"rank": 2, "target": ["model.0.*", "model.1.*"], "exclude": "*.conv.unit1.conv"},
    ),
    "pissa": ("vit", {"rank": 2, "init": "pissa"}),
    "olora": ("hf_vit", {"rank": 2, "init": "olora", "alpha": 4}),
}


def adapted(family, **options):
    model = randomise_adapters(medpeft.apply(make(family), "lora", **options), size=0.3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and ".adapters." not in name:
                p.add_(0.1)
    return model.eval()


@pytest.mark.parametrize("case", MODELS)
def test_peft_loads_what_medpeft_wrote_and_computes_the_same(case, tmp_path):
    family, options = MODELS[case]
    model, x = adapted(family, **options), example(family)
    to_peft(model, tmp_path)

    theirs = peft.PeftModel.from_pretrained(make(family), tmp_path).eval()
    with torch.no_grad():
        assert close(output(theirs, x), output(model, x))
        assert not close(output(make(family), x), output(model, x))
    back = from_peft(make(family), tmp_path)
    assert close(output(back.eval(), x), output(model, x))
    # Of PiSSA and OLoRA the file holds the change alone.
    if "init" not in options:
        assert medpeft.report(back).trainable == medpeft.report(model).trainable


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("vit", {"r": 4, "lora_alpha": 7, "target_modules": ["qkv", "fc1"], "modules_to_save": ["head"]}),
        (
            "vit",
            {"r": 4, "target_modules": r"blocks.*(qkv|proj|fc\d)", "use_rslora": True, "lora_dropout": 0.1},
        ),
        ("vit", {"r": 4, "target_modules": ["qkv", "proj"], "rank_pattern": {"blocks.0.attn.qkv": 2}}),
        (
            "vit",
            {"r": 4, "target_modules": ["qkv"], "alpha_pattern": {"^blocks.1.attn.qkv": 1, "attn.qkv": 3}},
        ),
        ("vit", {"r": 4, "target_modules": ["qkv"], "layers_to_transform": [1], "layers_pattern": "blocks"}),
        ("vit", {"r": 4, "target_modules": ["qkv"], "init_lora_weights": "orthogonal"}),
        ("vit", {"r": 4, "target_modules": ["qkv"], "init_lora_weights": "eva"}),
        ("hf_vit", {"r": 3, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}),
        ("monai_densenet", {"r": 2, "lora_alpha": 3, "target_modules": r"features\..*conv\d"}),
    ],
)
def test_medpeft_loads_what_peft_wrote_and_computes_the_same(family, options, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        theirs = trained_by_peft(make(family), tmp_path, **options)
    ours = from_peft(make(family), tmp_path).eval()

    x = example(family)
    assert close(output(ours, x), output(theirs, x))
    assert not close(output(ours, x), output(make(family), x))
    medpeft.save(ours, tmp_path / "ours.safetensors")
    assert torch.equal(output(medpeft.load(make(family), tmp_path / "ours.safetensors"), x), output(ours, x))


def test_mica_is_read_as_the_lora_that_it_is(tmp_path):
    base = make("vit").float()  # In which alone peft starts it.
    theirs = trained_by_peft(
        copy.deepcopy(base), tmp_path, r=4, target_modules=["qkv"], init_lora_weights="mica"
    )
    x = example("vit")
    ours = from_peft(copy.deepcopy(base).double(), tmp_path).eval()
    assert close(output(ours, x), output(theirs.double(), x))
    assert not close(output(ours, x), output(base.double().eval(), x))


def test_the_transposed_linear_layer_of_transformers_goes_to_peft_and_back(tmp_path):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    base = nn.Sequential(Conv1D(6, 8), nn.ReLU(), nn.Linear(6, 2)).double()
    model = medpeft.apply(copy.deepcopy(base), "lora", target="0", head=None, rank=2)
    randomise_adapters(model, size=0.3)
    x = torch.randn(3, 8, dtype=torch.float64)
    to_peft(model, tmp_path)

    assert close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), model(x))
    assert close(from_peft(copy.deepcopy(base), tmp_path, head=None)(x), model(x))

    # peft itself writes fan_in_fan_out=True into such files.
    theirs = trained_by_peft(
        copy.deepcopy(base), tmp_path, r=2, lora_alpha=3, target_modules=["0"], use_dora=True
    )
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"]
    assert close(from_peft(base, tmp_path, head=None)(x), theirs(x))


def test_an_adapted_head_of_a_file_needs_a_model_without_one(tmp_path):
    theirs = trained_by_peft(make("vit"), tmp_path, r=4, target_modules=["qkv", "head"])
    refused(
        from_peft,
        make("vit"),
        tmp_path,
        "'head': in the file, but it is the head, trained whole: pass head=None",
    )
    x = example("vit")
    assert close(output(from_peft(make("vit"), tmp_path, head=None).eval(), x), output(theirs, x))


def test_parts_that_one_layer_leaves_out_stay_zero_there(tmp_path):
    model = adapted("vit", rank=2, parts="qkv")
    with torch.no_grad():
        model.blocks[1].attn.qkv.adapters.lora.up[16:32] = 0
    to_peft(model, tmp_path)
    back = from_peft(make("vit"), tmp_path).eval()
    assert close(output(back, example("vit")), output(model, example("vit")))
    assert medpeft.report(back).trainable == medpeft.report(model).trainable


def test_a_file_that_changes_one_of_several_parts_loads(tmp_path):
    model = adapted("vit", rank=2, parts="qkv")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.adapters.lora.up[:32] = 0
    to_peft(model, tmp_path)
    back = from_peft(make("vit"), tmp_path).eval()
    assert close(output(back, example("vit")), output(model, example("vit")))


def test_ranks_that_are_filled_up_still_train(tmp_path):
    trained_by_peft(
        make("vit"), tmp_path, r=4, target_modules=["qkv", "proj"], rank_pattern={"blocks.0.attn.qkv": 2}
    )
    model = from_peft(make("vit"), tmp_path)
    output(model, example("vit")).sum().backward()
    up = model.blocks[0].attn.qkv.adapters.lora.up
    assert torch.equal(up[:, 2:], torch.zeros_like(up[:, 2:]))
    assert bool((up.grad[:16, 2:] != 0).all())


@pytest.mark.parametrize(
    ("family", "method", "options", "reason"),
    [
        ("vit", "lora+norm", {}, "the methods lora+norm: these files hold lora, loha, lokr alone"),
        ("vit", "ssf", {}, "the methods ssf"),
        ("vit", "lora", {"dropout": {"blocks.0": 0.1}}, "dropout by place: these files have one for all"),
        ("vit", "lora", {"dora": {"blocks.0": True}}, "dora by place: these files have one for all"),
        ("vit", "lora", {"bias": {"blocks.0": True}}, "bias by place: these files have one for all"),
        ("vit", "lora", {"bias": True, "dora": True}, "qkv: DoRA with a bias of its own is nothing that"),
        (
            "multihead_attention",
            "lora",
            {"bias": True},
            "peft takes no bias of LoRA in nn.MultiheadAttention",
        ),
        ("vit", "lokr", {"factor": {"*.qkv": 4, "*": 2}}, "factor by place: these files have one for all"),
        ("vit", "lokr", {"input_factor": 4}, "input_factor: peft has no such option"),
        ("beit", "lora", {}, "blocks.0.attn.qkv: other code reads its weight without calling it"),
        ("multihead_attention", "lora", {"dora": True}, "attn: DoRA in nn.MultiheadAttention is nothing"),
        (
            "transformer_encoder",
            "lora",
            {"head": None},
            "layers.0.self_attn: other code reads its weight without calling it",
        ),
        ("multihead_attention_of_other_widths", "lora", {}, "attn: other code reads its weight without"),
        ("resnet", "lora", {"batchnorm": "adapt"}, "adapting BatchNorm statistics"),
        ("regnet", "lora", {"target": "conv"}, "peft's convolutions ignore groups"),
    ],
)
def test_what_peft_cannot_express_is_named_with_the_reason(family, method, options, reason, tmp_path):
    model = medpeft.apply(make(family), method, **options)
    with pytest.raises(medpeft.CheckpointError) as caught:
        to_peft(model, tmp_path)
    assert reason in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("switch", [medpeft.disabled, medpeft.merged])
def test_nothing_is_written_while_the_values_of_the_base_are_in_place(switch, tmp_path):
    model = adapted("vit")
    with (
        switch(model),
        pytest.raises(medpeft.CheckpointError, match=r"Leave medpeft\.disabled, scaled or merged"),
    ):
        to_peft(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "use_dora=True, and 'blocks.0.attn.qkv' has no lora_magnitude_vector"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"peft_type": ["LORA"]}, "is of peft_type"),
        ({"bias": "some"}, "bias='some'"),
        ({"lora_bias": True}, "lora_bias=True, and 'blocks.0.attn.qkv' has no lora_B.bias"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"alpha_pattern": {r"blocks\.(a+)+$": 3}}, "medpeft reads names of layers alone"),
        ({"lora_alpha": "4"}, "lora_alpha='4'"),
        ({"lora_dropout": 3}, "dropout=3"),
    ],
)
def test_configurations_that_lora_here_does_not_compute_are_refused(changes, reason, tmp_path):
    to_peft(adapted("vit", rank=2), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(from_peft, make("vit"), tmp_path, reason)


def test_files_that_do_not_fit_name_every_reason(tmp_path):
    to_peft(adapted("vit", rank=2), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    first = "base_model.model.blocks.0.attn.qkv.lora_B.weight"
    changed = tensors | {first: torch.zeros(3, 4), "base_model.model.norm.weight": torch.ones(16)}
    changed["base_model.model.nowhere.lora_A.weight"] = torch.zeros(2, 16)
    changed["base_model.model.nowhere.lora_B.weight"] = torch.zeros(16, 2)
    save_file(changed, path)
    for reason in (
        "'nowhere': in the file",
        "'blocks.0.attn.qkv': A (4, 16) and B (3, 4) in the file",
        "'norm.weight': in the file",
    ):
        refused(from_peft, make("vit"), tmp_path, reason)
    save_file(tensors | {"base_model.model.head.bias": torch.zeros(3, dtype=torch.int64)}, path)
    refused(
        from_peft, make("vit"), tmp_path, "'head.bias': (3,) int64 in the file, (3,) float64 in the model"
    )
    save_file(tensors | {first.replace("lora_B.weight", "lora_magnitude_vector"): torch.zeros(3)}, path)
    refused(from_peft, make("vit"), tmp_path, "'blocks.0.attn.qkv' has a lora_magnitude_vector")
    path.write_bytes(path.read_bytes()[:-1])
    refused(from_peft, make("vit"), tmp_path, "cut off")
    path.unlink()
    refused(from_peft, make("vit"), tmp_path, "cannot be read")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_damaged_files_of_peft_load_or_are_refused_and_leave_the_model(file, tmp_path):
    to_peft(adapted("vit", rank=1, parts="v"), tmp_path)
    path, draw = tmp_path / file, random.Random(0)
    data = path.read_bytes()
    refusals = 0
    for _ in range(150):
        damaged = bytearray(data)
        damaged[draw.randrange(min(len(data), 1200))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        model = make("vit")
        before = {name: t.clone() for name, t in model.state_dict().items()}
        try:
            from_peft(model, tmp_path)
        except medpeft.CheckpointError:
            refusals += 1
            assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
            assert list(before) == list(model.state_dict())
    assert refusals > 50


@pytest.mark.parametrize(("key", "refused"), [("net.diffusion_head.weight", False), ("net.diff_b", True)])
def test_differences_of_weights_are_told_by_the_last_word_of_a_key(key, refused):
    pair = {"net.fc.lora_A.weight": torch.ones(1, 2), "net.fc.lora_B.weight": torch.ones(2, 1)}
    tensors = {**pair, key: torch.ones(2)}
    if refused:
        with pytest.raises(medpeft.CheckpointError, match="whole differences of weights"):
            lora_file.sort("file", tensors, lambda *_: 1.0, ("lora",))
    else:
        assert list(lora_file.sort("file", tensors, lambda *_: 1.0, ("lora",)).others) == [key]
