"""The models of the zoo, each with an input for it; all on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree
from torch import nn

CLASSES = 3


@dataclass(frozen=True)
class Candidate:
    """An architecture: where it comes from, and what builds it and an input for it."""

    library: str
    family: str
    name: str
    make: Callable[[], tuple[nn.Module, Any]]

    def build(self) -> tuple[nn.Module, Any]:
        """The model and its input on the meta device."""
        try:
            with torch.device("meta"):
                return self.make()
        except RuntimeError:
            # RegNet and MONAI's Swin compute widths and drop rates with tensors. Not initialised, they take no memory.
            model, example = self.make()
            return model.to("meta"), torch.utils._pytree.tree_map(lambda tensor: tensor.to("meta"), example)


def timm_models() -> Iterator[Candidate]:
    """Every architecture of the installed timm; a family is a file of `timm.models`."""
    import timm

    def make(name: str) -> tuple[nn.Module, Any]:
        model = timm.create_model(name, num_classes=CLASSES)
        return model, torch.empty(2, *model.pretrained_cfg["input_size"])

    for name in timm.list_models():
        family = timm.model_entrypoint(name).__module__.rpartition(".")[2]
        yield Candidate("timm", family, name, lambda name=name: make(name))


def torchvision_models() -> Iterator[Candidate]:
    """Every classifier of the installed torchvision."""
    import torchvision.models as zoo

    def make(name: str) -> tuple[nn.Module, Any]:
        size = 299 if name == "inception_v3" else 224
        return zoo.get_model(name, num_classes=CLASSES), torch.empty(2, 3, size, size)

    for name in zoo.list_models(module=zoo):
        family = zoo.get_model_builder(name).__module__.rpartition(".")[2]
        yield Candidate("torchvision", f"torchvision {family}", f"torchvision/{name}", lambda name=name: make(name))


def other_models() -> Iterator[Candidate]:
    """Hugging Face transformers, MONAI, open_clip and diffusers, in small configurations."""
    for library, models in (
        ("transformers", _transformers()),
        ("monai", _monai()),
        ("open_clip", _open_clip()),
        ("diffusers", _diffusers()),
    ):
        for name, make in models.items():
            yield Candidate("others", library, f"{library}/{name}", make)


def _transformers() -> dict[str, Callable[[], tuple[nn.Module, Any]]]:
    import transformers as hf

    image = {"image_size": 32, "patch_size": 8, "num_channels": 3}
    width = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    labels = {"num_labels": CLASSES}
    staged = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    convs = {"num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1]}
    vision = {**width, "image_size": 32, "patch_size": 8}
    text = {**width, "vocab_size": 64, "max_position_embeddings": 16}

    def pixels(model: type[nn.Module], config: Any, size: int = 32) -> Callable[[], tuple[nn.Module, Any]]:
        return lambda: (model(config), {"pixel_values": torch.empty(2, 3, size, size)})

    def pair(model: type[nn.Module], config: Any) -> Callable[[], tuple[nn.Module, Any]]:
        def make() -> tuple[nn.Module, Any]:
            ids = torch.zeros(2, 8, dtype=torch.long)
            inputs = {"pixel_values": torch.empty(2, 3, 32, 32), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            return model(config), inputs

        return make

    return {
        "ViT": pixels(hf.ViTForImageClassification, hf.ViTConfig(**image, **width, **labels)),
        "DeiT": pixels(hf.DeiTForImageClassificationWithTeacher, hf.DeiTConfig(**image, **width, **labels)),
        "DINOv2": pixels(hf.Dinov2ForImageClassification, hf.Dinov2Config(**image, **width, **labels)),
        "BEiT": pixels(
            hf.BeitForImageClassification, hf.BeitConfig(**image, **width, **labels, use_relative_position_bias=True)
        ),
        "Swin": pixels(hf.SwinForImageClassification, hf.SwinConfig(**staged, **labels), 64),
        "SwinV2": pixels(hf.Swinv2ForImageClassification, hf.Swinv2Config(**staged, **labels), 64),
        "ConvNeXt": pixels(hf.ConvNextForImageClassification, hf.ConvNextConfig(**convs, **labels), 64),
        "ConvNeXtV2": pixels(hf.ConvNextV2ForImageClassification, hf.ConvNextV2Config(**convs, **labels), 64),
        "ResNet": pixels(
            hf.ResNetForImageClassification,
            hf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], **labels),
            64,
        ),
        "CLIP": pair(hf.CLIPModel, hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)),
        "CLIP classifier": pixels(
            hf.CLIPForImageClassification,
            hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16, **labels),
        ),
        "SigLIP": pair(hf.SiglipModel, hf.SiglipConfig(text_config=text, vision_config=vision)),
    }


def _monai() -> dict[str, Callable[[], tuple[nn.Module, Any]]]:
    from monai.networks import nets

    def net(make: Callable[[int], nn.Module], dims: int, size: int) -> Callable[[], tuple[nn.Module, Any]]:
        return lambda: (make(dims), torch.empty(2, 1, *[size] * dims))

    swin = {"patch_size": 2, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "feature_size": 12}
    heads = {"hidden_size": 48, "mlp_dim": 64, "num_heads": 4}
    makers: dict[str, tuple[Callable[[int], nn.Module], int]] = {
        "UNet": (lambda d: nets.UNet(d, 1, CLASSES, channels=(8, 16, 32), strides=(2, 2), num_res_units=2), 32),
        "BasicUNet": (lambda d: nets.BasicUNet(d, 1, CLASSES, features=(8, 8, 16, 16, 32, 8)), 32),
        "DenseNet": (lambda d: nets.DenseNet(d, 1, CLASSES, init_features=8, growth_rate=4, block_config=(2, 2)), 32),
        "ResNet": (lambda d: nets.resnet18(spatial_dims=d, n_input_channels=1, num_classes=CLASSES), 64),
        "EfficientNet": (lambda d: nets.EfficientNetBN("efficientnet-b0", False, True, d, 1, CLASSES), 64),
        "SegResNet": (lambda d: nets.SegResNet(d, init_filters=8, in_channels=1, out_channels=CLASSES), 32),
        "SwinUNETR": (lambda d: nets.SwinUNETR(1, CLASSES, **swin, spatial_dims=d), 64),
        "UNETR": (lambda d: nets.UNETR(1, CLASSES, 32, feature_size=8, spatial_dims=d, **heads), 32),
        "ViT": (
            lambda d: nets.ViT(
                1, 32, 16, classification=True, num_classes=CLASSES, num_layers=2, spatial_dims=d, post_activation=None, **heads
            ),
            32,
        ),
        "AttentionUnet": (lambda d: nets.AttentionUnet(d, 1, CLASSES, channels=(8, 16, 32), strides=(2, 2)), 32),
        "VNet": (lambda d: nets.VNet(d, 1, CLASSES, dropout_dim=d), 32),
    }
    return {f"{name} {d}-d": net(make, d, size) for name, (make, size) in makers.items() for d in (2, 3)}


def _open_clip() -> dict[str, Callable[[], tuple[nn.Module, Any]]]:
    from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg

    def clip(vision: Any) -> Callable[[], tuple[nn.Module, Any]]:
        def make() -> tuple[nn.Module, Any]:
            text = CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=4, layers=2)
            return CLIP(32, vision, text), (torch.empty(2, 3, 32, 32), torch.zeros(2, 8, dtype=torch.long))

        return make

    timm_vision = {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"}
    return {
        "ViT": clip(CLIPVisionCfg(layers=2, width=32, head_width=8, patch_size=8, image_size=32)),
        "ResNet": clip(CLIPVisionCfg(layers=(1, 1, 1, 1), width=16, image_size=32)),
        "timm ResNet": clip(CLIPVisionCfg(**timm_vision, image_size=32)),
    }


def _diffusers() -> dict[str, Callable[[], tuple[nn.Module, Any]]]:
    from diffusers import UNet2DConditionModel, UNet2DModel

    small = {"sample_size": 16, "block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1}

    def conditional() -> tuple[nn.Module, Any]:
        blocks = {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }
        model = UNet2DConditionModel(**small, **blocks, cross_attention_dim=16, attention_head_dim=8)
        steps = torch.zeros((), dtype=torch.long)
        inputs = {"sample": torch.empty(2, 4, 16, 16), "timestep": steps, "encoder_hidden_states": torch.empty(2, 5, 16)}
        return model, inputs

    def plain() -> tuple[nn.Module, Any]:
        blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
        model = UNet2DModel(**small, **blocks, attention_head_dim=8)
        return model, {"sample": torch.empty(2, 3, 16, 16), "timestep": torch.zeros((), dtype=torch.long)}

    return {"UNet2DConditionModel": conditional, "UNet2DModel": plain}
