"""The models of the zoo, each with an input for it; all on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.utils._pytree
from torch import nn
from zoo_libraries import (
    CLASSES,
    Make,
    diffusers_models,
    monai_models,
    open_clip_models,
    transformers_models,
)


@dataclass(frozen=True)
class Candidate:
    """An architecture: its library, and a function that builds it and an input."""

    library: str
    family: str
    name: str
    make: Make

    def build(self) -> tuple[nn.Module, Any]:
        """Build the model and its input on the meta device."""
        try:
            with torch.device("meta"):
                return self.make()
        except RuntimeError:
            # RegNet and MONAI's Swin compute widths and drop rates with tensors.
            # Not initialised, they take no memory.
            model, example = self.make()
            on_meta = torch.utils._pytree.tree_map(lambda tensor: tensor.to("meta"), example)
            return model.to("meta"), on_meta


def timm_models() -> Iterator[Candidate]:
    """List every architecture of the installed timm; a family is a file of `timm.models`."""
    import timm

    for name in timm.list_models():
        family = timm.model_entrypoint(name).__module__.rpartition(".")[2]
        yield Candidate("timm", family, name, partial(_timm_model, name))


def _timm_model(name: str) -> tuple[nn.Module, Any]:
    import timm

    model = timm.create_model(name, num_classes=CLASSES)
    return model, torch.empty(2, *model.pretrained_cfg["input_size"])


def torchvision_models() -> Iterator[Candidate]:
    """List every classifier of the installed torchvision."""
    import torchvision.models as zoo

    for name in zoo.list_models(module=zoo):
        family = zoo.get_model_builder(name).__module__.rpartition(".")[2]
        make = partial(_torchvision_model, name)
        yield Candidate("torchvision", f"torchvision {family}", f"torchvision/{name}", make)


def _torchvision_model(name: str) -> tuple[nn.Module, Any]:
    import torchvision.models as zoo

    size = 299 if name == "inception_v3" else 224
    return zoo.get_model(name, num_classes=CLASSES), torch.empty(2, 3, size, size)


def other_models() -> Iterator[Candidate]:
    """List small models of Hugging Face transformers, MONAI, open_clip and diffusers."""
    libraries = {
        "transformers": transformers_models,
        "monai": monai_models,
        "open_clip": open_clip_models,
        "diffusers": diffusers_models,
    }
    for library, models in libraries.items():
        for name, make in models().items():
            yield Candidate("others", library, f"{library}/{name}", make)
