"""The kernel of SSF and (IA)³: y·γ + β written over y, which backward finds again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ..errors import MedpeftError
from .adapter import along
from .kernels import any_needs_gradient, sum_but

# y is found again where |β| is below so many times |y·γ|: some five of float32's seven digits are left then.
_LARGEST_SHIFT = 100.0
_PLACES = 8


_CHANGES = 16
"""Changes of γ after which an adapter asks again. To sample y costs as much as to scale a small layer."""


class Recovery:
    """Decides for one adapter whether backward finds y again from y·γ + β, or forward keeps it.

    It looks at γ, β and a sample of y whenever γ was changed `_CHANGES` times, which takes an optimizer about
    so many steps. A forward that is computed again in backward gets the same answer.
    """

    def __init__(self) -> None:
        self.version, self.is_possible = -_CHANGES, True

    def __call__(self, y: Tensor, scale: Tensor, shift: Tensor, axis: int, version: int) -> bool:
        """Decide; `version` is that of γ, as torch counts changes of a tensor."""
        if not 0 <= version - self.version < _CHANGES:
            self.is_possible = _can_be_found_again(y, scale, shift, axis)
            self.version = version
        return self.is_possible


def scale_shift(
    y: Tensor, scale: Tensor, shift: Tensor, axis: int, recovery: Recovery, version: int
) -> Tensor:
    """Make y·γ + β of `y`, per channel: in place unless y is needed in backward and would be lost.

    Args:
        y: A layer's fresh output.
        scale: γ, (C,).
        shift: β, (C,).
        axis: Axis of the channels of `y`.
        recovery: The adapter's own.
        version: Changes of the parameter γ so far.
    """
    scale_along, shift_along = along(scale, y, axis), along(shift, y, axis)
    if not torch.is_grad_enabled() or not any_needs_gradient(y, scale, shift):
        return torch.addcmul(shift_along, y, scale_along, out=y)
    if scale.requires_grad and not recovery(y, scale, shift, axis, version):
        return torch.addcmul(shift_along, y, scale_along)
    changed: Tensor = ScaleShift.apply(y, scale, shift, axis)
    return changed


def _can_be_found_again(y: Tensor, scale: Tensor, shift: Tensor, axis: int) -> bool:
    """Whether (z − β)/γ gives y for z = y·γ + β, and not the rounding of β: told by a sample of y.

    Assumed of tensors without values (meta, or fake).
    """
    if scale.is_meta or is_fake(scale):
        return True
    scale, shift = scale.detach(), shift.detach()
    squares = _mean_squares(y.detach(), axis)
    excess = torch.addcmul(shift.square(), scale.square(), squares, value=-(_LARGEST_SHIFT**2))
    least, most = torch.aminmax(excess)
    # γ = 0 has no excess below zero, γ = ∞ one of −∞, and of NaN every comparison is false.
    return bool(most < 0) and bool(least > -torch.inf)


def _mean_squares(y: Tensor, axis: int) -> Tensor:
    """Mean square of every channel, (C,), over some `_PLACES` places along each of the other axes."""
    if y.ndim == 1:
        return y.square()
    places = y.movedim(axis, -1)  # (…, C, …) → (…, C)
    steps = [slice(None, None, max(1, size // _PLACES)) for size in places.shape[:-1]]
    return places[tuple(steps)].square().mean(list(range(y.ndim - 1)))


class ScaleShift(torch.autograd.Function):
    """`scale_shift` with gradients; keeps z = y·γ + β alone, which the next layer often keeps anyway.

    Backward finds y again as (z − β)/γ.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor, shift: Tensor, axis: int) -> Tensor:
        """Scale and shift `y` in place."""
        torch.addcmul(along(shift, y, axis), y, along(scale, y, axis), out=y)
        ctx.mark_dirty(y)
        ctx.keeps_output = scale.requires_grad
        kept: Tensor | None = None
        if ctx.keeps_output:
            kept = y
        ctx.save_for_backward(kept, scale, shift)
        ctx.axis = axis
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of y, γ and β."""
        kept, scale, shift = _saved_by(ctx)
        grad_y = grad_scale = None
        grad_shift = sum_but(grad, ctx.axis)
        if ctx.needs_input_grad[0]:
            grad_y = grad * along(scale, grad, ctx.axis)
        if kept is not None:
            products = torch.linalg.vecdot(_by_channel(grad, ctx.axis), _by_channel(kept, ctx.axis))
            grad_scale = (products - shift * grad_shift) / scale
        return grad_y, grad_scale, grad_shift, None


def _by_channel(y: Tensor, axis: int) -> Tensor:
    """View as a matrix with a row for each channel, in one vector of a number each."""
    return y.movedim(axis, 0).unsqueeze(-1).flatten(1)  # (…, C, …) → (C, …, 1) → (C, N)


def _saved_by(ctx: Any) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return what `ScaleShift` kept.

    Raises:
        MedpeftError: the model has changed the output in place since.
    """
    try:
        kept, scale, shift = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise MedpeftError(
            "The model changed the output of a layer that 'ssf' or 'ia3' adapts in place, and its gradient "
            f"needs it: pass keep_outputs=True to 'ssf', or exclude the layer. torch says: {error}"
        ) from error
    return kept, scale, shift
