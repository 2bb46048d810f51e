"""Models to measure by name, each with the shape of its input. Any other name is timm's."""

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


def build(name: str, device: str = "cpu", image_size: int | None = None) -> nn.Module:
    """Build a model in train mode, with random weights that are the same at every call.

    `image_size` matters to models that take images of one size only.
    """
    torch.manual_seed(0)
    with torch.device(device):  # A GPU draws a large model's weights in no time.
        return _network(name, image_size).train()


def _network(name: str, image_size: int | None) -> nn.Module:
    match name:
        case "sd_conv":
            # The widest convolution of Stable Diffusion 1.x, 1280×11520 as a matrix.
            return nn.Sequential(nn.Conv2d(1280, 1280, 3, padding=1))
        case "monai_unet":
            return _monai_unet()
        case "diffusers_unet":
            return _diffusers_unet()
        case _:
            return _timm_model(name, image_size)


def example(name: str, batch: int, size: int, device: str = "cpu") -> tuple[Tensor, ...]:
    """Draw the inputs of a model from a seed.

    They are images (N, C, H, W); latents, time steps and texts for a diffusion UNet; features for a part of
    it.
    """
    torch.manual_seed(1)
    match name:
        case "sd_conv":
            return (torch.randn(batch, 1280, size // 16, size // 16, device=device),)
        case "monai_unet":
            return (torch.randn(batch, 1, size, size, device=device),)
        case "diffusers_unet":
            steps = torch.randint(0, 1000, (batch,), device=device)
            latents = torch.randn(batch, 4, size // 8, size // 8, device=device)
            return latents, steps, torch.randn(batch, 77, 256, device=device)
        case _:
            return (torch.randn(batch, 3, size, size, device=device),)


def forward(model: Callable[..., Any], inputs: tuple[Tensor, ...], grad: bool = False) -> Tensor:
    """Compute the model's output.

    With `grad`, the first input asks for a gradient, and so does every activation.
    """
    first = inputs[0].detach().requires_grad_(grad)
    output = model(first, *inputs[1:])
    if isinstance(output, Tensor):
        return output
    wrapped: Tensor = output[0]  # By diffusers and transformers.
    return wrapped


def _timm_model(name: str, image_size: int | None) -> nn.Module:
    """Build a timm model, for images of a size if it takes one size only."""
    options = {}
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if image_size is not None and config is not None and config.fixed_input_size:
        options["img_size"] = image_size
    model: nn.Module = timm.create_model(name, num_classes=3, **options)
    return model


def _monai_unet() -> nn.Module:
    from monai.networks.nets.unet import UNet

    return UNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=2,
        channels=(32, 64, 128, 256),
        strides=(2, 2, 2),
        num_res_units=2,
    )


def _diffusers_unet() -> nn.Module:
    """Build the blocks of Stable Diffusion 1.x, at a fifth of its width."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    model: nn.Module = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(64, 128, 256, 256),
        cross_attention_dim=256,
        attention_head_dim=8,
    )
    return model
