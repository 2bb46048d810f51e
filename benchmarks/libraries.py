"""A model adapted by each library that peers.py compares, and by wrappers that compute the plain expressions.

Every function returns a builder: it takes the size of the images, and imports its library when it is called.
"""

import logging
from collections.abc import Callable
from typing import Any

import expressions
from networks import build
from torch import nn
from torch.nn.utils import parametrize

import medpeft

Builder = Callable[[int], nn.Module]


def floor(name: str) -> Builder:
    """Freeze the model; its input asks for a gradient."""
    return lambda size: base(name, size).requires_grad_(False)


def with_medpeft(name: str, method: str, **options: Any) -> Builder:
    """Adapt the model by medpeft."""
    return lambda size: medpeft.apply(base(name, size), method, head=None, **options)


def base(name: str, size: int) -> nn.Module:
    """Build a model by name; "hf_vit" is transformers' ViT in the size of ViT-S/16."""
    if name != "hf_vit":
        return build(name, image_size=size)
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=size,
    )
    return ViTModel(config, add_pooling_layer=False)


def with_peft(name: str, kind: str = "LoraConfig", **options: Any) -> Builder:
    """Adapt the model by Hugging Face's peft."""

    def builder(size: int) -> nn.Module:
        import peft

        return peft.get_peft_model(base(name, size), getattr(peft, kind)(**options))

    return builder


def with_lycoris(name: str, layers: tuple[type[nn.Module], ...]) -> Builder:
    """Adapt the model by LyCORIS' LoCon."""

    def builder(size: int) -> nn.Module:
        from lycoris import LycorisNetwork, create_lycoris

        logging.getLogger("LyCORIS").setLevel(logging.ERROR)
        model = base(name, size).requires_grad_(False)
        names = [path for path, layer in model.named_modules() if isinstance(layer, layers)]
        LycorisNetwork.apply_preset({"target_name": names})
        ranks = {"linear_dim": 8, "linear_alpha": 8, "conv_dim": 8, "conv_alpha": 8}
        network = create_lycoris(model, 1.0, algo="lora", **ranks)
        network.apply_to()
        model.add_module("lycoris", network)
        return model

    return builder


def with_loralib(name: str) -> Builder:
    """Replace every linear layer by that of loralib, LoRA's original implementation."""

    def builder(size: int) -> nn.Module:
        import loralib

        model = base(name, size)
        for path, layer in _layers(model, nn.Linear):
            shape = (layer.in_features, layer.out_features)
            bias = layer.bias is not None
            _replace(model, path, loralib.Linear(*shape, r=8, lora_alpha=8, merge_weights=False, bias=bias))
        loralib.mark_only_lora_as_trainable(model)
        return model

    return builder


def with_loralib_on_q_and_v(name: str) -> Builder:
    """Replace every fused projection by that of loralib, with LoRA on q and v alone."""

    def builder(size: int) -> nn.Module:
        import loralib

        options = {"r": 8, "lora_alpha": 8, "enable_lora": [True, False, True], "merge_weights": False}
        model = base(name, size)
        for path, layer in _layers(model, nn.Linear):
            if path.endswith("qkv"):
                shape = (layer.in_features, layer.out_features)
                bias = layer.bias is not None
                _replace(model, path, loralib.MergedLinear(*shape, bias=bias, **options))
        loralib.mark_only_lora_as_trainable(model)
        return model

    return builder


def with_adapters(config: str) -> Builder:
    """Adapt transformers' ViT by the library `adapters`."""

    def builder(size: int) -> nn.Module:
        import adapters

        model = base("hf_vit", size)
        adapters.init(model)
        options = adapters.AdapterConfig.load(config, reduction_factor=6, non_linearity="gelu")
        model.add_adapter("adapter", config=options)
        model.train_adapter("adapter")
        model.set_active_adapters("adapter")
        return model

    return builder


def plain(name: str, kinds: tuple[type[nn.Module], ...], wrapper: type[nn.Module]) -> Builder:
    """Put each layer of some kinds in a wrapper that computes the plain expression."""

    def builder(size: int) -> nn.Module:
        model = base(name, size).requires_grad_(False)
        for path, layer in _layers(model, *kinds):
            _put(model, path, wrapper(layer))
        return model

    return builder


def parametrized(name: str) -> Builder:
    """Parametrize the weight of every linear layer."""

    def builder(size: int) -> nn.Module:
        model = base(name, size).requires_grad_(False)
        for _, layer in _layers(model, nn.Linear):
            parametrize.register_parametrization(layer, "weight", expressions.LowRankSum(layer.weight))
        return model

    return builder


def _layers(model: nn.Module, *kinds: type[nn.Module]) -> list[tuple[str, Any]]:
    """List the layers of some kinds by name, before any is replaced."""
    return [(path, layer) for path, layer in model.named_modules() if isinstance(layer, kinds)]


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a layer in the place of another, with the other's values."""
    layer.load_state_dict(model.get_submodule(path).state_dict(), strict=False)
    _put(model, path, layer)


def _put(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a layer in the place of another."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)
