"""Small models of transformers, MONAI, open_clip and diffusers, each with an input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

CLASSES = 3

Make = Callable[[], tuple[nn.Module, Any]]
"""Builds a model and an input for it."""


def transformers_models() -> dict[str, Make]:
    """Models of Hugging Face transformers, by name."""
    return {**_plain_transformers(), **_staged_transformers(), **_text_and_image_transformers()}


def _plain_transformers() -> dict[str, Make]:
    """Transformers of blocks that are all alike."""
    import transformers as hf

    options: dict[str, Any] = {
        "image_size": 32,
        "patch_size": 8,
        "num_channels": 3,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "num_labels": CLASSES,
    }
    beit = hf.BeitConfig(**options, use_relative_position_bias=True)
    return {
        "ViT": partial(_of_pixels, hf.ViTForImageClassification, hf.ViTConfig(**options)),
        "DeiT": partial(_of_pixels, hf.DeiTForImageClassificationWithTeacher, hf.DeiTConfig(**options)),
        "DINOv2": partial(_of_pixels, hf.Dinov2ForImageClassification, hf.Dinov2Config(**options)),
        "BEiT": partial(_of_pixels, hf.BeitForImageClassification, beit),
    }


def _staged_transformers() -> dict[str, Make]:
    """Models of stages, each with half the resolution of the one before."""
    import transformers as hf

    swin: dict[str, Any] = {
        "image_size": 64,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
        "num_labels": CLASSES,
    }
    convnext: dict[str, Any] = {
        "num_stages": 2,
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "num_labels": CLASSES,
    }
    resnet = hf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=CLASSES)
    return {
        "Swin": partial(_of_pixels, hf.SwinForImageClassification, hf.SwinConfig(**swin), 64),
        "SwinV2": partial(_of_pixels, hf.Swinv2ForImageClassification, hf.Swinv2Config(**swin), 64),
        "ConvNeXt": partial(_of_pixels, hf.ConvNextForImageClassification, hf.ConvNextConfig(**convnext), 64),
        "ConvNeXtV2": partial(
            _of_pixels,
            hf.ConvNextV2ForImageClassification,
            hf.ConvNextV2Config(**convnext),
            64,
        ),
        "ResNet": partial(_of_pixels, hf.ResNetForImageClassification, resnet, 64),
    }


def _text_and_image_transformers() -> dict[str, Make]:
    """Models of two towers."""
    import transformers as hf

    width = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    towers: dict[str, Any] = {
        "text_config": {**width, "vocab_size": 64, "max_position_embeddings": 16},
        "vision_config": {**width, "image_size": 32, "patch_size": 8},
    }
    classifier = hf.CLIPConfig(**towers, projection_dim=16, num_labels=CLASSES)
    return {
        "CLIP": partial(_of_pixels_and_text, hf.CLIPModel, hf.CLIPConfig(**towers, projection_dim=16)),
        "CLIP classifier": partial(_of_pixels, hf.CLIPForImageClassification, classifier),
        "SigLIP": partial(_of_pixels_and_text, hf.SiglipModel, hf.SiglipConfig(**towers)),
    }


def _of_pixels(model: type[nn.Module], config: Any, size: int = 32) -> tuple[nn.Module, Any]:
    return model(config), {"pixel_values": torch.empty(2, 3, size, size)}


def _of_pixels_and_text(model: type[nn.Module], config: Any) -> tuple[nn.Module, Any]:
    ids = torch.zeros(2, 8, dtype=torch.long)
    inputs = {
        "pixel_values": torch.empty(2, 3, 32, 32),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }
    return model(config), inputs


def monai_models() -> dict[str, Make]:
    """Models of MONAI for images and for volumes, by name."""
    models: dict[str, Make] = {}
    for name, (make, size) in {**_monai_cnns(), **_monai_transformers()}.items():
        for dims in (2, 3):
            models[f"{name} {dims}-d"] = partial(_of_volumes, make, dims, size)
    return models


def _of_volumes(make: Callable[[int], nn.Module], dims: int, size: int) -> tuple[nn.Module, Any]:
    return make(dims), torch.empty(2, 1, *[size] * dims)


def _monai_cnns() -> dict[str, tuple[Callable[[int], nn.Module], int]]:
    """Convolutional networks as functions of the number of axes, each with the size of its images."""
    from monai.networks import nets

    unet = {"channels": (8, 16, 32), "strides": (2, 2)}
    densenet = {"init_features": 8, "growth_rate": 4, "block_config": (2, 2)}
    return {
        "UNet": (lambda d: nets.UNet(d, 1, CLASSES, **unet, num_res_units=2), 32),
        "BasicUNet": (lambda d: nets.BasicUNet(d, 1, CLASSES, features=(8, 8, 16, 16, 32, 8)), 32),
        "DenseNet": (lambda d: nets.DenseNet(d, 1, CLASSES, **densenet), 32),
        "ResNet": (lambda d: nets.resnet18(spatial_dims=d, n_input_channels=1, num_classes=CLASSES), 64),
        "EfficientNet": (lambda d: nets.EfficientNetBN("efficientnet-b0", False, True, d, 1, CLASSES), 64),
        "SegResNet": (lambda d: nets.SegResNet(d, init_filters=8, in_channels=1, out_channels=CLASSES), 32),
        "AttentionUnet": (lambda d: nets.AttentionUnet(d, 1, CLASSES, **unet), 32),
        "VNet": (lambda d: nets.VNet(d, 1, CLASSES, dropout_dim=d), 32),
    }


def _monai_transformers() -> dict[str, tuple[Callable[[int], nn.Module], int]]:
    """Transformers as functions of the number of axes, each with the size of its images."""
    from monai.networks import nets

    swin = {"patch_size": 2, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "feature_size": 12}
    heads = {"hidden_size": 48, "mlp_dim": 64, "num_heads": 4}
    classifier = {"classification": True, "num_classes": CLASSES, "num_layers": 2, "post_activation": None}
    return {
        "SwinUNETR": (lambda d: nets.SwinUNETR(1, CLASSES, **swin, spatial_dims=d), 64),
        "UNETR": (lambda d: nets.UNETR(1, CLASSES, 32, feature_size=8, spatial_dims=d, **heads), 32),
        "ViT": (lambda d: nets.ViT(1, 32, 16, spatial_dims=d, **heads, **classifier), 32),
    }


def open_clip_models() -> dict[str, Make]:
    """Models of open_clip, by name."""
    from open_clip import CLIPVisionCfg

    timm_vision = {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"}
    vit = CLIPVisionCfg(layers=2, width=32, head_width=8, patch_size=8, image_size=32)
    return {
        "ViT": partial(_clip, vit),
        "ResNet": partial(_clip, CLIPVisionCfg(layers=(1, 1, 1, 1), width=16, image_size=32)),
        "timm ResNet": partial(_clip, CLIPVisionCfg(**timm_vision, image_size=32)),
    }


def _clip(vision: Any) -> tuple[nn.Module, Any]:
    from open_clip import CLIP, CLIPTextCfg

    text = CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=4, layers=2)
    inputs = (torch.empty(2, 3, 32, 32), torch.zeros(2, 8, dtype=torch.long))
    return CLIP(32, vision, text), inputs


def diffusers_models() -> dict[str, Make]:
    """Models of diffusers, by name."""
    return {"UNet2DConditionModel": _conditional_unet, "UNet2DModel": _unconditional_unet}


_SMALL_UNET = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "attention_head_dim": 8,
}


def _conditional_unet() -> tuple[nn.Module, Any]:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        **_SMALL_UNET,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
    )
    inputs = {
        "sample": torch.empty(2, 4, 16, 16),
        "timestep": torch.zeros((), dtype=torch.long),
        "encoder_hidden_states": torch.empty(2, 5, 16),
    }
    return model, inputs


def _unconditional_unet() -> tuple[nn.Module, Any]:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        **_SMALL_UNET,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return model, {"sample": torch.empty(2, 3, 16, 16), "timestep": torch.zeros((), dtype=torch.long)}
