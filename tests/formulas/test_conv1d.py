"""Conv1D of transformers is a linear layer that keeps its weight as (in, out); every method adapts it as one."""

import copy

import pytest
import torch
from models import randomise, randomise_adapters
from single_layers import LAYERS, OPTIONS, Holder, drawn
from torch import nn
from transformers.pytorch_utils import Conv1D

import medpeft

METHODS = LAYERS["linear, transposed"][2].split()
VARIANTS = [(method, OPTIONS.get(method, {})) for method in METHODS]
VARIANTS += [
    ("lora", {"rank": 2, "dora": True}),
    ("lora", {"rank": 2, "init": "pissa"}),
    ("ssf+lora+oft", {}),
]


@pytest.mark.filterwarnings("ignore:merge created")
@pytest.mark.parametrize(("method", "options"), VARIANTS)
@pytest.mark.parametrize("sizes", [(8, 6), (6, 8), (6, 6)])
def test_conv1d_is_adapted_merged_and_loaded_as_the_linear_layer_of_its_transposed_weight(
    sizes, method, options, tmp_path
):
    inputs, outputs = sizes
    base = randomise(Holder(Conv1D(outputs, inputs)).double())
    plain = Holder(nn.Linear(inputs, outputs)).double()
    with torch.no_grad():
        plain.attn.weight.copy_(base.attn.weight.t())
        plain.attn.bias.copy_(base.attn.bias)
    model, x = copy.deepcopy(base), drawn((3, 5, inputs))
    for either in (model, plain):
        randomise_adapters(medpeft.apply(either, method, head=None, target="*", **options), size=0.3)

    torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-10)
    medpeft.save(model, tmp_path / "a.safetensors")
    torch.testing.assert_close(
        medpeft.load(base, tmp_path / "a.safetensors")(x), model(x), rtol=0, atol=1e-12
    )
    if method in ("bias", "bitfit", "full"):
        return
    y = model(x)
    with torch.no_grad(), medpeft.merged(model):
        torch.testing.assert_close(model(x), y, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(medpeft.merge(model)(x), y, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ["ssf", "svdiff", "bias"])
def test_image_gpt_is_adapted_in_every_linear_layer(method):
    from transformers import ImageGPTConfig, ImageGPTForImageClassification

    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 9, "n_positions": 4, "num_labels": 3}
    model = ImageGPTForImageClassification(ImageGPTConfig(**sizes))
    medpeft.apply(model, method, head="score")

    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        layer = model.get_submodule(f"transformer.h.0.{name}")
        assert any(parameter.requires_grad for parameter in layer.parameters())
    assert medpeft.check(model, {"input_ids": torch.tensor([[1, 2, 3, 4]])}).tensors > 0
