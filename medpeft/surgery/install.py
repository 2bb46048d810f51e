"""Put adapters into a model, and take them out again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from uuid import uuid4

from torch import nn

from ..adapters.adapter import Adapter
from ..adapters.adapters import Adapters
from ..adapters.bias_gradients import trains_apart
from ..adapters.forward import adapted_forward
from ..adapters.handover import Handover
from ..adapters.presence import Branch, Path, branches_to
from ..adapters.registry import Method
from ..adapters.sharing import register_shared
from ..adapters.wiring import Wiring, unwire, wire
from ..architecture.layers import within
from ..architecture.site import Site
from ..architecture.weight_reads import has_fused_path


@dataclass(frozen=True)
class Built:
    """An adapter that is built but not yet in the model.

    Attributes:
        method: Its method.
        site: Its site.
        adapter: The adapter.
        first: The first place, if this adapter is a second place; else None.
    """

    method: Method
    site: Site
    adapter: Adapter
    first: Adapter | None = None

    @property
    def name(self) -> str:
        """Name among the adapters of its layer."""
        if self.first is None:
            return self.method.name + self.site.suffix
        return f"{self.method.name}_partner"


# torch takes a fused path only for a module without hooks. This hook is never called.
_WITH_A_HOOK = {"_forward_hooks": {0: None}}


def install(model: nn.Module, built: list[Built]) -> None:
    """Register every adapter, and wire its layer, the readers of its weight, and the model."""
    by_layer: dict[nn.Module, list[Built]] = {}
    for item in built:
        by_layer.setdefault(item.site.layer, []).append(item)
    installation = uuid4().hex
    for layer, items in by_layer.items():
        adapters = Adapters(_named(items))
        adapters.installation = installation
        layer.add_module("adapters", adapters)
    register_shared(model, [(item.site.layer, item.adapter) for item in built])
    for module, wiring in _wirings(model, built):
        wire(module, adapted_forward, replace(wiring, installation=installation))


def _named(items: list[Built]) -> dict[str, Adapter]:
    """Name the adapters of one layer; the second places of several adapters of one method get numbers."""
    named: dict[str, Adapter] = {}
    for item in items:
        name, number = item.name, 1
        while name in named:
            number += 1
            name = f"{item.name}_{number}"
        named[name] = item.adapter
    return named


def _wirings(model: nn.Module, built: list[Built]) -> Iterator[tuple[nn.Module, Wiring]]:
    """Yield every module to be wired, with its wiring."""
    modules = dict(model.named_modules())
    reads: dict[nn.Module, list[str]] = {model: []}
    handovers = _handovers(modules, built)
    for item in built:
        reads.setdefault(item.site.layer, [])
        for reader in item.site.readers:
            paths_of_reader = reads.setdefault(modules[reader.name], [])
            if reader.path not in paths_of_reader:
                paths_of_reader.append(reader.path)
    apart = {module for module in modules.values() if trains_apart(module)}
    unfused = {
        module
        for name, module in modules.items()
        if has_fused_path(module) and _bypasses(module, name, built)
    }
    for module in dict.fromkeys([*reads, *handovers, *apart, *unfused]):
        read_below = tuple(reads.get(module, ()))
        overrides = _WITH_A_HOOK if module in unfused else {}
        opened = tuple(handovers.get(module, ()))
        branches: tuple[Branch, ...] = ()
        if module is model:
            branches = branches_to(_paths(modules, {*reads, *handovers, *unfused}))
        yield (
            module,
            Wiring(
                module is model,
                read_below,
                overrides=overrides,
                handovers=opened,
                apart=module in apart,
                branches=branches,
            ),
        )


def _paths(modules: dict[str, nn.Module], wired: set[nn.Module]) -> list[Path]:
    """List where modules are below the model."""
    return [tuple(name.split(".")) for name, module in modules.items() if name and module in wired]


def _handovers(modules: dict[str, nn.Module], built: list[Built]) -> dict[nn.Module, list[Handover]]:
    """Map each module that opens handovers for its forward to these: a layer, or one around several."""
    handovers: dict[nn.Module, list[Handover]] = {}
    for item in built:
        handover = getattr(item.adapter, "handover", None)
        if handover is None:
            continue
        opener = item.site.layer
        around = item.site.draft.around
        if around is not None:
            opener = modules[around]
        of_opener = handovers.setdefault(opener, [])
        if handover not in of_opener:
            of_opener.append(handover)
    return handovers


def _bypasses(module: nn.Module, name: str, built: list[Built]) -> bool:
    """Whether a module's fused kernel would bypass an adapter inside it.

    The kernel takes the weights that the module reads, so it meets adapters on those alone.
    """
    for item in built:
        inside = not name or within(item.site.name, [name])
        reads = any(reader.name == name for reader in item.site.readers)
        if inside and item.site.layer is not module and not reads:
            return True
    return False


def uninstall(model: nn.Module) -> None:
    """Take every adapter and every wiring out of the model."""
    for module in list(model.modules()):
        unwire(module)
        if isinstance(module._modules.get("adapters"), Adapters):
            del module._modules["adapters"]
