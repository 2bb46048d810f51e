"""Conv-Adapter in blocks that normalise before their convolutions, as its authors have it in BiT."""

from functools import partial

import monai
import pytest
import timm
import torch
import torchvision
from by_hand import relu
from conv_adapter_oracles import adapted_block, bottleneck
from layer_oracles import assert_computes, drawn
from models import randomise_adapters
from torch import nn

import medpeft
from medpeft.formulas.conv_adapter import Before


@pytest.mark.parametrize("form", ["parallel", "sequential"])
def test_conv_adapter_starts_before_the_norm_in_blocks_that_normalise_first_as_in_bit(form):
    layers = {
        "conv_layer": timm.layers.StdConv2d,
        "norm_layer": partial(timm.layers.GroupNormAct, group_size=2),
    }
    model = timm.models.resnetv2.ResNetV2(
        [1, 1, 1, 1], (8, 16, 16, 16), 2, stem_chs=8, stem_type="fixed", **layers
    )
    block, plain, p = adapted_block(model, "stages.1.blocks.0", form=form, target="stages.1.blocks.0.conv2")
    x = drawn(2, 8, 6, 6)

    with torch.no_grad():
        preactivated = plain.norm1(x)
        entered = plain.conv1(preactivated)
        y = plain.conv2(plain.norm2(entered))
        source, stride = (entered, 2) if form == "parallel" else (y, 1)
        y = y + bottleneck(p, source.numpy(), relu, stride)
        expected = plain.conv3(plain.norm3(y)) + plain.downsample(preactivated)

    assert_computes(block, x, expected.numpy())


@pytest.mark.parametrize(
    ("library", "block", "norms"),
    [
        ("timm", "features.denseblock1.denselayer1", {"norm2"}),
        ("torchvision", "features.denseblock1.denselayer1", {"norm2"}),
        ("monai", "features.denseblock1.denselayer1", {"layers.norm2"}),
        ("segresnet", "down_layers.0.1", {"norm1", "norm2"}),
    ],
)
def test_conv_adapter_starts_at_the_norm_that_belongs_to_its_convolution(library, block, norms):
    torch.manual_seed(0)
    model = NORMALISING_FIRST[library]()
    layer = model.get_submodule(block)
    medpeft.apply(model, "conv_adapter", head=None)

    started = {name.partition(".adapters")[0] for name, m in layer.named_modules() if isinstance(m, Before)}
    assert started == norms
    randomise_adapters(model, size=0.3)
    x = torch.randn(1, 1 if library in ("monai", "segresnet") else 3, 32, 32)
    medpeft.check(model.eval(), x)


NORMALISING_FIRST = {
    "timm": lambda: timm.models.DenseNet(4, (1, 1), 2, bn_size=2),
    "torchvision": lambda: torchvision.models.DenseNet(4, (1, 1), 8, 2, num_classes=2),
    "monai": lambda: monai.networks.nets.DenseNet(2, 1, 2, 8, 4, (1, 1), 2),
    "segresnet": lambda: monai.networks.nets.SegResNet(
        2, 4, 1, 2, blocks_down=(1, 1), blocks_up=(1,), norm="INSTANCE"
    ),
}


def test_conv_adapter_says_so_where_the_norm_before_the_convolution_is_not_called():
    class PreActBottleneck(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.conv1, self.norm2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.conv2 = nn.Conv2d(4, 4, 3)

        def forward(self, x):
            return self.conv2(self.conv1(self.norm1(x)))

    model = nn.Sequential(PreActBottleneck(), nn.Conv2d(4, 2, 1))
    medpeft.apply(model, "conv_adapter", head="1")

    with pytest.raises(
        medpeft.MedpeftError, match=r"found no norm before 0\.conv2 to start from: use place="
    ):
        model(torch.zeros(1, 4, 8, 8))


def test_conv_adapter_says_so_where_the_norm_before_the_convolution_is_given_tokens():
    sizes = timm.models.mvitv2.MultiScaleVitCfg(depths=(1,), embed_dim=8, stride_q=((1, 1),))
    model = timm.models.mvitv2.MultiScaleVit(sizes, (32, 32), num_classes=2)
    medpeft.apply(model, "conv_adapter")
    with pytest.raises(
        medpeft.MedpeftError, match=r"starts before the norm of .*pool.*use place='convolution'"
    ):
        model(drawn(1, 3, 32, 32).float())
