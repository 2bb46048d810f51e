"""What a step is measured of: a model adapted by a method in a variant, by name of the case."""

import argparse
from typing import Any, NamedTuple

import torch
from libraries import with_peft
from networks import build
from timing import precision
from torch import Tensor, nn

import medpeft

EVERY_LINEAR = "lora, every linear"
LAST_QUARTER = "lora, last quarter"
PREFIX_KEPT = "lora, last quarter, prefix kept"
PEFTS = "peft's lora, every linear"
_LAST = {"target": "*", "parts": "qkvo", "depth": 0.25}  # every linear layer or convolution there

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "linear_probe": ("linear_probe", {}),
    "bias": ("bias", {}),
    "norm": ("norm", {}),
    "attention": ("attention", {}),
    "lora": ("lora", {}),
    EVERY_LINEAR: ("lora", {"target": "linear", "parts": "qkvo"}),
    "lora, every linear, A frozen": ("lora", {"target": "linear", "parts": "qkvo", "freeze_a": True}),
    "ssf": ("ssf", {}),
    "adaptformer": ("adaptformer", {}),
    "svdiff": ("svdiff", {}),
    "tsa": ("tsa", {}),
    "tsa, 3x3": ("tsa", {"sites": "3x3"}),
    LAST_QUARTER: ("lora", _LAST),
    PREFIX_KEPT: ("lora", _LAST),
    "lst": ("lst", {}),
    "dtl": ("dtl", {}),
    "dtl, joined at the end": ("dtl", {"start": 1.0}),
}

# What keeps little of the trunk, and what it is compared with.
BELOW = ["full", "linear_probe", EVERY_LINEAR, PEFTS, LAST_QUARTER, PREFIX_KEPT]
BELOW += ["lst", "dtl", "dtl, joined at the end"]

# The linear layers of a timm ViT but for its head, which trains whole.
PEFT = {"r": 8, "lora_alpha": 8, "target_modules": r"blocks\..*\.(qkv|proj|fc1|fc2)"}


class Prepared(NamedTuple):
    """A case that is ready: an adapted model, what of it a step runs, and on which inputs."""

    model: nn.Module
    network: nn.Module
    inputs: tuple[Tensor, ...]


def prepared(args: argparse.Namespace, case: str, inputs: tuple[Tensor, ...]) -> Prepared | None:
    """Build the model of a case, or the floor; None if the method does not fit, which is said."""
    if case == "floor":
        model = frozen(build(args.model, args.device, args.image_size))
        return Prepared(model, model, inputs)
    adapt = pefts if case == PEFTS else adapted
    try:
        model = adapt(args, case, args.image_size)
        if case != PREFIX_KEPT:
            return Prepared(model, model, inputs)
        with precision(args):
            split = medpeft.prefix(model, inputs[0])
            return Prepared(model, split.rest, (split.features(inputs[0]),))
    except (medpeft.MedpeftError, ImportError) as reason:
        print(left_out(case, reason))
        return None


def left_out(case: str, reason: Exception) -> str:
    """Say that a case is left out, and why."""
    return f"{case}: left out: {str(reason).partition(':')[0]}"


def adapted(args: argparse.Namespace, case: str, image_size: int) -> nn.Module:
    """Adapt a model, its adapters away from their initial values.

    Raises:
        MedpeftError: the method does not fit.
    """
    method, options = CASES[case]
    head = None if args.model.endswith("unet") else "auto"
    model = medpeft.apply(build(args.model, args.device, image_size), method, head=head, **options)
    move_away(model, ".adapters.")
    return model


@torch.no_grad()
def move_away(model: nn.Module, part: str) -> None:
    """Move the parameters away from their initial values whose names have a part."""
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.add_(torch.randn_like(parameter) * 0.01)


def pefts(args: argparse.Namespace, case: str, image_size: int) -> nn.Module:
    """Adapt a ViT by peft's LoRA on every linear layer, the head whole.

    Raises:
        MedpeftError, ImportError: it is another model, or there is no peft.
    """
    if "vit" not in args.model:
        raise medpeft.MedpeftError(f"its layers are those of a ViT, and {args.model} is none")
    model = with_peft(args.model, **PEFT, modules_to_save=["head"])(image_size).to(args.device)
    move_away(model, "lora_")
    return model


def frozen(model: nn.Module) -> nn.Module:
    """Freeze a model, its BatchNorm at its running statistics, as in every adapted model."""
    for module in model.requires_grad_(False).modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model
