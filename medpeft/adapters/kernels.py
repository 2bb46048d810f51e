"""Kernels: an adapter writes into its layer's fresh output, and keeps for backward no more than it must.

Where it may not (`in_place.py`), the methods compute the plain expression, which gives the same numbers.

Each kernel is one function. Where something needs a gradient it calls a `torch.autograd.Function`, whose call
costs 5 to 10 µs; elsewhere, as in inference, it does the same without.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.function import once_differentiable

from ..architecture.rows import EvenRows, Rows
from ..errors import MedpeftError
from .adapter import along


def _any_needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd follows any of the tensors."""
    return any(tensor.requires_grad for tensor in tensors)


def _sum_but(grad: Tensor, axis: int) -> Tensor:
    """Sum over every axis but one."""
    others = list(range(grad.ndim))
    others.pop(axis)
    return grad.sum(others)


def add_low_rank(
    y: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float,
    parts: tuple[Rows, ...] = (),
    even: EvenRows | None = None,
) -> Tensor:
    """Add s·(x·Aᵀ)·Bᵀ to `y` in place.

    Args:
        y: A layer's fresh output, (…, O).
        x: Its input, (…, I).
        down: A, (r, I); of parts one after the other, (parts·r, I).
        up: B, (O, r); of parts one after the other, (channels of the parts, r).
        scale: s.
        parts: Parts of a fused projection, each with its own A and B; without any, all of `y` is added to.
        even: The same parts, where they are of one size at even distances: one product then does for all.
    """
    if torch.is_grad_enabled() and _any_needs_gradient(y, x, down, up):
        return _add_low_rank_with_gradients(y, x, down, up, scale, parts)
    hidden = F.linear(down, x.reshape(-1, x.shape[-1]))  # (parts·r, I), (N, I) → (parts·r, N)
    if even is not None:
        return _add_low_rank_to_even_parts(y, hidden, up, scale, even)
    channels = y.view(-1, y.shape[-1]).t()  # (…, O) → (O, N)
    if not parts:
        channels.addmm_(up, hidden, alpha=scale)
        return y
    sizes = [part.size for part in parts]
    for part, up_of_part, hidden_of_part in zip(
        parts, up.split(sizes), hidden.chunk(len(parts)), strict=True
    ):
        channels.narrow(0, part.start, part.size).addmm_(up_of_part, hidden_of_part, alpha=scale)
    return y


def _add_low_rank_to_even_parts(
    y: Tensor, hidden: Tensor, up: Tensor, scale: float, even: EvenRows
) -> Tensor:
    channels, tokens, rank = y.shape[-1], hidden.shape[1], up.shape[1]
    # (…, O) → (parts, size, N): the channels of every part, with the tokens along the last axis
    parts = y.as_strided(
        (even.parts, even.size, tokens), (even.distance, 1, channels), y.storage_offset() + even.start
    )
    ups = up.view(even.parts, even.size, rank)  # (parts·size, r) → (parts, size, r)
    parts.baddbmm_(ups, hidden.view(even.parts, rank, tokens), alpha=scale)  # (parts·r, N) → (parts, r, N)
    return y


def _add_low_rank_with_gradients(
    y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float, parts: tuple[Rows, ...]
) -> Tensor:
    if not parts:
        added: Tensor = AddLowRank.apply(y, x, down, up, scale, 0)
        return added
    sizes = [part.size for part in parts]
    for part, down_of_part, up_of_part in zip(parts, down.chunk(len(parts)), up.split(sizes), strict=True):
        y = AddLowRank.apply(y, x, down_of_part, up_of_part, scale, part.start)
    return y


class AddLowRank(torch.autograd.Function):
    """`add_low_rank` with gradients, for one part; keeps x and A·xᵀ.

    The product is made as (r, N): skinny matrix products over N run several times faster along their long
    side.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float, start: int) -> Tensor:
        """Add to the channels of `y` from `start` on, in place."""
        flat = x.reshape(-1, x.shape[-1])  # (…, I) → (N, I)
        hidden = F.linear(down, flat)  # (r, I), (N, I) → (r, N)
        channels = y.view(-1, y.shape[-1]).t().narrow(0, start, up.shape[0])  # (…, O) → (O, N) → (o, N)
        channels.addmm_(up, hidden, alpha=scale)
        kept: Tensor | None = None
        if down.requires_grad:
            kept = flat
        ctx.save_for_backward(kept, down, up, hidden)
        ctx.scale, ctx.start, ctx.shape = scale, start, x.shape
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of y, x, A and B."""
        flat, down, up, hidden = ctx.saved_tensors
        part = grad.reshape(-1, grad.shape[-1]).narrow(1, ctx.start, up.shape[0])  # (…, O) → (N, o)
        inner = torch.mm(up.t(), part.t()).mul_(ctx.scale)  # (r, N)
        grad_x = grad_down = grad_up = None
        if ctx.needs_input_grad[1]:
            grad_x = torch.mm(inner.t(), down).view(ctx.shape)  # (N, I) → (…, I)
        if ctx.needs_input_grad[2]:
            grad_down = inner @ flat
        if ctx.needs_input_grad[3]:
            grad_up = torch.mm(hidden, part).t().mul(ctx.scale)
        return grad, grad_x, grad_down, grad_up, None, None


