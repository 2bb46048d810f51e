"""Networks for masks: MONAI's as they are, timm's with a decoder; each must answer for every pixel."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainerError
from ..scripts.segmenter import Segmenter, gives_features


def with_decoder(model: nn.Module, outputs: int) -> nn.Module:
    """Make a network that gives an output for every pixel: MONAI's are taken as they are.

    Raises:
        TrainerError: the model does not give its features.
    """
    if any(cls.__module__.startswith("monai.") for cls in type(model).__mro__):
        return model
    if not gives_features(model):
        raise TrainerError(
            f"{type(model).__name__} does not give its features on several scales, so no decoder fits it. "
            "Take another model of timm, such as a ResNet, ConvNeXt, Swin or ViT, or a network such as "
            "monai:UNet."
        )
    return Segmenter(model, outputs)


def check_shapes(model: nn.Module, name: str, outputs: int, shape: Sequence[int]) -> None:
    """Check that a network gives an output for every pixel of an input, by running it once.

    Raises:
        TrainerError: it does not.
    """
    device = next(model.parameters()).device
    training = model.training
    try:
        with torch.no_grad():
            found = model.eval()(torch.zeros(1, 3, *shape, device=device))
    # A network that cannot take a size fails wherever two of its tensors do not fit.
    except Exception as error:
        problem = [*str(error).splitlines(), type(error).__name__][0]
        raise TrainerError(
            f"--model {name} cannot take an input of {_by(shape)}: {problem} Many networks need a multiple "
            "of 16 or 32, some at least 64: change --image-size or --patch-size."
        ) from error
    finally:
        model.train(training)
    require_masks(found, name, outputs, shape)


def require_masks(found: Any, name: str, outputs: int, shape: Sequence[int]) -> None:
    """Raise a TrainerError unless what a network gave for one image is an output for every pixel."""
    needed = (1, outputs, *shape)
    given: Any = type(found).__name__
    if isinstance(found, Tensor):
        given = tuple(found.shape)
    if given != needed:
        raise TrainerError(
            f"--model {name} gives {given} for one image of {_by(shape)}, and masks need {needed}. Take a "
            "network for segmentation, such as monai:UNet, or a model of timm."
        )


def _by(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))
