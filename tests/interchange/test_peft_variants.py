"""What peft writes beside plain LoRA: DoRA, LoHa, LoKr, whole attentions, embeddings and biases."""

import copy

import pytest
import torch
from lora_files import PEFT_WARNINGS, close, refused, trained_by_peft
from models import example, make, output, randomise_adapters
from torch import nn

import medpeft
from medpeft.interchange import from_peft, to_peft

pytestmark = PEFT_WARNINGS

peft = pytest.importorskip("peft")

CONVS = r"features\..*conv\d"

FROM_PEFT = {
    "dora": (
        "vit",
        "LoraConfig",
        {"r": 4, "lora_alpha": 7, "target_modules": ["qkv", "fc1"], "use_dora": True},
    ),
    "dora of convolutions": (
        "monai_densenet",
        "LoraConfig",
        {"r": 2, "target_modules": CONVS, "use_dora": True},
    ),
    "attentions as a whole": (
        "multihead_attention",
        "LoraConfig",
        {"r": 3, "lora_alpha": 5, "target_modules": ["attn", "classifier"]},
    ),
    "attentions with a pattern": (
        "multihead_attention",
        "LoraConfig",
        {"r": 3, "target_modules": ["attn", "classifier"], "alpha_pattern": {"attn": 9}},
    ),
    "all biases": ("vit", "LoraConfig", {"r": 2, "target_modules": ["qkv"], "bias": "all"}),
    "biases of LoRA": ("vit", "LoraConfig", {"r": 2, "target_modules": ["qkv", "fc1"], "bias": "lora_only"}),
    "lora with biases": (
        "vit",
        "LoraConfig",
        {"r": 2, "lora_alpha": 5, "target_modules": ["qkv", "fc1"], "lora_bias": True},
    ),
    "lora of convolutions with biases": (
        "monai_densenet",
        "LoraConfig",
        {"r": 2, "lora_alpha": 5, "target_modules": CONVS, "lora_bias": True},
    ),
    "loha": ("vit", "LoHaConfig", {"r": 2, "alpha": 5, "target_modules": ["qkv", "fc1"]}),
    "loha of several ranks": (
        "vit",
        "LoHaConfig",
        {"r": 4, "target_modules": ["qkv", "fc1"], "rank_pattern": {"fc1": 2}, "alpha_pattern": {"fc1": 5}},
    ),
    "loha of convolutions": ("monai_densenet", "LoHaConfig", {"r": 2, "target_modules": CONVS}),
    "loha with cores": (
        "monai_densenet",
        "LoHaConfig",
        {"r": 2, "target_modules": CONVS, "use_effective_conv2d": True},
    ),
    "lokr": ("vit", "LoKrConfig", {"r": 2, "alpha": 5, "target_modules": ["qkv", "proj"]}),
    "lokr with both as products": (
        "vit",
        "LoKrConfig",
        {"r": 1, "target_modules": ["qkv", "fc1"], "decompose_both": True, "decompose_factor": 4},
    ),
    "lokr of whole factors": (
        "vit",
        "LoKrConfig",
        {"r": 64, "alpha": 3, "target_modules": ["qkv"], "alpha_pattern": {"blocks.0.attn.qkv": 9}},
    ),
    "lokr with cores": (
        "monai_densenet",
        "LoKrConfig",
        {"r": 1, "target_modules": CONVS, "use_effective_conv2d": True, "decompose_factor": 2},
    ),
}


@pytest.mark.parametrize("case", FROM_PEFT)
def test_medpeft_loads_each_variant_of_peft_and_computes_the_same(case, tmp_path):
    family, config, options = FROM_PEFT[case]
    theirs = trained_by_peft(make(family), tmp_path, config, **options)
    x = example(family)
    ours = from_peft(make(family), tmp_path, head=None).eval()
    assert close(output(ours, x), output(theirs, x))
    assert not close(output(ours, x), output(make(family).eval(), x))


TO_PEFT = {
    "dora": ("vit", "lora", {"rank": 3, "dora": True, "parts": "qv", "alpha": 5}),
    "dora of every part": ("hf_vit", "lora", {"rank": 2, "dora": True, "parts": "qkvo"}),
    "dora of convolutions": ("monai_densenet", "lora", {"rank": 2, "dora": True, "target": "*.conv1"}),
    "attentions": ("multihead_attention", "lora", {"rank": 2, "parts": "qkvo", "alpha": 3}),
    "half of attentions": ("multihead_attention", "lora", {"rank": 2, "parts": "qv"}),
    "the other half": ("multihead_attention", "lora", {"rank": 2, "parts": "o"}),
    "biases": ("vit", "lora+bias", {}),
    "biases of attentions": ("multihead_attention", "lora+bitfit", {}),
    "lora with biases": ("vit", "lora", {"rank": 2, "alpha": 3, "parts": "qv", "bias": True}),
    "pissa with biases": ("hf_vit", "lora", {"rank": 2, "init": "pissa", "bias": True}),
    "lora of convolutions with biases": (
        "monai_densenet",
        "lora",
        {"rank": 2, "target": "*.conv1", "bias": True},
    ),
    "loha": ("vit", "loha", {"rank": 2, "alpha": 3}),
    "loha with cores": ("monai_densenet", "loha", {"rank": 2, "tucker": True}),
    "lokr": ("vit", "lokr", {"rank": 2, "alpha": 3, "factor": 4}),
    "lokr of convolutions": (
        "monai_densenet",
        "lokr",
        {"rank": 1, "factor": 2, "both": True, "tucker": True},
    ),
    "lokr of whole factors": ("vit", "lokr", {"rank": 10_000, "alpha": 7}),
}


