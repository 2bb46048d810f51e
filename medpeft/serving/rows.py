"""Another adapter for each image of a batch: a layer runs once for all images, each with its own tensors.

A layer's input is cut into images, and `torch.vmap` runs the layer with a row of stacked tensors for each: a
frozen weight stays one matrix product for the whole batch, and the products with adapter tensors become
batched ones. The head runs once for each adapter, on the images of this adapter, since heads may be anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.adapter import state_of
from ..adapters.adapters import Adapters
from ..adapters.record import Applied
from ..architecture.layers import within
from ..surgery.install import Built
from .mirror import Mirror

Tensors = Mapping[int, Tensor]
"""Tensors by the `id` of those in whose place they are."""

NamesByLayer = dict[str, list[str]]
"""Names of the tensors that differ between adapters, by the name of the layer that computes with them."""


def layers_by_image(
    model: nn.Module, record: Applied, built: Sequence[Built], tensors: Mapping[str, Tensor]
) -> NamesByLayer | None:
    """List the layers outside the head that compute with tensors of an adapter.

    Args:
        model: The adapted model.
        record: What was applied to it.
        built: Its adapters.
        tensors: Its tensors that differ between adapters, by name.

    Returns:
        None where a layer cannot run with other tensors for each image: a method does not say that it can
        (`by_image`), a tensor is read by other modules too, or a selected one is no vector.
    """
    names = {id(tensor): name for name, tensor in tensors.items()}
    layers: NamesByLayer = {}
    for item in built:
        if not item.method.by_image or not _is_apart(item):
            return None
        for tensor in state_of(item.adapter).values():
            layers.setdefault(item.site.name, []).append(names[id(tensor)])
    uses: dict[int, int] = {}
    for _, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        uses[id(tensor)] = uses.get(id(tensor), 0) + 1
    for name in (*record.selected, *record.statistics):
        if within(name, record.head):
            continue
        if tensors[name].ndim > 1 or uses[id(tensors[name])] > 1:
            return None
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    if all(_is_a_leaf(model, name, record) for name in layers):
        return layers
    return None


def _is_apart(item: Built) -> bool:
    """Whether an adapter computes with its own layer alone."""
    alone = item.first is None and not item.site.partners and not item.site.readers
    return alone and getattr(item.adapter, "handover", None) is None


def _is_a_leaf(model: nn.Module, name: str, record: Applied) -> bool:
    """Whether a module is a layer inside the model, outside the head and without other layers in it."""
    if not name or within(name, record.head):
        return False
    for child in model.get_submodule(name).children():
        if not isinstance(child, Adapters) and next(child.parameters(), None) is not None:
            return False  # An activation, as timm has it in norms, has no parameters.
    return True


def with_rows(
    adapted_mirror: nn.Module,
    shared: Tensors,
    rows_by_layer: Mapping[str, Tensors],
    heads: Sequence[str],
    groups: Sequence[tuple[Tensor, Tensors]],
) -> nn.Module:
    """Mirror a model so that each image has an adapter of its own.

    Args:
        adapted_mirror: The adapted model.
        shared: Tensors that are the same for all images.
        rows_by_layer: For each layer, by its name, tensors with a leading axis of images.
        heads: Names of the head's modules.
        groups: For each adapter, the numbers of its images, and its tensors.
    """
    fixed = dict(shared)
    for rows in rows_by_layer.values():
        for identity in rows:
            fixed.pop(identity, None)
    mirror = Mirror(fixed)
    mirrored = mirror.of(adapted_mirror)
    images = sum(len(numbers) for numbers, _ in groups)
    for name, rows in rows_by_layer.items():
        layer = mirror.of(adapted_mirror.get_submodule(name))
        plain = Mirror(fixed).of(adapted_mirror.get_submodule(name))
        layer.__dict__["forward"] = partial(_by_image, plain, rows, images)
    for name in heads:
        head = mirror.of(adapted_mirror.get_submodule(name))
        head.__dict__["forward"] = partial(_by_adapter, adapted_mirror.get_submodule(name), groups, images)
    return mirrored


def _by_image(layer: nn.Module, rows: Tensors, images: int, x: Tensor) -> Tensor:
    """Run a layer with other tensors for each image."""
    names = list(rows)

    def one(tensors: list[Tensor], x: Tensor) -> Any:
        return Mirror(dict(zip(names, tensors, strict=True))).of(layer).forward(x)

    by_image = x.unflatten(0, (images, -1))  # (B·m, …) → (B, m, …): m windows of each image, or itself
    y: Tensor = torch.vmap(one)(list(rows.values()), by_image)
    return y.flatten(0, 1)  # (B, m, …) → (B·m, …)


def _by_adapter(head: nn.Module, groups: Sequence[tuple[Tensor, Tensors]], images: int, x: Tensor) -> Tensor:
    """Run the head for each adapter, on its images."""
    by_image = x.unflatten(0, (images, -1))  # (B·m, …) → (B, m, …)
    whole: Tensor | None = None
    for numbers, tensors in groups:
        part = by_image[numbers].flatten(0, 1)  # (b, m, …) → (b·m, …)
        y = Mirror(tensors).of(head).forward(part)
        y = y.unflatten(0, (len(numbers), -1))  # (b·m, …) → (b, m, …)
        if whole is None:
            whole = y.new_empty(images, *y.shape[1:])
        whole[numbers] = y
    assert whole is not None  # A batch has images.
    return whole.flatten(0, 1)  # (B, m, …) → (B·m, …)
