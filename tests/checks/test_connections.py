"""On fake tensors, what is connected to the output is found without a value."""

import pytest
import timm
import torch
from checked import X, adapted, unused

import medpeft
from medpeft.checks.connections import connected


def test_a_model_without_values_has_its_connections_checked():
    with torch.device("meta"):
        model = timm.create_model("vit_large_patch16_224", num_classes=3)
    found = medpeft.check(medpeft.apply(model, "lora"), torch.empty(1, 3, 224, 224, device="meta"))
    assert found.tensors == 50
    assert "the model has no values (meta device): connections alone were checked" in found.notes


def test_connected_lists_what_has_no_effect_and_prints_it():
    found = connected(adapted(unused), X)
    assert [tensor.name for tensor in found.without_effect] == [
        "second.adapters.lora.down",
        "second.adapters.lora.up",
    ]
    assert found.without_effect[0].modes == ("train", "eval")
    assert str(found).startswith(
        "4 of 6 trainable tensors are connected\n  second.adapters.lora.down in train and eval mode"
    )


def test_connected_says_that_a_model_asks_for_values():
    model = adapted(lambda net, x: x if bool(x.sum() > 0) else net.second(x))
    with pytest.raises(
        medpeft.MedpeftError, match="Net does not run on fake tensors: DataDependentOutputException"
    ):
        connected(model, X)


def test_a_function_cache_keeps_no_fake_tensor():
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = medpeft.apply(
        DINOv3ViTModel(DINOv3ViTConfig(**sizes, image_size=32, patch_size=8)), "lora", head=None
    )
    x = torch.randn(1, 3, 32, 32)
    connected(model, x)
    assert model(x).last_hidden_state.sum().isfinite()
