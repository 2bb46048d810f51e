"""Kernels: an adapter writes into its layer's fresh output, and keeps for backward no more than it must.

Where it may not (`in_place.py`), the methods compute the plain expression, which gives the same numbers.

Each kernel is one function. Where something needs a gradient it calls a `torch.autograd.Function`, whose call
costs 5 to 10 µs; elsewhere, as in inference, it does the same without.

A backward is made of plain operations on what went into the function or came out of it, never on what was
made inside: so autograd follows it too, and second derivatives, as of a gradient penalty, are right.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..architecture.rows import EvenRows, Rows


def any_needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd follows any of the tensors."""
    return any(tensor.requires_grad for tensor in tensors)


def sum_but(grad: Tensor, axis: int) -> Tensor:
    """Sum over every axis but one: (…, C, …) → (C,)."""
    others = list(range(grad.ndim))
    others.pop(axis)
    if not others:
        return grad  # Of no axes, torch would sum over all.
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
        parts: Parts of a fused projection, of one group of channels each, with an A and a B of their own;
            without any, all of `y` is added to.
        even: The same parts, where they are of one size at even distances: one product then does for all.
    """
    hidden = project_down(x, down)
    if torch.is_grad_enabled() and any_needs_gradient(y, hidden, up):
        return _add_low_rank_with_gradients(y, hidden, up, scale, parts)
    return add_to_channels(y, hidden, up, scale, parts, even)


def project_down(x: Tensor, down: Tensor) -> Tensor:
    """Compute h = A·xᵀ, (r, N), of an input (…, I) of N vectors and A, (r, I).

    It is A·xᵀ and not x·Aᵀ: with the long side last, so narrow a product runs several times faster.
    """
    return F.linear(down, x.reshape(-1, x.shape[-1]))  # (r, I), (N, I) → (r, N)


def add_to_channels(
    y: Tensor, hidden: Tensor, up: Tensor, scale: float, parts: tuple[Rows, ...], even: EvenRows | None
) -> Tensor:
    """Add s·(B·h)ᵀ to `y` in place, where autograd does not follow; for the arguments see `add_low_rank`."""
    if even is not None:
        return _add_to_even_parts(y, hidden, up, scale, even)
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


def _add_to_even_parts(y: Tensor, hidden: Tensor, up: Tensor, scale: float, even: EvenRows) -> Tensor:
    channels, tokens, rank = y.shape[-1], hidden.shape[1], up.shape[1]
    # (…, O) → (parts, size, N): the channels of every part, with the tokens along the last axis
    channels_of_parts = y.as_strided(
        (even.number, even.size, tokens), (even.distance, 1, channels), y.storage_offset() + even.start
    )
    ups = up.view(even.number, even.size, rank)  # (parts·size, r) → (parts, size, r)
    hiddens = hidden.view(even.number, rank, tokens)  # (parts·r, N) → (parts, r, N)
    channels_of_parts.baddbmm_(ups, hiddens, alpha=scale)
    return y


def _add_low_rank_with_gradients(
    y: Tensor, hidden: Tensor, up: Tensor, scale: float, parts: tuple[Rows, ...]
) -> Tensor:
    if not parts:
        added: Tensor = AddLowRank.apply(y, hidden, up, scale, 0)
        return added
    sizes = [part.size for part in parts]
    for part, hidden_of_part, up_of_part in zip(
        parts, hidden.chunk(len(parts)), up.split(sizes), strict=True
    ):
        y = AddLowRank.apply(y, hidden_of_part, up_of_part, scale, part.start)
    return y


class AddLowRank(torch.autograd.Function):
    """The last step of `add_low_rank` with gradients, for one part; keeps h = A·xᵀ."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, hidden: Tensor, up: Tensor, scale: float, start: int) -> Tensor:
        """Add s·(B·h)ᵀ to the channels of `y` from `start` on, in place."""
        channels = y.view(-1, y.shape[-1]).t().narrow(0, start, up.shape[0])  # (…, O) → (O, N) → (o, N)
        channels.addmm_(up, hidden, alpha=scale)
        kept: Tensor | None = None
        if up.requires_grad:
            kept = hidden
        ctx.save_for_backward(kept, up)
        ctx.scale, ctx.start = scale, start
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of y, h and B."""
        hidden, up = ctx.saved_tensors
        part = grad.reshape(-1, grad.shape[-1]).narrow(1, ctx.start, up.shape[0])  # (…, O) → (N, o)
        grad_hidden = grad_up = None
        if ctx.needs_input_grad[1]:
            grad_hidden = gradient_of_hidden(part, up, ctx.scale)
        if ctx.needs_input_grad[2]:
            grad_up = gradient_of_up(part, hidden, ctx.scale)
        return grad, grad_hidden, grad_up, None, None


def gradient_of_hidden(grad: Tensor, up: Tensor, scale: float) -> Tensor:
    """Gradient of h, (r, N), from that of the channels that B makes of it, (N, o)."""
    return torch.mm(up.t(), grad.t()).mul_(scale)


def gradient_of_up(grad: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """Gradient of B, (o, r), from that of the channels that it makes, (N, o).

    A tensor of its own, where scaling in place would leave a view: what a parameter keeps should be none.
    """
    return torch.mm(hidden, grad).t().mul(scale)


def add_pointwise(y: Tensor, hidden: Tensor, up: Tensor, scale: float, axis: int) -> Tensor:
    """Add s·(1×1 convolution of h by B) to `y` in place.

    Args:
        y: A convolution's fresh output, (N, O, …), or (O, …) of one image.
        hidden: h, (N, r, …) or (r, …).
        up: B, (O, r).
        scale: s.
        axis: Axis of the channels, from the end.
    """
    if torch.is_grad_enabled() and any_needs_gradient(y, hidden, up):
        added: Tensor = AddPointwise.apply(y, hidden, up, scale, axis)
        return added
    _add_pointwise(y, _as_matrices(hidden, axis), up, scale)
    return y


def _as_matrices(hidden: Tensor, axis: int) -> Tensor:
    """View h as one matrix an image: (N, r, …) → (N, r, P), and (r, …) → (1, r, P)."""
    flat = hidden.flatten(axis + 1)  # The axes after that of the channels, which counts from the end.
    if flat.ndim == 2:
        return flat[None]
    return flat


def _add_pointwise(y: Tensor, flat: Tensor, up: Tensor, scale: float) -> None:
    """Add to `y`, for h as matrices `flat`, (N, r, P)."""
    channels = y.view(len(flat), len(up), flat.shape[2])  # (N, O, …) → (N, O, P)
    channels.baddbmm_(up.expand(flat.shape[0], *up.shape), flat, alpha=scale)


class AddPointwise(torch.autograd.Function):
    """`add_pointwise` with gradients; keeps h."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, hidden: Tensor, up: Tensor, scale: float, axis: int) -> Tensor:
        """Add to `y` in place."""
        _add_pointwise(y, _as_matrices(hidden, axis), up, scale)
        kept: Tensor | None = None
        if up.requires_grad:
            kept = hidden
        ctx.save_for_backward(kept, up)
        ctx.scale, ctx.axis, ctx.shape = scale, axis, hidden.shape
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of y, h and B."""
        hidden, up = ctx.saved_tensors
        part = _as_matrices(grad, ctx.axis)  # (N, O, …) → (N, O, P)
        grad_hidden = grad_up = None
        if ctx.needs_input_grad[1]:
            grad_hidden = torch.matmul(up.t() * ctx.scale, part).view(ctx.shape)  # (N, r, P) → (N, r, …)
        if ctx.needs_input_grad[2]:
            matrices = _as_matrices(hidden, ctx.axis)
            grad_up = torch.bmm(part, matrices.transpose(1, 2)).sum(0).mul_(ctx.scale)
        return grad, grad_hidden, grad_up, None, None


def sum_to_bias(y: Tensor, bias: Tensor, axis: int) -> Tensor:
    """Return `y` as it is, and hand its gradient on to the bias that it was computed with.

    Args:
        y: A layer's fresh output, computed with the bias cut off from autograd.
        bias: The bias, (C,). Its gradient is the sum of that of `y` over every axis but that of the channels.
        axis: Axis of the channels of `y`.
    """
    if torch.is_grad_enabled() and any_needs_gradient(y, bias):
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
        return grad, sum_but(grad, ctx.axis), None
