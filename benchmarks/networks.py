"""The models that are measured, each with the shape of its input, by name; any other name is timm's."""

from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

NAMES = (
    "resnet50",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "convnext_tiny",
    "monai_unet",
    "diffusers_unet",
    "sd_conv",
)


def build(name: str, device: str = "cpu") -> nn.Module:
    """A model in train mode, with random weights that are the same at every call."""
    torch.manual_seed(0)
    if name == "sd_conv":
        # The widest convolution of Stable Diffusion 1.x, 1280×11520 as a matrix.
        model: nn.Module = nn.Sequential(nn.Conv2d(1280, 1280, 3, padding=1))
    elif name == "monai_unet":
        model = _monai_unet()
    elif name == "diffusers_unet":
        model = _diffusers_unet()
    else:
        model = timm.create_model(name, num_classes=3)
    return model.to(device).train()


def example(name: str, batch: int, size: int, device: str = "cpu") -> tuple[Tensor, ...]:
    """Inputs of a model: images (N, C, H, W), for a diffusion UNet latents, time steps and texts, for a part of it features."""
    torch.manual_seed(1)
    if name == "sd_conv":
        return (torch.randn(batch, 1280, size // 16, size // 16, device=device),)
    if name == "monai_unet":
        return (torch.randn(batch, 1, size, size, device=device),)
    if name == "diffusers_unet":
        steps = torch.randint(0, 1000, (batch,), device=device)
        return torch.randn(batch, 4, size // 8, size // 8, device=device), steps, torch.randn(batch, 77, 256, device=device)
    return (torch.randn(batch, 3, size, size, device=device),)


def forward(model: Callable[..., Any], inputs: tuple[Tensor, ...], grad: bool = False) -> Tensor:
    """The model's output; with `grad`, the first input asks for a gradient, so that every activation does."""
    first = inputs[0].detach().requires_grad_(grad)
    found = model(first, *inputs[1:])
    # diffusers and transformers wrap theirs.
    output: Tensor = found if isinstance(found, Tensor) else found[0]
    return output


def _monai_unet() -> nn.Module:
    from monai.networks.nets.unet import UNet

    return UNet(spatial_dims=2, in_channels=1, out_channels=2, channels=(32, 64, 128, 256), strides=(2, 2, 2), num_res_units=2)


def _diffusers_unet() -> nn.Module:
    """The blocks of Stable Diffusion 1.x, at a fifth of its width."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    model: nn.Module = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(64, 128, 256, 256),
        cross_attention_dim=256,
        attention_head_dim=8,
    )
    return model
