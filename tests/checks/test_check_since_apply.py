"""`check` finds what became of an adapted model since `apply`: optimizers, conversions, lost forwards, replaced layers."""

import timm
import torch
from checked import IMAGES, Net, Norms, X, adapted, failure
from models import example, make
from timm.utils import reparameterize_model
from timm.utils.model import freeze_batch_norm_2d
from torch import nn

import medpeft


def test_an_optimizer_built_before_apply_is_found():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    text = failure(medpeft.apply(model, "lora", target="linear"), optimizer=optimizer)
    assert (
        "first.adapters.lora.down, first.adapters.lora.up, second.adapters.lora.down, second.adapters.lora.up is not in"
        in text
    )
    assert "build it after apply, from medpeft.parameter_groups" in text
    assert "head" not in text


def test_an_optimizer_that_holds_a_replaced_head_is_found():
    model = adapted()
    optimizer = torch.optim.SGD(medpeft.parameter_groups(model, lr=0.1))
    assert medpeft.check(model, X, optimizer=optimizer).tensors == 6
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    assert "head.weight is not in the optimizer (it holds a replaced one of the same shape)" in failure(
        model, optimizer=optimizer
    )


def test_conversion_to_syncbatchnorm_after_apply_is_found():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(medpeft.apply(Norms(), "ssf"))
    text = failure(model, IMAGES)
    assert (
        "bn1 (SyncBatchNorm) would change its frozen statistics in training: convert (to SyncBatchNorm) first"
        in text
    )
    assert "bn1 has lost the forward of its adapters" in text


def test_batchnorms_that_adapt_may_change():
    assert medpeft.check(medpeft.apply(Norms(), "bn", batchnorm="adapt"), IMAGES).tensors == 4


def test_lost_forwards_are_found():
    model = adapted()
    del model.first.forward
    assert (
        "first has lost the forward of its adapters (was the layer converted, or its forward deleted?)"
        in failure(model)
    )
    model = medpeft.apply(make("beit", torch.float32), "lora")
    del model.blocks[0].attn.forward
    assert "blocks.0.attn.qkv has lost the forward" in failure(model, example("beit", torch.float32))
    model = medpeft.apply(make("vit", torch.float32), "adaptformer")
    del model.blocks[0].norm2.forward
    assert "blocks.0.norm2 has lost the forward" in failure(model, example("vit", torch.float32))
    model = medpeft.apply(make("vit", torch.float32), "adaptformer")
    del model.blocks[0].forward
    assert "blocks.0 has lost the forward" in failure(model, example("vit", torch.float32))


def test_a_replaced_layer_is_found():
    model = adapted()
    model.second, model.head = nn.Linear(6, 6), nn.Linear(6, 3, bias=False)
    text = failure(model)
    assert "second has lost its adapter (lora): was the layer replaced?" in text
    assert "second.weight, second.bias would train, though apply froze it" in text
    assert "head.bias was chosen by apply and is no longer there" in text


def test_frozen_parameters_that_would_train_and_trained_ones_that_are_frozen_are_found():
    model = adapted().requires_grad_(True)
    assert (
        "first.weight, first.bias, second.weight, second.bias would train, though apply froze it"
        in failure(model)
    )
    text = failure(adapted().requires_grad_(False))
    assert "head.weight, head.bias is frozen, though apply chose it to train" in text
    assert "first, second has an adapter (lora) that is frozen" in text


def test_switched_off_adapters_are_found():
    model = adapted()
    with medpeft.disabled(model):
        assert "has its adapters switched off; leave `with medpeft.disabled" in failure(model)


def test_an_unadapted_model_is_refused():
    assert "not adapted: call medpeft.apply(model, method) first" in failure(Net())


def test_a_gradient_left_on_a_frozen_parameter_is_found():
    model = adapted()
    model.first.weight.grad = torch.ones_like(model.first.weight)
    text = failure(model)
    assert "first.weight is frozen, but has a gradient from before: set its grad to None" in text
    model.first.weight.grad = None
    assert medpeft.check(model, X).tensors == 6


def test_layers_that_timm_fused_are_found():
    model = medpeft.apply(timm.create_model("mobileone_s0", num_classes=3).eval(), "lora")
    text = failure(reparameterize_model(model), torch.randn(2, 3, 64, 64))
    assert "has lost its adapter (lora): was the layer replaced? Change the model first, then apply" in text


def test_batchnorms_that_timm_replaced_are_found():
    model = medpeft.apply(timm.create_model("resnet10t", num_classes=3), "ssf")
    text = failure(freeze_batch_norm_2d(model), torch.randn(2, 3, 64, 64))
    assert "bn1, layer1.0.bn1" in text
    assert "has lost its adapter (ssf): was the layer replaced?" in text
