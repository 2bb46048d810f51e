"""In-place autograd functions: an adapter works on its layer's fresh output, and keeps for backward no more than it must.

A frozen layer does not need its own output again, so an adapter may write into it. Where that is not so
(under `torch.compile`, which fuses by itself, `torch.jit.trace`, which records no such functions, under
functorch's transforms, or on a layer with a forward of its own), `in_place` is False and the methods compute
the plain expression, which gives the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.function import once_differentiable

from ..errors import MedpeftError

_STOCK = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def writes_fresh_output(layer: nn.Module) -> bool:
    """Whether the layer's forward is torch's own, whose output nobody else holds and its backward does not need."""
    return type(layer).forward in _STOCK


def in_place(y: Tensor) -> bool:
    """Whether a kernel may write into `y`: in eager mode, and where the step that made `y` does not need it again."""
    return eager(y) and not _keeps_its_output(y.grad_fn)


def eager(x: Tensor) -> bool:
    """Whether what is done to `x` is done as it is written: not compiled, traced, transformed or cast by autocast."""
    if (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return False
    return x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)


def _keeps_its_output(step: Any) -> bool:
    """Whether an adapter before this one, as SSF in a union, needs its own output in backward."""
    # torch's own steps, sigmoid for one, name it `result`.
    return hasattr(type(step), "_saved_result") or getattr(step, "invertible", False)


class AddLowRank(torch.autograd.Function):
    """y += s·(x·Aᵀ)·Bᵀ for y (…, out), x (…, in), A (r, in), B (out, r); keeps x and the (r, N) product.

    The product is kept as (r, N): skinny matrix products over N run several times faster along their long
    side.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float, start: int) -> Tensor:
        """Add to the `len(up)` channels of `y` from `start` on."""
        flat, size = x.reshape(-1, x.shape[-1]), up.shape[0]
        hidden = down @ flat.t()
        y.view(-1, y.shape[-1]).narrow(1, start, size).addmm_(hidden.t(), up.t(), alpha=scale)
        ctx.save_for_backward(flat if down.requires_grad else None, down, up, hidden)
        ctx.scale, ctx.start, ctx.shape = scale, start, x.shape
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of y, x, A and B."""
        flat, down, up, hidden = ctx.saved_tensors
        part = grad.reshape(-1, grad.shape[-1]).narrow(1, ctx.start, up.shape[0])
        inner = torch.mm(up.t(), part.t()).mul_(ctx.scale)
        grad_x = torch.mm(inner.t(), down).view(ctx.shape) if ctx.needs_input_grad[1] else None
        grad_down = inner @ flat if ctx.needs_input_grad[2] else None
        grad_up = torch.mm(hidden, part).t().mul(ctx.scale) if ctx.needs_input_grad[3] else None
        return grad, grad_x, grad_down, grad_up, None, None


class AddPointwise(torch.autograd.Function):
    """y += s·(1×1 convolution of h by B) for y (N, O, …), h (N, r, …), B (O, r); keeps h."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, hidden: Tensor, up: Tensor, scale: float) -> Tensor:
        """Add to every channel of `y`."""
        flat = hidden.flatten(2)
        y.view(y.shape[0], y.shape[1], -1).baddbmm_(up.expand(len(flat), *up.shape), flat, alpha=scale)
        ctx.save_for_backward(flat if up.requires_grad else None, up)
        ctx.scale, ctx.shape = scale, hidden.shape
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of y, h and B."""
        flat, up = ctx.saved_tensors
        part = grad.flatten(2)
        grad_hidden = (
            torch.matmul(up.t() * ctx.scale, part).view(ctx.shape) if ctx.needs_input_grad[1] else None
        )
        grad_up = (
            torch.bmm(part, flat.transpose(1, 2)).sum(0).mul_(ctx.scale) if ctx.needs_input_grad[2] else None
        )
        return grad, grad_hidden, grad_up, None


class ScaleShift(torch.autograd.Function):
    """z = y·γ + β written into y; backward finds y again as (z − β)/γ, and keeps z alone, which often is kept anyway."""

    smallest = 1e-2
    """Where some |γ| is below this, y is kept instead: dividing by γ would magnify rounding."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor, shift: Tensor, axis: int) -> Tensor:
        """Scale and shift channel `axis` of `y`."""
        shape = [1] * y.ndim
        shape[axis] = -1
        ctx.invertible = not scale.requires_grad or _is_above(scale, ScaleShift.smallest)
        kept = None if ctx.invertible else y.clone()
        torch.addcmul(shift.view(shape), y, scale.view(shape), out=y)
        ctx.mark_dirty(y)
        ctx.save_for_backward(y if ctx.invertible else kept, scale, shift)
        ctx.axis, ctx.shape = axis, shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of y, γ and β."""
        kept, scale, shift = _intact(ctx)
        others = [i for i in range(grad.ndim) if i != ctx.axis % grad.ndim]
        grad_shift = grad.sum(others)
        grad_scale = torch.linalg.vecdot(
            grad.movedim(ctx.axis, 0).flatten(1), kept.movedim(ctx.axis, 0).flatten(1)
        )
        if ctx.invertible:
            grad_scale = (grad_scale - shift * grad_shift) / scale
        return grad * scale.view(ctx.shape), grad_scale, grad_shift, None


def _is_above(scale: Tensor, smallest: float) -> bool:
    """Whether every |γ| is at least `smallest`; assumed of one without values (meta, or fake while counting costs)."""
    return scale.is_meta or is_fake(scale) or bool(scale.detach().abs().min() >= smallest)


class SumToBias(torch.autograd.Function):
    """y as it is; backward gives the bias, (C,), the sum of y's gradient over all but `axis`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor, axis: int) -> Tensor:
        """`y` itself."""
        ctx.axis = axis
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of y and the bias."""
        return grad, grad.sum([i for i in range(grad.ndim) if i != ctx.axis % grad.ndim]), None


def _intact(ctx: Any) -> tuple[Tensor, Tensor, Tensor]:
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
