"""Parameter groups: what decays and how fast it learns."""

import pytest
import torch
from models import make

import medpeft


def rates(model, **options):
    """(lr, weight_decay, group) of every parameter by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = medpeft.parameter_groups(model, **options)
    assert all(group["params"] for group in groups)
    return {names[id(p)]: (g["lr"], g["weight_decay"], g["name"]) for g in groups for p in g["params"]}


def test_every_trainable_parameter_is_in_one_group():
    model = medpeft.apply(make("vit"), "lora+ssf+bias+svdiff+adaptformer")
    grouped = [id(p) for group in medpeft.parameter_groups(model, lr=1e-3) for p in group["params"]]

    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("family", "method"), [("vit", "ssf"), ("resnet", "ssf"), ("vit", "svdiff"), ("vit", "bias+norm")]
)
def test_scales_shifts_and_biases_are_not_decayed(family, method):
    model = medpeft.apply(make(family), method, head=None)

    assert {decay for _, decay, _ in rates(model, lr=1e-3, weight_decay=0.1).values()} == {0.0}
    assert all(p.ndim <= 1 for p in model.parameters() if p.requires_grad)


def test_a_tsa_vector_and_a_learnable_scale_are_not_decayed():
    vector = medpeft.apply(make("resnet"), "tsa", form="vector", head=None)
    former = medpeft.apply(make("vit"), "adaptformer", scale="learnable", head=None)

    assert {decay for _, decay, _ in rates(vector, lr=1e-3, weight_decay=0.1).values()} == {0.0}
    assert {n.rpartition(".")[2]: decay for n, (_, decay, _) in rates(former, lr=1e-3, weight_decay=0.1).items()} == {
        "down": 0.1, "up": 0.1, "down_bias": 0.0, "up_bias": 0.0, "scale": 0.0
    }  # fmt: skip


def test_matrices_are_decayed_and_the_head_has_a_rate_of_its_own():
    found = rates(medpeft.apply(make("vit"), "lora"), lr=1e-3, weight_decay=0.1, head_lr=1e-2)

    assert found["head.weight"] == (1e-2, 0.1, "head")
    assert found["head.bias"] == (1e-2, 0.0, "head, not decayed")
    assert found["blocks.0.attn.qkv.adapters.lora.down"] == (1e-3, 0.1, "body")
    assert found["blocks.0.attn.qkv.adapters.lora.up"][:2] == (1e-3, 0.1)


def test_lora_plus_lets_b_learn_faster():
    found = rates(medpeft.apply(make("vit"), "lora", dora=True), lr=1e-3, lora_plus=16)

    assert {name.rpartition(".")[2]: lr for name, (lr, _, _) in found.items() if "lora" in name} == {
        "down": 1e-3, "up": 1.6e-2, "magnitude": 1e-3
    }  # fmt: skip


def test_the_groups_train_in_a_torch_optimizer():
    model = medpeft.apply(make("vit"), "lora+bias")

    optimizer = torch.optim.AdamW(medpeft.parameter_groups(model, lr=1e-3, weight_decay=0.1))

    assert (
        sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        == medpeft.report(model).trainable
    )


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"lr": -1.0}, {"lr": 1e-3, "lora_plus": 0.0}])
def test_a_rate_that_is_not_positive_is_refused(options):
    with pytest.raises(medpeft.MedpeftError, match=r"lr=.* and lora_plus=.* must be above 0"):
        medpeft.parameter_groups(medpeft.apply(make("vit"), "lora"), **options)


def test_a_model_that_is_not_adapted_is_refused():
    with pytest.raises(medpeft.MedpeftError, match="This VisionTransformer is not adapted: call "):
        medpeft.parameter_groups(make("vit"), lr=1e-3)
