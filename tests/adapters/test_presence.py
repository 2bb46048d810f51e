"""Layers that are replaced after `apply`: the model refuses to run without their adapters."""

import copy

import pytest
import torch
from models import example, make, randomise_adapters
from timm.models.byobnet import MobileOneBlock
from timm.utils import reparameterize_model
from timm.utils.model import freeze_batch_norm_2d
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import medpeft

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    layers = MobileOneBlock(3, 4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 8), nn.Linear(8, 2)
    return nn.Sequential(*layers).eval()


def replace(model):
    model[0].conv_kxk[0].conv = nn.Conv2d(3, 4, 3, padding=1)
    model[1], model[3] = nn.BatchNorm2d(4), nn.Linear(256, 8)
    return model


def lose_forwards(model):
    for module in model[:4].modules():
        module.__dict__.pop("forward", None)
    return model


def quantise(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


CONVERSIONS = {
    "replaced": (replace, "lora", "0.conv_kxk.0.conv"),
    "without forwards": (lose_forwards, "oft", "0.conv_kxk.0.conv"),
    "quantised": (quantise, "lora", "3"),
    "quantised singular values": (quantise, "svdiff", "3"),
    "fused by timm": (reparameterize_model, "lora", "0.conv_kxk.0.conv"),
    "frozen by timm": (freeze_batch_norm_2d, "ssf", "0.conv_kxk.0.bn"),
    "synchronised": (nn.SyncBatchNorm.convert_sync_batchnorm, "ssf", "0.conv_kxk.0.bn"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:merge created")
@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_model_whose_layers_were_converted_refuses_to_run_without_their_adapters(name):
    convert, method, lost = CONVERSIONS[name]
    model = medpeft.apply(network(), method, target="*", head=None)
    randomise_adapters(model)
    adapted = model(IMAGES)
    merged = medpeft.merge(copy.deepcopy(model))
    model = convert(model).eval()
    reason = rf"'{lost}'( and \d+ more)? has lost its adapters since apply.*[Mm]erge first and convert"
    for action in (lambda: model(IMAGES), lambda: medpeft.merge(model), medpeft.merged(model).__enter__):
        with pytest.raises(medpeft.MedpeftError, match=reason):
            action()
    if convert not in (replace, lose_forwards):
        assert (convert(merged).eval()(IMAGES) - adapted).abs().max() < 0.05 * adapted.abs().max()


def test_the_reader_of_an_adapted_weight_may_not_be_replaced_either():
    model, x = medpeft.apply(make("beit"), "lora"), example("beit")
    plain = copy.copy(model.blocks[1].attn)
    del plain.forward
    model.blocks[1].attn = plain
    with pytest.raises(medpeft.MedpeftError, match=r"'blocks\.1\.attn' has lost its adapters since apply"):
        model(x)


def test_blocks_may_be_cut_off_and_wrapped():
    model, x = randomise_adapters(medpeft.apply(make("vit"), "lora")), example("vit")
    adapted = model(x)
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    assert torch.equal(model(x), adapted)
    del model.blocks[1:]
    assert model(x).shape == adapted.shape


def test_a_head_may_be_taken_off():
    model, x = medpeft.apply(make("vit"), "lora"), example("vit")
    model.head = nn.Identity()
    assert model(x).shape == (len(x), 16)
