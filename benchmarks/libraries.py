"""A model adapted by each library that peers.py compares, and in wrappers that compute the plain expressions."""

import argparse
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from networks import build
from torch import Tensor, nn
from torch.nn.utils import parametrize

import medpeft

Builder = Callable[[argparse.Namespace], nn.Module]


def floor(name: str) -> Builder:
    """The frozen model, whose input asks for a gradient."""
    return lambda args: build(name).requires_grad_(False)


def with_medpeft(name: str, method: str, **options: Any) -> Builder:
    """The model adapted by medpeft."""
    return lambda args: medpeft.apply(base(name), method, head=None, **options)


def base(name: str) -> nn.Module:
    """A model by name; "hf_vit" is transformers' ViT in the size of ViT-S/16."""
    if name != "hf_vit":
        return build(name)
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536)
    return ViTModel(config, add_pooling_layer=False)


def with_peft(name: str, kind: str = "LoraConfig", **options: Any) -> Builder:
    """The model adapted by Hugging Face's peft."""

    def builder(args: argparse.Namespace) -> nn.Module:
        import peft

        return peft.get_peft_model(base(name), getattr(peft, kind)(**options))

    return builder


def with_lycoris(name: str, layers: tuple[type[nn.Module], ...]) -> Builder:
    """The model adapted by LyCORIS' LoCon."""

    def builder(args: argparse.Namespace) -> nn.Module:
        from lycoris import LycorisNetwork, create_lycoris

        logging.getLogger("LyCORIS").setLevel(logging.ERROR)
        model = base(name).requires_grad_(False)
        LycorisNetwork.apply_preset({"target_name": [n for n, m in model.named_modules() if isinstance(m, layers)]})
        network = create_lycoris(model, 1.0, linear_dim=8, linear_alpha=8, conv_dim=8, conv_alpha=8, algo="lora")
        network.apply_to()
        model.add_module("lycoris", network)
        return model

    return builder


def with_loralib(name: str, fused: bool = False) -> Builder:
    """The model with the layers of loralib, LoRA's original implementation; `fused` puts them on q and v alone."""

    def builder(args: argparse.Namespace) -> nn.Module:
        import loralib

        def layer(old: nn.Linear, path: str) -> nn.Module | None:
            shape, bias = (old.in_features, old.out_features), old.bias is not None
            if fused:
                is_qkv = path.endswith("qkv")
                options = {"r": 8, "lora_alpha": 8, "enable_lora": [True, False, True], "merge_weights": False}
                return loralib.MergedLinear(*shape, bias=bias, **options) if is_qkv else None
            return loralib.Linear(*shape, r=8, lora_alpha=8, merge_weights=False, bias=bias)

        model = replaced(base(name), nn.Linear, layer)
        loralib.mark_only_lora_as_trainable(model)
        return model

    return builder


def with_adapters(config: str) -> Builder:
    """transformers' ViT adapted by the library `adapters`."""

    def builder(args: argparse.Namespace) -> nn.Module:
        import adapters

        model = base("hf_vit")
        adapters.init(model)
        model.add_adapter("own", config=adapters.AdapterConfig.load(config, reduction_factor=6, non_linearity="gelu"))
        model.train_adapter("own")
        model.set_active_adapters("own")
        return model

    return builder


def plain(name: str, kind: type[nn.Module], wrapper: type[nn.Module]) -> Builder:
    """The model with each layer of a kind in a wrapper that computes the plain expression."""

    def builder(args: argparse.Namespace) -> nn.Module:
        model = base(name).requires_grad_(False)
        for path, layer in list(model.named_modules()):
            if isinstance(layer, kind):
                put(model, path, wrapper(layer))
        return model

    return builder


def replaced(model: nn.Module, kind: type[nn.Module], make: Callable[[Any, str], nn.Module | None]) -> nn.Module:
    """The model with its layers of a kind replaced by others that hold their values."""
    for path, layer in list(model.named_modules()):
        new = make(layer, path) if isinstance(layer, kind) else None
        if new is not None:
            new.load_state_dict(layer.state_dict(), strict=False)
            put(model, path, new)
    return model


def put(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a layer in the place of another."""
    parent, _, own = path.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)


class PlainLoRA(nn.Module):
    """y + (α/r)·B·A·x."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(layer.in_features, 8, bias=False), nn.Linear(8, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output and the low-rank change."""
        return self.layer(x) + self.up(self.down(x))


class PlainSSF(nn.Module):
    """y·γ + β on the last axis, or on the channels of a convolution."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.axis = 1 if isinstance(layer, nn.Conv2d) else -1
        self.scale, self.shift = (nn.Parameter(torch.full((len(layer.weight),), start)) for start in (1.0, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, scaled and shifted."""
        shape = (1, -1, 1, 1) if self.axis == 1 else (-1,)
        return self.layer(x) * self.scale.view(shape) + self.shift.view(shape)


class PlainTSA(nn.Module):
    """conv(x) + conv1x1(x)."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.alpha = nn.Conv2d(layer.in_channels, layer.out_channels, 1, layer.stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both convolutions."""
        return self.layer(x) + self.alpha(x)


class PlainSVDiff(nn.Module):
    """The layer with U·diag(relu(σ + δ))·Vᵀ built in every forward."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        left, values, right = torch.linalg.svd(layer.weight.detach().flatten(1), full_matrices=False)
        for key, tensor in (("left", left), ("values", values), ("right", right)):
            self.register_buffer(key, tensor)
        self.layer, self.delta = layer, nn.Parameter(torch.zeros_like(values))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with the shifted spectrum."""
        weight = ((self.left * (self.values + self.delta).relu()) @ self.right).view(self.layer.weight.shape)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        return self.layer._conv_forward(x, weight, self.layer.bias)


class LowRankSum(nn.Module):
    """W + B·A, as a parametrization of the weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(weight.shape[0], 8))
        self.down = nn.Parameter(torch.randn(8, weight.shape[1]) / math.sqrt(weight.shape[1]))

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight."""
        return weight + self.up @ self.down


def parametrized(name: str) -> Builder:
    """The model with a parametrized weight in every linear layer."""

    def builder(args: argparse.Namespace) -> nn.Module:
        model = base(name).requires_grad_(False)
        for layer in [m for m in model.modules() if isinstance(m, nn.Linear)]:
            parametrize.register_parametrization(layer, "weight", LowRankSum(layer.weight))
        return model

    return builder
