"""The families of models that medpeft supports, each as a tiny model; those of timm come first."""

import families_of_timm  # noqa: F401 - importing it lists them
import torch
from family import CLASSES, CNN, CONVNEXT, IMAGE, KEYS, TRANSFORMER, family
from torch import nn


@family(CNN, IMAGE)
def torchvision_resnet():
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)


@family(TRANSFORMER, IMAGE)
def torchvision_vit():
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=CLASSES)


@family(TRANSFORMER, IMAGE)
def torchvision_swin():
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 8, [1, 2], [2, 2], [4, 4], num_classes=CLASSES, stochastic_depth_prob=0.0)


_SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
}


@family(TRANSFORMER, IMAGE, dead=KEYS)
def hf_vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**_SIZES, patch_size=8, num_labels=CLASSES))


@family(TRANSFORMER, IMAGE, dead=(*KEYS, "*.mask_token"))
def hf_dinov2():
    from transformers import Dinov2Config, Dinov2ForImageClassification

    return Dinov2ForImageClassification(Dinov2Config(**_SIZES, patch_size=8, num_labels=CLASSES))


@family(TRANSFORMER, IMAGE, dead=KEYS)
def hf_swin():
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 2], num_heads=[2, 2], window_size=4
    )
    config.num_labels = CLASSES
    return SwinForImageClassification(config)


@family(CONVNEXT, IMAGE)
def hf_convnext():
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], image_size=32, num_labels=CLASSES
    )
    return ConvNextForImageClassification(config)


# An instance norm follows these convolutions and takes off their bias.
@family({"norm", "conv blocks", "head"}, (2, 1, 16, 16), dead=("*.conv.bias",))
def monai_unet2d():
    from monai.networks.nets import UNet

    return UNet(
        2,
        1,
        CLASSES,
        channels=(4, 8, 8),
        strides=(2, 2),
        num_res_units=1,
        norm=("INSTANCE", {"affine": True}),
    )


@family(CNN, (2, 1, 8, 8, 8))
def monai_unet3d():
    from monai.networks.nets import UNet

    return UNet(3, 1, CLASSES, channels=(4, 8), strides=(2,), num_res_units=2, norm="BATCH")


@family(CNN, (2, 1, 32, 32))
def monai_densenet():
    from monai.networks.nets import DenseNet

    return DenseNet(2, 1, CLASSES, init_features=8, growth_rate=4, block_config=(2, 2), bn_size=2)


@family(TRANSFORMER | {"conv blocks"}, (2, 1, 64, 64))
def monai_swin_unetr():
    from monai.networks.nets import SwinUNETR

    return SwinUNETR(
        1,
        CLASSES,
        depths=(1, 1, 1, 1),
        num_heads=(2, 2, 2, 2),
        feature_size=12,
        window_size=4,
        spatial_dims=2,
    )


@family(TRANSFORMER, (2, 1, 16, 16), dead=("*.norm_cross_attn.*",))
def monai_vit():
    from monai.networks.nets import ViT

    return ViT(
        1, (16, 16), (8, 8), hidden_size=16, mlp_dim=32, num_layers=2, num_heads=2,
        classification=True, num_classes=CLASSES, spatial_dims=2, post_activation=None,
    )  # fmt: skip


@family(TRANSFORMER - {"head"}, IMAGE)
def clip_vision():
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(32, 8, width=16, layers=2, heads=2, mlp_ratio=2.0, output_dim=8)


class _Denoiser(nn.Module):
    """A diffusers UNet with a fixed time step and a text embedding made from the image, so that it takes one tensor."""

    def __init__(self):
        super().__init__()
        from diffusers import UNet2DConditionModel

        self.unet = UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 8),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=6, attention_head_dim=4, norm_num_groups=4,
        )  # fmt: skip

    def forward(self, x):
        return self.unet(x, torch.tensor(7), x.flatten(2)[:, :2, :6]).sample


@family((TRANSFORMER | {"conv blocks"}) - {"head"}, (2, 4, 8, 8), head=None)
def diffusion_unet():
    return _Denoiser()


@family({"norm", "layernorm", "attention", "attention blocks"}, (2, 5, 16), head=None)
def transformer_encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` of a sequence with itself, followed by a head."""

    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True, **options)
        self.kdim, self.vdim = self.attn.kdim, self.attn.vdim
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.classifier(self.attn(x, x[..., : self.kdim], x[..., : self.vdim])[0].mean(1))


@family({"attention", "head"}, (2, 5, 16))
def multihead_attention():
    return SelfAttention()


@family({"attention", "head"}, (2, 5, 16))
def multihead_attention_of_other_widths():
    return SelfAttention(kdim=8, vdim=4)
