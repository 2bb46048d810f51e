"""The strength at which methods act: none for a while, or part of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ..adapters.aside import fitting, others_in_place
from ..adapters.options import require_options
from ..adapters.record import Adapted, Applied, require_applied
from ..adapters.registry import find
from ..adapters.samples import changes_since_apply
from ..errors import MedpeftError, listed, require


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Make the model the base, bit for bit, for the duration of a `with` block.

    It waits for running forwards of other threads. Forwards that begin inside the block compute the base.

    Raises:
        MedpeftError: nothing was applied, the original values were given up with `keep_base=False`, other
            weights were loaded since, or the model is merged for the moment.

    Examples:
        >>> import medpeft, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.ones(1, 4)
        >>> base = model(x)
        >>> model = medpeft.apply(model, "lora", target="0", head="2", init="pissa", rank=2)
        >>> with medpeft.disabled(model):
        ...     torch.equal(model(x), base)
        True
    """

    def base(adapted: Adapted) -> dict[str, Tensor]:
        return base_values(adapted, "disabled")

    with others_in_place(model, "disabled", base, strength=0.0):
        yield model


@contextmanager
def scaled(model: nn.Module, strength: float) -> Iterator[nn.Module]:
    """Let the methods act at part of their strength for the duration of a `with` block.

    With s for the strength, every change becomes s times what it was:

    - an adapter on a weight: W + s·(W' − W); the bias too;
    - one on an output: y + s·(y' − y), where y' is what it makes of y; on an input in the same way;
    - selected parameters, the head and adapting BatchNorm statistics: base + s·(trained − base).

    So γ and β of SSF act as 1 + s·(γ − 1) and s·β, and LoRA's α as s·α. OFT rotates weights, and those
    between are no rotation. 0 is `disabled` and 1 the model as trained, bit for bit.

    Blocks may be nested, also in `disabled`: the innermost one decides. It waits for running forwards of
    other threads, which may be in a block at the same time at one strength.

    Args:
        model: A model after `apply`.
        strength: s, a finite number; below 0 and above 1 too, unless BatchNorm statistics adapt.

    Raises:
        MedpeftError: as `disabled`; or a method adds tokens, of which there is no part.

    Examples:
        >>> import medpeft, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = medpeft.apply(model, "ssf", head=None)
        >>> _ = torch.nn.init.constant_(model[2].adapters.ssf.shift, 1.0)
        >>> x = torch.ones(1, 4)
        >>> whole = model(x)
        >>> with medpeft.scaled(model, 0.25):
        ...     torch.allclose(model(x), whole - 0.75)
        True
    """
    require_options("", {"strength": strength}, {"strength": float})
    strength = float(strength)
    _require_parts(require_applied(model), strength)

    def base(adapted: Adapted) -> dict[str, Tensor]:
        return base_values(adapted, "scaled")

    with others_in_place(model, "scaled", base, strength=strength):
        yield model


def _require_parts(record: Applied, strength: float) -> None:
    """Raise `MedpeftError` where a change has no part of that strength."""
    if strength in (0, 1):
        return
    for name in record.methods:
        reason = find(name).unscalable
        require(not reason, f"{name!r} acts whole or not at all: {reason}. Use scaled(model, 0) or 1.")
    require(
        0 < strength < 1 or not record.statistics,
        f"scaled at strength {strength:g} could give BatchNorm variances below 0, since its statistics "
        "adapt: use a strength from 0 to 1.",
    )


def base_values(adapted: Adapted, action: str) -> dict[str, Tensor]:
    """Return the original values that `apply` kept, if they still belong to the base."""
    record = adapted.record
    if record.base is None:
        raise MedpeftError(
            f"{action} needs the original values, which {record.name!r} gave up: pass keep_base=True to "
            f"apply (the default of every method but 'full')."
        )
    present = fitting(adapted.trained, record.base)
    replaced = [name for name in record.base if name not in present]
    require(
        not replaced,
        f"{action} cannot give the base back: {listed(replaced, most=1)} is gone or of another shape, so its "
        f"original value has no place: was the head, or a layer, replaced after apply? Put the old one back; "
        f"or save what was trained, and load it into a model whose head was replaced first.",
    )
    if record.base:
        _require_same_base(adapted, action)
    return record.base


def _require_same_base(adapted: Adapted, action: str) -> None:
    """Raise `MedpeftError` if the base has changed so that the original values do not belong to it."""
    changes = changes_since_apply(adapted.model, adapted.record)
    require(
        not changes,
        f"{action} cannot give the base back: {listed(changes, most=1)} changed after apply (other weights "
        f"loaded, layers quantised or re-parameterised?), and the original values of "
        f"{listed(adapted.trained, most=1)} belong to what was before. Do that before apply; to keep what "
        f"was trained, save it first, and load it into the changed base.",
    )