@pytest.mark.parametrize("case", TO_PEFT)
def test_peft_loads_each_variant_of_medpeft_and_computes_the_same(case, tmp_path):
    family, method, options = TO_PEFT[case]
    model = randomise_adapters(medpeft.apply(make(family), method, head=None, **options), size=0.3).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and ".adapters." not in name:
                p.add_(0.1)
    x = example(family)
    to_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(family), tmp_path).eval()
    assert close(output(theirs, x), output(model, x))
    assert not close(output(make(family).eval(), x), output(model, x))
    back = from_peft(make(family), tmp_path, head=None).eval()
    assert close(output(back, x), output(model, x))


def embedded():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 6, padding_idx=1), nn.Flatten(), nn.Linear(18, 2)).double().eval()


def test_embeddings_go_to_peft_and_back(tmp_path):
    x = torch.tensor([[0, 1, 2], [3, 4, 10]])
    model = medpeft.apply(embedded(), "lora", target=["0", "2"], head=None, rank=2, alpha=3)
    randomise_adapters(model, size=0.3)
    to_peft(model, tmp_path)
    assert close(peft.PeftModel.from_pretrained(embedded(), tmp_path)(x), model(x))
    assert close(from_peft(embedded(), tmp_path, head=None)(x), model(x))

    theirs = trained_by_peft(embedded(), tmp_path, r=2, lora_alpha=5, target_modules=["0"])
    assert close(from_peft(embedded(), tmp_path, head=None)(x), theirs(x))


def test_dora_of_an_embedding_is_refused_as_peft_means_another(tmp_path):
    model = medpeft.apply(embedded(), "lora", target="0", head=None, dora=True)
    with pytest.raises(
        medpeft.CheckpointError, match="0: DoRA of an embedding learns the norms of its columns"
    ):
        to_peft(model, tmp_path)
    trained_by_peft(embedded(), tmp_path, r=2, target_modules=["0"], use_dora=True)
    refused(from_peft, embedded(), tmp_path, "DoRA of an embedding", head=None)


def test_half_of_an_attention_that_peft_would_not_adapt_is_refused(tmp_path):
    trained_by_peft(make("multihead_attention"), tmp_path, r=2, target_modules=["out_proj"])
    refused(
        from_peft,
        make("multihead_attention"),
        tmp_path,
        "peft adapts nn.MultiheadAttention as a whole, and the file holds half of it",
        head=None,
    )


def test_the_methods_of_one_file_are_one(tmp_path):
    methods = {"lora": {"target": "*.qkv"}, "loha": {"target": "*.fc1"}}
    model = medpeft.apply(make("vit"), methods, head=None)
    with pytest.raises(medpeft.CheckpointError, match="a file of peft holds one method"):
        to_peft(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["IA3", "VERA", "OFT", "BONE"])
def test_other_methods_of_peft_are_named_with_the_way_round(kind, tmp_path):
    (tmp_path / "adapter_config.json").write_text(f'{{"peft_type": "{kind}"}}')
    refused(from_peft, make("vit"), tmp_path, f"{kind}'; medpeft reads LORA, LOHA, LOKR. Merge it")


def test_a_model_of_lokr_that_came_back_trains_on(tmp_path):
    to_peft(medpeft.apply(make("vit"), "lokr", rank=2, head=None), tmp_path)
    model = from_peft(copy.deepcopy(make("vit")), tmp_path, head=None)
    output(model, example("vit")).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def with_conv1d():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(6, 8, 3), nn.Flatten(), nn.Linear(64, 3)).double().eval()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("loha", {"tucker": True}),
        ("lokr", {"factor": 2, "rank": 1}),
        ("lokr", {"factor": 1, "tucker": True}),
        ("lokr", {"factor": 1, "rank": 10_000}),
    ],
)
def test_changes_of_a_conv1d_go_to_peft_and_back(method, options, tmp_path):
    x = torch.randn(2, 6, 10, dtype=torch.float64)
    model = medpeft.apply(with_conv1d(), method, target="0", head=None, **{"rank": 2, **options})
    randomise_adapters(model, size=0.3)
    to_peft(model, tmp_path)
    assert close(peft.PeftModel.from_pretrained(with_conv1d(), tmp_path)(x), model(x))
    assert close(from_peft(with_conv1d(), tmp_path, head=None)(x), model(x))


def test_lokr_of_a_conv1d_that_peft_puts_together_in_another_order_is_refused(tmp_path):
    model = medpeft.apply(with_conv1d(), "lokr", target="0", head=None, rank=1, tucker=True, factor=2)
    with pytest.raises(medpeft.CheckpointError, match=r"0: peft .* fails at LoKr with a core on a Conv1d"):
        to_peft(model, tmp_path)
    model = medpeft.apply(with_conv1d(), "lokr", target="0", head=None, rank=2)
    with pytest.raises(medpeft.CheckpointError, match=r"0: peft .* in another way where D is whole"):
        to_peft(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
    trained_by_peft(with_conv1d(), tmp_path, "LoKrConfig", r=2, target_modules=["0"])
    refused(from_peft, with_conv1d(), tmp_path, "in another way where D is whole", head=None)


def test_modules_that_a_file_holds_beside_the_head_are_named_in_head(tmp_path):
    theirs = trained_by_peft(
        make("vit"), tmp_path, r=4, target_modules=["qkv"], modules_to_save=["head", "norm"]
    )
    reason = "'norm.weight': in the file, and neither a change of a layer nor in the head head: head= takes the names"
    refused(from_peft, make("vit"), tmp_path, reason)
    x = example("vit")
    assert close(output(from_peft(make("vit"), tmp_path, head=["head", "norm"]).eval(), x), output(theirs, x))