def add_pointwise(y: Tensor, hidden: Tensor, up: Tensor, scale: float) -> Tensor:
    """Add s·(1×1 convolution of h by B) to `y` in place.

    Args:
        y: A convolution's fresh output, (N, O, …).
        hidden: h, (N, r, …).
        up: B, (O, r).
        scale: s.
    """
    if torch.is_grad_enabled() and _any_needs_gradient(y, hidden, up):
        added: Tensor = AddPointwise.apply(y, hidden, up, scale)
        return added
    _add_pointwise(y, hidden.flatten(2), up, scale)
    return y


def _add_pointwise(y: Tensor, flat: Tensor, up: Tensor, scale: float) -> None:
    """Add to `y`, for h as matrices `flat`, (N, r, P)."""
    channels = y.view(y.shape[0], y.shape[1], -1)  # (N, O, …) → (N, O, P)
    channels.baddbmm_(up.expand(flat.shape[0], *up.shape), flat, alpha=scale)


class AddPointwise(torch.autograd.Function):
    """`add_pointwise` with gradients; keeps h."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, hidden: Tensor, up: Tensor, scale: float) -> Tensor:
        """Add to `y` in place."""
        flat = hidden.flatten(2)  # (N, r, …) → (N, r, P)
        _add_pointwise(y, flat, up, scale)
        kept: Tensor | None = None
        if up.requires_grad:
            kept = flat
        ctx.save_for_backward(kept, up)
        ctx.scale, ctx.shape = scale, hidden.shape
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of y, h and B."""
        flat, up = ctx.saved_tensors
        part = grad.flatten(2)  # (N, O, …) → (N, O, P)
        grad_hidden = grad_up = None
        if ctx.needs_input_grad[1]:
            grad_hidden = torch.matmul(up.t() * ctx.scale, part).view(ctx.shape)  # (N, r, P) → (N, r, …)
        if ctx.needs_input_grad[2]:
            grad_up = torch.bmm(part, flat.transpose(1, 2)).sum(0).mul_(ctx.scale)
        return grad, grad_hidden, grad_up, None


def scale_shift(y: Tensor, scale: Tensor, shift: Tensor, axis: int) -> Tensor:
    """Make y·γ + β of `y` in place, per channel.

    Args:
        y: A layer's fresh output.
        scale: γ, (C,).
        shift: β, (C,).
        axis: Axis of the channels of `y`.
    """
    if torch.is_grad_enabled() and _any_needs_gradient(y, scale, shift):
        changed: Tensor = ScaleShift.apply(y, scale, shift, axis)
        return changed
    if axis != -1:
        scale, shift = along(scale, y, axis), along(shift, y, axis)
    return torch.addcmul(shift, y, scale, out=y)


class ScaleShift(torch.autograd.Function):
    """`scale_shift` with gradients; keeps z = y·γ + β alone, which the next layer often keeps anyway.

    Backward finds y again as (z − β)/γ.
    """

    smallest = 1e-2
    """Where some |γ| is below this, y is kept instead: dividing by γ would magnify rounding."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor, shift: Tensor, axis: int) -> Tensor:
        """Scale and shift `y` in place."""
        ctx.invertible = not scale.requires_grad or _is_above(scale, ScaleShift.smallest)
        kept = y
        if not ctx.invertible:
            kept = y.clone()
        torch.addcmul(along(shift, y, axis), y, along(scale, y, axis), out=y)
        ctx.mark_dirty(y)
        ctx.save_for_backward(kept, scale, shift)
        ctx.axis = axis
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of y, γ and β."""
        kept, scale, shift = _saved_by(ctx)
        rows, kept_rows = _by_channel(grad, ctx.axis), _by_channel(kept, ctx.axis)
        grad_shift = _sum_but(grad, ctx.axis)
        grad_scale = torch.linalg.vecdot(rows, kept_rows)
        if ctx.invertible:
            grad_scale = (grad_scale - shift * grad_shift) / scale
        return grad * along(scale, grad, ctx.axis), grad_scale, grad_shift, None


def _by_channel(y: Tensor, axis: int) -> Tensor:
    """View as a matrix with a row for each channel."""
    return y.movedim(axis, 0).flatten(1)  # (…, C, …) → (C, N)


def _is_above(scale: Tensor, smallest: float) -> bool:
    """Whether every |γ| is at least `smallest`; assumed of a γ without values (meta, or fake)."""
    return scale.is_meta or is_fake(scale) or bool(scale.detach().abs().min() >= smallest)


def _saved_by(ctx: Any) -> tuple[Tensor, Tensor, Tensor]:
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
            "The model changed the output of a layer that 'ssf' adapts in place, and its gradient needs it: "
            f"pass keep_outputs=True to 'ssf'. torch says: {error}"
        ) from error
    return kept, scale, shift


def sum_to_bias(y: Tensor, bias: Tensor, axis: int) -> Tensor:
    """Return `y` as it is, and hand its gradient on to the bias that it was computed with.

    Args:
        y: A layer's fresh output, computed with the bias cut off from autograd.
        bias: The bias, (C,). Its gradient is the sum of that of `y` over every axis but that of the channels.
        axis: Axis of the channels of `y`.
    """
    if torch.is_grad_enabled() and _any_needs_gradient(y, bias):
        passed: Tensor = SumToBias.apply(y, bias, axis)
        return passed
    return y


class SumToBias(torch.autograd.Function):
    """`sum_to_bias` with gradients; keeps nothing."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor, axis: int) -> Tensor:
        """Return `y` itself."""
        ctx.axis = axis
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of y and the bias."""
        return grad, _sum_but(grad, ctx.axis), None
