"""The head of a model, by the convention of the library that it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from torch import nn

from ..errors import MedpeftError, clipped
from .layers import child_at

Head = Literal["auto"] | str | Sequence[str] | None

# Attributes that hold the last layer, in the order in which they are looked up.
_TORCHVISION = ("heads", "head", "fc", "classifier")
_TORCHVISION_AUXILIARY = ("AuxLogits", "aux1", "aux2", "aux_classifier")
_TRANSFORMERS = ("classifier", "cls_classifier", "distillation_classifier", "decode_head")
_MONAI = (
    *("classification_head", "class_layers.out", "class_layers", "_fc", "last_linear", "fc", "out"),
    *("conv_final", "final_conv", "output_block", "out_tr", "seg_head", "final"),  # segmentation
    *("segmentation_head", "out_0"),  # FlexibleUNet, MedNeXt
)
_LIBRARIES = ("torchvision", "transformers", "monai", "diffusers", "open_clip", "timm")


def find_head(model: nn.Module, head: Head = "auto") -> tuple[str, ...]:
    """Find the modules that make up the head, by name; none for a model without one or `head=None`.

    >>> find_head(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "1")
    ('1',)

    Args:
        model: Any module.
        head: "auto" to find it, a name or several, or None for none.

    Raises:
        MedpeftError: a given name does not exist, or "auto" knows no convention for this model.
    """
    if head is None:
        return ()
    if not isinstance(head, (str, list, tuple)) or not all(isinstance(name, str) for name in head):
        raise MedpeftError(f"head={clipped(head)} must be a module's name, several, 'auto' or None.")
    if head != "auto":
        return _by_name(model, (head,) if isinstance(head, str) else tuple(head))
    if callable(getattr(model, "get_classifier", None)):
        return _by_timm(model)
    match _library(model):
        case "diffusers" | "open_clip" | "timm":
            # timm's classifiers have `get_classifier`; a model without it is an encoder.
            return ()
        case "transformers":
            return _with_parameters(model, _TRANSFORMERS)
        case "monai":
            return _by_monai(model)
    return _by_convention(model)


def _by_name(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    modules = dict(model.named_modules())
    for name in names:
        if name == "" or name not in modules:
            cls = type(model).__name__
            children = _children(model)
            raise MedpeftError(f"head={name!r} is no module of {cls}. At its top level are: {children}.")
    return names


def _by_timm(model: nn.Module) -> tuple[str, ...]:
    """Name the classifiers from timm's `get_classifier`, and their parts."""
    classifiers = model.get_classifier()  # type: ignore[operator]  # find_head has seen that it can be called
    if not isinstance(classifiers, (tuple, list, nn.ModuleList)):
        classifiers = (classifiers,)
    heads: set[nn.Module] = set()
    for classifier in classifiers:
        if isinstance(classifier, nn.Module) and any(True for _ in classifier.parameters()):
            heads.add(classifier)
    heads |= _unlisted_classifiers(model, heads)
    return tuple(name for name, module in model.named_modules() if module in heads)


def _unlisted_classifiers(model: nn.Module, heads: set[nn.Module]) -> set[nn.Module]:
    """Linear layers at the top level, of the shape of a classifier: VOLO adds the scores of an `aux_head`."""
    shapes = {head.weight.shape for head in heads if isinstance(head, nn.Linear)}
    alike: set[nn.Module] = set()
    for child in model.children():
        if isinstance(child, nn.Linear) and child.weight.shape in shapes:
            alike.add(child)
    return alike


def _by_monai(model: nn.Module) -> tuple[str, ...]:
    """The first of MONAI's usual names; its `UNet` and `AttentionUnet` end in the last of their `model`."""
    layers = model._modules.get("model")
    if type(model).__name__ in ("UNet", "AttentionUnet") and isinstance(layers, nn.Sequential):
        return (f"model.{len(layers) - 1}",)
    return _with_parameters(model, _MONAI)[:1]


def _by_convention(model: nn.Module) -> tuple[str, ...]:
    """The attribute with a usual name that holds the last parameters, and torchvision's auxiliary heads."""
    parameters = [name for name, _ in model.named_parameters()]
    for name in _with_parameters(model, _TORCHVISION):
        if parameters[-1].startswith(f"{name}.") or _library(model) == "torchvision":
            return (name, *_with_parameters(model, _TORCHVISION_AUXILIARY))
    names = [name for name, _ in model.named_children()]
    fault = f"The head of {type(model).__name__} cannot be told from its class"
    if len(names) == 1 and any(True for _ in model.get_submodule(names[0]).children()):
        raise MedpeftError(
            f"{fault}, which wraps one module, {names[0]!r}: apply to that, or pass head='name'."
        )
    raise MedpeftError(
        f"{fault}: pass head='name' (children: {_children(model) or 'none'}), or head=None if it has none."
    )


def _children(model: nn.Module) -> str:
    return ", ".join(name for name, _ in model.named_children())


def _with_parameters(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Keep the names of modules that exist in the model and have parameters."""
    return tuple(name for name in names if _has_parameters(model, name))


def _has_parameters(model: nn.Module, name: str) -> bool:
    module = child_at(model, name)
    return module is not None and any(True for _ in module.parameters())


def _library(model: nn.Module) -> str:
    """Name of the known library of the model's class, or of the nearest of its bases; "" for none."""
    for cls in type(model).__mro__:
        package = cls.__module__.partition(".")[0]
        if package in _LIBRARIES:
            return package
    return ""
