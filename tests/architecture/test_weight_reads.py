"""Where a parent reads a layer's weight without calling it, adapters still act."""

import pytest
import torch
from models import SelfAttention, example, make, output, randomise, randomise_adapters
from torch import nn

import medpeft
from medpeft.architecture.network import Network
from medpeft.architecture.weight_reads import reads

BYPASSED = [
    ("beit", "lora"),
    ("beit", "ssf"),
    ("beit", "svdiff"),
    ("eva02", "lora"),
    ("swinv2", "lora"),
    ("multihead_attention", "lora"),
    ("multihead_attention", "ssf"),
    ("multihead_attention_of_other_widths", "lora"),
    ("multihead_attention_of_other_widths", "ssf"),
    ("transformer_encoder", "lora"),
    ("transformer_encoder", "ssf"),
    ("transformer_encoder", "svdiff"),
    ("torchvision_vit", "lora"),
    ("clip_vision", "lora"),
]


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("family", "method"), BYPASSED)
def test_adapters_change_the_output_where_the_layer_is_never_called(family, method, training, grad):
    model, x = make(family), example(family)
    medpeft.apply(model, method, head=None)
    randomise_adapters(model).train(training)

    with torch.set_grad_enabled(grad):
        torch.manual_seed(0)
        adapted = output(model, x)
        with medpeft.disabled(model):
            torch.manual_seed(0)
            base = output(model, x)

    assert (adapted - base).abs().max() > 1e-3 * base.abs().max()


@pytest.mark.parametrize("method", ["lora", "ssf"])
def test_the_fused_path_of_the_encoder_layer_sees_adapters_of_every_weight_it_reads(method):
    layer = randomise(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).eval()
    x = torch.randn(2, 5, 16)
    for name in ("self_attn", "self_attn.out_proj", "linear1", "linear2"):
        with torch.no_grad():
            base = layer(x)
            medpeft.apply(layer, method, head=None, target=lambda n, _, name=name: n == name)
            adapted = randomise_adapters(layer)(x)
            with torch.enable_grad():
                slow = layer(x.requires_grad_())  # Gradients keep torch from the fused path.
            x.requires_grad_(False)
        medpeft.remove(layer)
        assert not torch.allclose(adapted, base, atol=1e-4), name
        torch.testing.assert_close(adapted, slow.detach(), rtol=1e-4, atol=1e-5)


def test_the_readers_of_torch_and_timm_are_found_in_their_source():
    assert "out_proj.weight" in reads(nn.MultiheadAttention)
    assert {"self_attn.in_proj_weight", "linear1.weight", "norm2.bias"} <= reads(nn.TransformerEncoderLayer)
    assert "qkv.weight" in reads(type(make("beit").blocks[0].attn))
    assert reads(nn.Linear) == frozenset()
    assert reads(type(make("vit").blocks[0].attn)) == frozenset()


def test_every_reader_is_found_the_outermost_first():
    network = Network(make("transformer_encoder"))
    of_linear = network.readers(network.modules["layers.0.linear1"], "weight")
    of_projection = network.readers(network.modules["layers.0.self_attn.out_proj"], "weight")

    assert of_linear[0] == ("layers.0", "linear1")
    assert of_projection[0] == ("layers.0", "self_attn.out_proj")
    assert of_projection[1] == ("layers.0.self_attn", "out_proj")
    vit = Network(make("vit"))
    assert vit.readers(vit.modules["blocks.0.attn.qkv"], "weight") == ()


class Reader(nn.Module):
    """A module of the user's own that reads weights by constant and by running index, and asks one for its dtype."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.called = nn.Linear(4, 4)

    def forward(self, x):
        for i in range(2):
            x = self.step(x, i)
        return self.called(x.to(self.called.weight.dtype))

    def step(self, x, i):
        return nn.functional.linear(x, self.layers[i].weight, self.layers[i].bias)


def test_a_reader_of_ones_own_is_found_through_the_methods_that_forward_calls():
    assert reads(Reader) == {"layers.*.weight", "layers.*.bias"}

    model, x = randomise(Reader().double()), torch.randn(3, 4, dtype=torch.float64)
    base = model(x)
    medpeft.apply(model, "ssf", head=None, target="layers")
    assert torch.equal(model(x), base)
    assert not torch.allclose(randomise_adapters(model)(x), base)


def test_a_method_that_acts_on_outputs_alone_is_refused_where_the_output_never_is(own_registry):
    @medpeft.register("shift_output")
    class ShiftOutput(medpeft.Adapter):
        """A shift of the output."""

        layers = (nn.Linear,)

        def __init__(self, site):
            super().__init__(site)
            self.shift = nn.Parameter(torch.zeros(site.layer.out_features))

        def forward(self, x, y):
            return y + self.shift

    model = Reader()
    with pytest.raises(
        medpeft.MedpeftError, match=r"'shift_output' acts on the output of layers\.0, but its parent reads"
    ):
        medpeft.apply(model, "shift_output", head=None)
    assert not any("adapters" in name for name, _ in model.named_modules())
    medpeft.apply(model, "shift_output", head=None, exclude="layers")


@pytest.mark.parametrize("options", [{}, {"kdim": 8, "vdim": 4}, {"bias": False}, {"add_bias_kv": True}])
def test_attention_of_torch_in_every_form(options):
    model = randomise(SelfAttention(**options).double()).eval()
    model.attn.requires_grad_(False)  # By this, torch picks between its kernels.
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        base = model(x)
        for method in ("lora", "ssf", "svdiff", "lora+ssf+svdiff"):
            medpeft.apply(model, method)
            assert torch.equal(model(x), base)
            adapted = randomise_adapters(model)(x)
            assert not torch.allclose(adapted, base)
            with medpeft.merged(model):
                torch.testing.assert_close(model(x), adapted, rtol=1e-11, atol=1e-11)
            assert torch.equal(medpeft.remove(model)(x), base)
