"""A kind of adapters: those of the same methods and options, at the same places."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.record import Adapted, Applied, own_tensors, set_applied
from ..architecture.layers import within
from ..checkpoint.load import Prepared
from ..surgery.install import Built, install
from .base import Base
from .rows import layers_by_image


@dataclass
class Kind:
    """What the adapters of one kind have in common. They differ in values, and in the number of classes.

    Attributes:
        key: Equal for adapters of the same kind.
        record: What `apply` would leave on the model.
        built: The adapters, which also come into the model when one of the kind is used.
        adapted_mirror: A mirror of the base with these adapters in it.
        tensors: Tensors of `adapted_mirror` by the names of a file.
        own: Tensors of `adapted_mirror` by the names that they have in the base.
        heads: Names of those of them that belong to the head, whose shapes may differ.
        head_modules: Names of the modules that these belong to.
        layers: Layers that can run with other tensors for each image, with the names of these; None if images
            are run in groups of one adapter.
        tried: Whether images can run so, by what comes in; see `trial.py`.
        of_seed: Whether what the adapters keep beside the tensors of a file depends on the seed, as a random
            buffer that is not saved does; None as long as no adapter of another seed has come.
    """

    key: str
    record: Applied
    built: list[Built]
    adapted_mirror: nn.Module
    tensors: dict[str, Tensor]
    own: dict[str, Tensor]
    heads: list[str]
    head_modules: list[str]
    layers: dict[str, list[str]] | None
    tried: dict[Any, bool] = field(default_factory=dict)
    of_seed: bool | None = None

    @classmethod
    def of(cls, base: Base, key: str, prepared: Prepared) -> Kind:
        """Make a kind of the first adapter of it that was read for a view of the base."""
        planned = prepared.planned
        assert planned is not None  # A view of the base is not adapted.
        record = replace(planned.record, trained_before=base.trained_before)
        install(planned.model, prepared.built)
        set_applied(planned.model, record)
        tensors = Adapted.of(planned.model).saved
        layers = layers_by_image(planned.model, record, prepared.built, tensors)
        heads = [name for name in record.selected if within(name, record.head)]
        modules = [module for module in record.head if any(within(name, [module]) for name in heads)]
        own = dict(own_tensors(planned.model))
        return cls(key, record, prepared.built, planned.model, tensors, own, heads, modules, layers)

    def replaced(self, base: Base, values: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Map the `id` of tensors of `adapted_mirror` to values of an adapter, and of the base."""
        tensors = {id(self.own[name]): value for name, value in base.kept.items()}
        for name, value in values.items():
            tensors[id(self.tensors[name])] = value
        return tensors

    def may_keep_other(self, record: Applied) -> bool:
        """Whether an adapter of another seed may keep other tensors beside those of its file."""
        return record.seed != self.record.seed and self.of_seed is not False and bool(_unsaved(self.built))

    def keeps_same(self, built: Sequence[Built]) -> bool:
        """Whether adapters that were made by another seed keep the same beside the tensors of a file."""
        own, others = _unsaved(self.built), _unsaved(built)
        if own.keys() != others.keys():
            return False
        return all(torch.equal(tensor, others[name]) for name, tensor in own.items())

    def built_for(self, model: nn.Module) -> list[Built]:
        """List the adapters with their places in a model."""
        built = []
        modules = dict(model.named_modules())
        for item in self.built:
            layer = modules[item.site.name]
            item.adapter.train(layer.training)
            built.append(replace(item, site=replace(item.site, layer=layer)))
        return built

    @torch.no_grad()
    def clear(self) -> None:
        """Forget the values of the adapter that was in the model last."""
        for name, tensor in self.tensors.items():
            if name not in self.record.selected and name not in self.record.statistics:
                tensor.zero_()


def _unsaved(built: Sequence[Built]) -> dict[str, Tensor]:
    """Collect the tensors of adapters that no file holds: buffers that are not saved, plain attributes."""
    found = {}
    for number, item in enumerate(built):
        for name, root in {"": item.adapter, **item.adapter.shared}.items():
            for path, module in root.named_modules(prefix=f"{number}.{name}"):
                for key in module._non_persistent_buffers_set:
                    found[f"{path}.{key}"] = module.get_buffer(key)
                for key, value in vars(module).items():
                    if isinstance(value, Tensor):
                        found[f"{path}.{key}"] = value
    return found


def key_of(record: Applied, dtypes: Mapping[str, torch.dtype]) -> str:
    """Describe what the adapters of a kind have in common.

    Args:
        record: The record of one of them.
        dtypes: dtypes of its tensors by name.
    """
    described = record.to_json()
    # By these three the adapters were made; their values and their places tell the rest.
    for made_by in ("seed", "dtype", "depth"):
        del described[made_by]
    own = {}
    for name, dtype in dtypes.items():
        if name not in record.selected and name not in record.statistics:
            own[name] = str(dtype)
    return json.dumps([described, own], sort_keys=True, default=repr)
