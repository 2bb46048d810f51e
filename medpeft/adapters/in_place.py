"""May an adapter write into its layer's output?

A frozen layer does not need its own output again, so it may, unless

- the layer has a forward of its own, whose output somebody else may hold,
- the step that made the output needs it again in backward,
- `torch.compile` fuses steps by itself, or `torch.jit.trace` records them, which it cannot of our kernels,
- a transform of functorch, forward-mode differentiation or autocast changes what the steps do,
- it is in half precision, where the plain expression rounds otherwise than a kernel does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from ..architecture.layers import has_own_forward

# Looked up once: these are asked in every forward of every adapted layer.
_is_tracing = torch._C._is_tracing
_transforms = torch._C._functorch.peek_interpreter_stack
_autocasts_anywhere = torch._C._is_any_autocast_enabled

_FULL_PRECISION = (torch.float32, torch.float64)
_STOCK = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def writes_fresh_output(layer: nn.Module) -> bool:
    """Whether the layer's forward is torch's own: nobody else holds its output or needs it in backward."""
    if type(layer).forward not in _STOCK:
        return False
    return not has_own_forward(layer)


def in_place(y: Tensor) -> bool:
    """Whether a kernel may write into `y` at this moment: see above for all but the layer."""
    # A full backward hook on an adapter hands it views, which torch lets nobody write into.
    if not eager(y) or y._is_view():
        return False
    step = y.grad_fn
    return step is None or not _keeps_its_output(step)


def eager(x: Tensor) -> bool:
    """Whether operations on `x` run as written and in full precision.

    That is: nothing compiles, traces or transforms them, and autocast is off.
    """
    if is_compiling() or _is_tracing() or _transforms() is not None or x.dtype not in _FULL_PRECISION:
        return False
    if forward_ad._current_level >= 0:  # Within `forward_ad.dual_level`, for which the kernels have no rule.
        return False
    # To ask about one kind of device costs as much as a small operation.
    return not _autocasts_anywhere() or not torch.is_autocast_enabled(x.device.type)


def _keeps_its_output(step: Any) -> bool:
    """Whether a step needs its own output in backward, as SSF does where it comes before another adapter."""
    # torch's own steps, sigmoid for one, name it `result`.
    return hasattr(type(step), "_saved_result") or getattr(step, "keeps_output", False)
