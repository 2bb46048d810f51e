"""A frozen linear layer and its low-rank change in one step, W·x + b + s·B·A·x.

As two steps they give autograd two gradients of the same input, which it has to add. In one step the second
is accumulated into the first. That saves writing one and reading both, some five per cent of a ViT's step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from ..architecture.rows import EvenRows, Rows
from .adapter import tensor_of
from .in_place import eager
from .kernels import (
    add_to_channels,
    any_needs_gradient,
    gradient_of_hidden,
    gradient_of_up,
    project_down,
)

_PLAIN = (Tensor, nn.Parameter)


def linear_with_low_rank(
    layer: nn.Module,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float,
    parts: tuple[Rows, ...] = (),
    even: EvenRows | None = None,
) -> Tensor | None:
    """Compute a linear layer of `x` and s·(x·Aᵀ)·Bᵀ added to it; None where that has to be two steps.

    Args:
        layer: The layer. It is two steps where its forward is not that of `nn.Linear`.
        x: Its input, (…, I).
        down: A, as in `kernels.add_low_rank`, like all that follows.
        up: B.
        scale: s.
        parts: Parts of a fused projection.
        even: The same parts, where they are evenly spaced.
    """
    if type(layer).forward is not nn.Linear.forward:
        return None
    weight, bias = tensor_of(layer, "weight"), tensor_of(layer, "bias")
    if weight.requires_grad:  # Its gradient is not computed here.
        return None
    if x.dtype != weight.dtype or down.dtype != weight.dtype or up.dtype != weight.dtype:
        return None
    if not (eager(x) and _is_plain(x) and _is_plain(weight)):
        return None
    if torch.is_grad_enabled() and (any_needs_gradient(x, down, up) or _trains(bias)):
        joined: Tensor = LowRankLinear.apply(x, weight, bias, down, up, scale, parts, even)[0]
        return joined
    return _joined(x, weight, bias, project_down(x, down), up, scale, parts, even)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is torch's own, and no subclass that computes in its own way.

    Fake tensors are allowed: they stand for plain ones.
    """
    return type(tensor) in _PLAIN or is_fake(tensor)


def _trains(bias: Tensor | None) -> bool:
    return bias is not None and bias.requires_grad


def _joined(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    up: Tensor,
    scale: float,
    parts: tuple[Rows, ...],
    even: EvenRows | None,
) -> Tensor:
    y = F.linear(x, weight, bias)
    if y._is_view():  # For an input of one vector `F.linear` returns a view, into which nobody may write.
        y = y.clone(memory_format=torch.contiguous_format)
    return add_to_channels(y, hidden, up, scale, parts, even)


class LowRankLinear(torch.autograd.Function):
    """`linear_with_low_rank` with gradients; keeps x if A trains, h = A·xᵀ if B trains, and no output.

    It returns h too, so that autograd knows that h depends on x and A. Kept without being an output, it would
    be a constant in second derivatives.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        parts: tuple[Rows, ...],
        even: EvenRows | None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the layer with its change, and h."""
        hidden = project_down(x, down)
        kept_x: Tensor | None = None
        kept_hidden: Tensor | None = None
        if down.requires_grad:
            kept_x = x
        if up.requires_grad:
            kept_hidden = hidden
        ctx.save_for_backward(kept_x, kept_hidden, weight, down, up)
        ctx.scale, ctx.parts, ctx.shape = scale, parts, x.shape
        return _joined(x, weight, bias, hidden, up, scale, parts, even), hidden

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_of_hidden: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, b, A and B.

        `grad_of_hidden` is zero in a first backward. It brings what second derivatives send through h.
        """
        x, hidden, weight, down, up = ctx.saved_tensors
        needs_x, _, needs_bias, needs_down, needs_up = ctx.needs_input_grad[:5]
        rows = grad.reshape(-1, grad.shape[-1])  # (…, O) → (N, O)
        grad_x = grad_bias = grad_down = grad_up = None
        if needs_bias:
            grad_bias = rows.sum(0)
        if needs_up:
            grad_up = _gradient_of_up_of_parts(rows, hidden, ctx.scale, ctx.parts)
        if needs_x or needs_down:
            grad_hidden = _gradient_of_hidden_of_parts(rows, up, ctx.scale, ctx.parts) + grad_of_hidden
        if needs_down:
            grad_down = torch.mm(grad_hidden, x.reshape(-1, x.shape[-1]))  # (r, N), (N, I) → (r, I)
        if needs_x:
            grad_x = torch.mm(rows, weight).addmm_(grad_hidden.t(), down)
            grad_x = grad_x.view(ctx.shape)  # (N, I) → (…, I)
        return grad_x, None, grad_bias, grad_down, grad_up, None, None, None


def _gradient_of_hidden_of_parts(rows: Tensor, up: Tensor, scale: float, parts: tuple[Rows, ...]) -> Tensor:
    """Gradient of the h of all parts, (parts·r, N), from that of the output, (N, O)."""
    if not parts:
        return gradient_of_hidden(rows, up, scale)
    gradients = []
    for part, up_of_part in zip(parts, up.split([part.size for part in parts]), strict=True):
        gradients.append(gradient_of_hidden(rows.narrow(1, part.start, part.size), up_of_part, scale))
    return torch.cat(gradients)


def _gradient_of_up_of_parts(rows: Tensor, hidden: Tensor, scale: float, parts: tuple[Rows, ...]) -> Tensor:
    """Gradient of the B of all parts, (channels of the parts, r), from that of the output, (N, O)."""
    if not parts:
        return gradient_of_up(rows, hidden, scale)
    gradients = []
    for part, hidden_of_part in zip(parts, hidden.chunk(len(parts)), strict=True):
        gradients.append(gradient_of_up(rows.narrow(1, part.start, part.size), hidden_of_part, scale))
    return torch.cat(gradients)
