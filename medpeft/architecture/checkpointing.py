"""Activation checkpointing, switched on by the convention of each library."""

from __future__ import annotations

from typing import Any

from torch import nn


def switch_on_checkpointing(model: nn.Module) -> bool:
    """Let a model compute activations anew in backward; False if its library has no switch for that."""
    in_timm: Any = getattr(model, "set_grad_checkpointing", None)
    if getattr(model, "supports_gradient_checkpointing", False):  # transformers
        # The first is the name since version 5; reentrant checkpointing needs an input with a gradient.
        switch: Any = getattr(model, "activation_checkpointing_enable", None)
        if switch is None:
            switch = model.gradient_checkpointing_enable
        switch({"use_reentrant": False})
        return True
    if in_timm is None:
        return False
    try:
        in_timm(True)
    except (AssertionError, NotImplementedError):  # timm's answer for a model that has none
        return False
    return True
