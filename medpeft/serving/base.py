"""The base of a bank: the model without adapters, with the values that it has without them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters.adapters import Adapters
from ..adapters.aside import recovered, require_acting
from ..adapters.record import Applied, applied, own_tensors
from ..adapters.wiring import plain_forward
from ..architecture.layers import is_differentiable
from ..errors import MedpeftError, listed, require
from ..sharding import is_sharded
from ..surgery.refusals import refuse
from .mirror import Mirror


class _Seen(NamedTuple):
    """A tensor of the model as it was when the bank was made; `address` and `version` tell of a change."""

    name: str
    owner: nn.Module
    key: str
    tensor: Tensor
    version: int
    address: int


class _SeenModule(NamedTuple):
    """A module of the model as it was when the bank was made."""

    name: str
    module: nn.Module
    children: dict[str, nn.Module]
    forward: Callable[..., Any] | None

    def has_changed(self) -> bool:
        """Whether it has other modules inside, or another forward of its own."""
        return _children(self.module) != self.children or plain_forward(self.module) != self.forward


class Base:
    """The base of a bank.

    Which products torch takes for a layer depends on whether its tensors require gradients, also where none
    are computed. So a mirror has tensors of its own, on the same memory, that require what they do in use.

    Attributes:
        model: The model, which may be adapted at the moment.
        plain: A mirror of it without adapters, on the memory of the model's tensors.
        kept: Values of the base, by name, for the tensors that an adapter of the bank changes in the model.
        trained_before: Whether each parameter required a gradient before any adapter came.
    """

    def __init__(self, model: nn.Module) -> None:
        record = applied(model)
        if record is not None:
            require_acting(recovered(model, "Bank"), "Bank")
        else:
            refuse(model)
        bare = Mirror({}, bare=True).of(model)
        self.model = model
        self._originals = dict(own_tensors(bare))
        for name, tensor in self._originals.items():
            require(
                not is_sharded(tensor) and not tensor.is_meta,
                f"{name!r} is sharded or on the meta device: a bank needs the whole base.",
            )
        self._seen = _all_seen(model, self._originals)
        self._seen_modules = list(_all_modules(model))
        self.trained_before = {name: p.requires_grad for name, p in bare.named_parameters()}
        if record is not None:
            self.trained_before = dict(record.trained_before)
        mirrored = {}
        for name, tensor in self._originals.items():
            mirrored[id(tensor)] = requiring(tensor, self._trains_before(name))
        self.plain = Mirror(mirrored).of(bare)
        self._in_plain = dict(own_tensors(self.plain))
        self.kept: dict[str, Tensor] = {}
        if record is not None:
            self.keep(record)

    def _trains_before(self, name: str) -> bool:
        return self.trained_before.get(name, False)

    def keep(self, record: Applied, *, adapted: bool = True) -> None:
        """Keep the base's values of what the methods of a record train.

        Args:
            record: A record.
            adapted: Whether it is on the model, whose tensors then hold other values; the record has the
                base's.

        Raises:
            MedpeftError: the record gave the values up.
        """
        trained = [name for name in (*record.selected, *record.statistics) if name in self._originals]
        require(
            not adapted or not trained or record.base is not None,
            f"{record.name!r} gave up the base's values with keep_base=False, and a bank needs them: save "
            "the adapters, make the bank of a fresh base, and add the file.",
        )
        kept = dict(self.kept)
        for name in trained:
            if name in kept:
                continue
            original = self._originals[name]
            value = original.detach().clone()
            if adapted and record.base is not None:
                value = record.base[name].to(original.device, copy=True)
            kept[name] = requiring(value, False)
        self.kept = kept

    def replaced(self) -> dict[int, Tensor]:
        """Map the `id` of each tensor of `plain` whose memory may hold other values to the base's."""
        tensors = {}
        for name, value in self.kept.items():
            tensors[id(self._in_plain[name])] = requiring(value, self._trains_before(name))
        return tensors

    def view(self, selected: Collection[str], others: Mapping[str, Tensor]) -> nn.Module:
        """Mirror the base as a method has it that trains some parameters, with other tensors for some."""
        replaced = {}
        for name, tensor in {**self.tensors(), **others}.items():
            replaced[id(self._in_plain[name])] = requiring(tensor, name in selected)
        return Mirror(replaced).of(self.plain)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the base by name, with its values."""
        return {**self._in_plain, **self.kept}

    def own(self, name: str) -> Tensor:
        """Return a tensor of `plain` by name, whatever its values are at the moment."""
        return self._in_plain[name]

    @torch.no_grad()
    def values(self, names: Iterable[str], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Collect the base's values to put into the model, or the model's own tensor where it has another."""
        values: dict[str, Tensor] = {}
        for name in names:
            original = self._originals[name]
            values[name] = self.kept[name].detach()
            if present.get(name) is not original:
                original.copy_(values[name])
                values[name] = original
        return values

    def require_unchanged(self) -> None:
        """Raise `MedpeftError` if the base is not as it was when the bank was made."""
        changed = []
        for seen in self._seen:
            if seen.name in self.kept:
                continue
            tensor = seen.owner._parameters.get(seen.key, seen.owner._buffers.get(seen.key))
            if tensor is not seen.tensor or _stamp(tensor) != (seen.version, seen.address):
                changed.append(seen.name)
        if changed:
            raise MedpeftError(
                f"{listed(changed, most=1)} was written to, moved or replaced since the bank was made, or "
                "the model is merged for the moment: the adapters belong to the base as it was. Move the "
                "model and load its weights first, then make the bank."
            )

    def require_same_modules(self) -> None:
        """Raise `MedpeftError` if a module was replaced, or has another forward, which no mirror has."""
        changed = [seen.name for seen in self._seen_modules if seen.has_changed()]
        require(
            not changed,
            f"{listed(changed, most=1)} has other modules or another forward than when the bank was made, "
            "and calls of the bank would not run them: make a new bank.",
        )


def requiring(tensor: Tensor, requires_grad: bool) -> Tensor:
    """Make a parameter on the memory of a tensor; one of a class of its own, or of integers, stays itself."""
    if type(tensor) not in (Tensor, nn.Parameter) or not is_differentiable(tensor):
        return tensor
    return nn.Parameter(tensor.detach(), requires_grad=requires_grad)


def _all_seen(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[_Seen]:
    """List every tensor of a base with its owner in the model."""
    owners = dict(model.named_modules())
    seen = []
    for name, tensor in tensors.items():
        path, _, key = name.rpartition(".")
        seen.append(_Seen(name, owners[path], key, tensor, *_stamp(tensor)))
    return seen


def _all_modules(model: nn.Module) -> Iterator[_SeenModule]:
    """Yield all modules of a model but its adapters, by the name that messages show."""
    inside_adapters = set[nn.Module]()
    for name, module in model.named_modules():
        if isinstance(module, Adapters):
            inside_adapters.update(module.modules())
        if module not in inside_adapters:
            shown = name or type(module).__name__
            yield _SeenModule(shown, module, _children(module), plain_forward(module))


def _children(module: nn.Module) -> dict[str, nn.Module]:
    """Return the modules in a module by name, without adapters."""
    present = module._modules.items()
    return {name: child for name, child in present if child is not None and not isinstance(child, Adapters)}


def _stamp(tensor: Tensor) -> tuple[int, int]:
    """Count of the writes to a tensor, which torch does not keep of inference tensors, and its address."""
    version = 0
    if not tensor.is_inference():
        version = tensor._version
    return version, tensor.data_ptr()
