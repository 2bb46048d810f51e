"""What travels between a site and the coordinator, and what is checked when it arrives."""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import medpeft
from medpeft.architecture.head import find_head

from .settings import Settings


@dataclass(frozen=True)
class Terms:
    """What coordinator and sites have to agree on.

    Attributes:
        base: digest of the weights that the adapters are trained on, as in the header of their file.
        shared: names of the tensors that all sites have in common: what trains, less what is local.
        sent: those of them that a site sends back: a frozen A is everywhere already.
    """

    base: str
    shared: list[str]
    sent: list[str]

    @classmethod
    def of(cls, model: nn.Module, settings: Settings) -> "Terms":
        """Give the terms of an adapted model.

        A local head is personalised (FedPer, Arivazhagan et al. 2019, arXiv 1912.00818). A local BatchNorm,
        with its statistics, fits the site's scanner (FedBN, Li et al. 2021, arXiv 2102.07623).
        """
        local: list[str] = []
        if "head" in settings.kept:
            local += find_head(model)
        if "batchnorm" in settings.kept:
            local += [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
        inside = tuple(f"{name}." for name in local)
        shared = [name for name in medpeft.state(model) if not name.startswith(inside)]
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        file = io.BytesIO()
        medpeft.save(model, file)
        base = medpeft.inspect(file.getvalue()).document["base"]["values"]
        return cls(base, shared, [name for name in shared if name not in frozen])


def accept(
    model: nn.Module, terms: Terms, arrays: Mapping[str, npt.NDArray[Any]], base: str, weight: float
) -> dict[str, Tensor]:
    """Check what a site sent, and give it as the state of all shared tensors.

    Args:
        model: of the coordinator; what fits it is written into it.
        terms: of the exchange.
        arrays: as they came, by name.
        base: the digest of the site's base.
        weight: the number of images that the site trained on.

    Raises:
        MedpeftError: the base is another; tensors are missing or too many; a shape or kind of numbers is not
            the model's; or a value is not finite. The model is as it was.
    """
    if base != terms.base:
        raise medpeft.MedpeftError(
            f"its base has the digest {base}, and the coordinator's {terms.base}: other weights, or another "
            "version of the model. Install the same at both."
        )
    if not (math.isfinite(weight) and weight > 0):
        raise medpeft.MedpeftError(f"it says that it trained on {weight:g} images.")
    missing, stray = set(terms.sent) - set(arrays), set(arrays) - set(terms.sent)
    if missing or stray:
        raise medpeft.MedpeftError(
            f"{len(missing)} tensors are missing and {len(stray)} are not awaited, such as "
            f"{min(missing | stray)!r}. Are method, options and --local the same?"
        )
    put(model, arrays)
    state = medpeft.state(model)
    return {name: state[name] for name in terms.shared}


def put(model: nn.Module, *parts: Mapping[str, Tensor | npt.NDArray[Any]]) -> None:
    """Put states into a model, the later over the earlier; what none of them has stays."""
    merged: dict[str, Tensor | npt.NDArray[Any]] = dict(medpeft.state(model))
    for part in parts:
        merged.update(part)
    medpeft.load_state(model, merged)
