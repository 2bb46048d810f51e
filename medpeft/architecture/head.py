"""The head of a model, by the convention of the library it comes from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..errors import MedpeftError

Head = str | Sequence[str] | None

# Attributes that hold the last layer in torchvision, Hugging Face and MONAI, in the order in which they are looked up.
_NAMES = {
    "torchvision": ("heads", "head", "fc", "classifier"),
    "transformers": ("classifier", "cls_classifier", "distillation_classifier", "decode_head"),
    "monai": ("classification_head", "class_layers.out", "class_layers", "_fc", "last_linear", "fc", "out"),
    "monai segmentation": ("conv_final", "final_conv", "output_block", "out_tr", "seg_head", "final"),
}
# timm's models have `get_classifier`; what has none there is an encoder.
_HEADLESS = ("diffusers", "open_clip", "timm")


def find_head(model: nn.Module, head: Head = "auto") -> tuple[str, ...]:
    """Names of the modules that make up the head; empty for a model without one or `head=None`.

    Args:
        model: Any module.
        head: "auto" to find it, a name or several, or None for none.

    Raises:
        MedpeftError: a given name does not exist, or "auto" knows no convention for this model.
    """
    if head is None:
        return ()
    if head != "auto":
        return _given(model, (head,) if isinstance(head, str) else tuple(head))
    if callable(getattr(model, "get_classifier", None)):
        return _by_timm(model)
    library = _library(model)
    if library in _HEADLESS:
        return ()
    if library == "transformers":
        return tuple(name for name in _NAMES["transformers"] if _has_parameters(model, name))
    if library == "monai":
        return _by_monai(model)
    return _by_convention(model)


def _given(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    known = dict(model.named_modules())
    for name in names:
        if name not in known or name == "":
            children = ", ".join(child for child, _ in model.named_children())
            raise MedpeftError(f"head={name!r} is no module of {type(model).__name__}. At its top level are: {children}.")
    return names


def _by_timm(model: nn.Module) -> tuple[str, ...]:
    found = model.get_classifier()  # type: ignore[operator]  # shown to be callable by find_head
    wanted = found if isinstance(found, (tuple, list, nn.ModuleList)) else (found,)
    heads = [m for m in wanted if isinstance(m, nn.Module) and any(True for _ in m.parameters())]
    # VOLO adds the scores of an `aux_head` that it does not list: a Linear beside the classifier, of its shape.
    heads += [m for m in model.children() if any(_alike(m, head) for head in heads)]
    objects = {id(m) for m in heads}
    return tuple(name for name, module in model.named_modules() if id(module) in objects)


def _alike(layer: nn.Module, head: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and isinstance(head, nn.Linear) and layer.weight.shape == head.weight.shape


def _by_monai(model: nn.Module) -> tuple[str, ...]:
    if type(model).__name__ == "UNet" and isinstance(getattr(model, "model", None), nn.Sequential):
        return (f"model.{len(model.model) - 1}",)  # type: ignore[arg-type]  # shown to be a Sequential
    names = (*_NAMES["monai"], *_NAMES["monai segmentation"])
    return tuple(name for name in names if _has_parameters(model, name))[:1]


def _by_convention(model: nn.Module) -> tuple[str, ...]:
    """The one attribute with a usual name that holds the model's last parameters; torchvision's auxiliary heads too."""
    last = next(reversed([name for name, _ in model.named_parameters()]), "")
    for name in _NAMES["torchvision"]:
        if _has_parameters(model, name) and (last.startswith(name + ".") or _library(model) == "torchvision"):
            return (name, *(aux for aux in ("AuxLogits", "aux1", "aux2", "aux_classifier") if _has_parameters(model, aux)))
    children = ", ".join(child for child, _ in model.named_children()) or "none"
    raise MedpeftError(
        f"The head of {type(model).__name__} cannot be told from its class: pass head='name' (children: {children}), or "
        "head=None if it has none."
    )


def _has_parameters(model: nn.Module, name: str) -> bool:
    module: nn.Module | None = model
    for step in name.split("."):
        module = module._modules.get(step) if module is not None else None
    return module is not None and any(True for _ in module.parameters())


def _library(model: nn.Module) -> str:
    """Top-level package of the first class of the model's that is not the user's own."""
    packages = [cls.__module__.partition(".")[0] for cls in type(model).__mro__]
    return next((p for p in packages if p in (*_NAMES, *_HEADLESS)), "")
