"""A mirror of a model: objects that share everything with its modules, but for some tensors.

The model itself is not touched, so any number of threads may run mirrors of it at once, each with other
tensors, and an interrupt leaves nothing behind. `adapters/stand_in.py` does the same for one layer.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.adapters import Adapters
from ..adapters.batchnorm import StaysInEval
from ..adapters.record import set_applied
from ..adapters.stand_in import rebound, sharing_all
from ..adapters.wiring import wiring_of
from ..architecture.caches import CACHE
from ..errors import MedpeftError

_OF_WIRING = ("_replicate_for_data_parallel", "__prepare_scriptable__", "_compiled_call_impl")


class Mirror:
    """Mirrors modules, all in eval mode.

    Args:
        tensors: Tensors in the place of a module's own, by the `id` of these.
        bare: Whether the mirrored model is without its adapters.
    """

    def __init__(self, tensors: Mapping[int, Tensor], *, bare: bool = False) -> None:
        self.tensors, self.bare = tensors, bare
        self._mirrored: dict[int, nn.Module] = {}

    def of(self, module: nn.Module) -> nn.Module:
        """Mirror a module and everything inside it.

        Raises:
            MedpeftError: a forward that was put on it belongs to the original alone.
        """
        known = self._mirrored.get(id(module))
        if known is not None:
            return known
        copy = sharing_all(module)
        self._mirrored[id(module)] = copy
        own = copy.__dict__
        own["training"] = False
        own["_parameters"] = self._with_tensors(module._parameters)
        own["_buffers"] = self._with_tensors(module._buffers)
        own["_modules"] = self._mirrored_all(module._modules)
        if CACHE in own:
            own[CACHE] = {}  # What the original keeps is of its own parameters.
        if isinstance(module, Adapter):
            own["shared"] = self._mirrored_all(module.shared)
        if isinstance(module, nn.RNNBase):  # It keeps a list of its parameters beside their names.
            own["_flat_weights"] = [own["_parameters"].get(name) for name in module._flat_weights_names]
        if self.bare:
            _take_off(module, copy)
        elif "forward" in own:
            own["forward"] = rebound(own["forward"], module, copy)
        return copy

    def _with_tensors(self, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Map names to tensors, others in the place of those that are replaced."""
        return {name: self.tensors.get(id(tensor), tensor) for name, tensor in tensors.items()}

    def _mirrored_all(self, modules: Mapping[str, nn.Module | None]) -> dict[str, nn.Module | None]:
        """Mirror children."""
        mirrored: dict[str, nn.Module | None] = {}
        for name, child in modules.items():
            if child is None:
                mirrored[name] = None
            elif not (self.bare and isinstance(child, Adapters)):
                mirrored[name] = self.of(child)
        return mirrored


def _take_off(module: nn.Module, copy: nn.Module) -> None:
    """Take everything of medpeft's off a copy.

    Raises:
        MedpeftError: a forward that somebody else put on the module cannot be bound to the copy.
    """
    own = copy.__dict__
    set_applied(copy, None)
    for name in _OF_WIRING:
        own.pop(name, None)
    if isinstance(own.get("train"), StaysInEval):
        del own["train"], own["reset_running_stats"]
    forward = own.pop("forward", None)
    wiring = wiring_of(module)
    if wiring is not None:
        forward = wiring.previous
    if forward is None:
        return
    bound = rebound(forward, module, copy)
    if bound is None or "_hf_hook" in own:
        raise MedpeftError(
            f"A {type(module).__name__} has a forward that was put on it (by accelerate, for one) and cannot "
            "be bound to another module: take it off before medpeft.Bank."
        )
    own["forward"] = bound
