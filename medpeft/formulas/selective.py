"""Selective methods: predicates over the parameters a model already has.

- Bias: Ben Zaken, Goldberg & Ravfogel, "BitFit" (2022), arXiv 2106.10199; Cai et al., "TinyTL" (2020),
  arXiv 2007.11622.
- Norms: Frankle, Schwab & Morcos, "Training BatchNorm and Only BatchNorm" (2021), arXiv 2003.00152; for
  LayerNorm, Basu et al., "Strong Baselines for Parameter Efficient Few-Shot Fine-tuning" (2024), arXiv
  2304.01917.
- Attention: Touvron et al., "Three things everyone should know about Vision Transformers" (2022), arXiv
  2203.09795.
- Unions, and the strategies for text-to-image: Dutt et al. (2024), arXiv 2305.08252.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from ..adapters.registry import register
from ..architecture.layers import is_batchnorm, is_layernorm, is_norm, is_vector
from ..architecture.network import Layer


@register("full")
def full(name: str, parameter: nn.Parameter, layer: Layer) -> bool:
    """Every parameter: full fine-tuning, the reference."""
    return True


@register("linear_probe")
def linear_probe(name: str, parameter: nn.Parameter, layer: Layer) -> bool:
    """Nothing but the head: linear probing, the cheapest baseline."""
    return False


@register("bn", hint="it trains BatchNorm layers. Try 'norm' or 'ssf'.")
def bn(name: str, parameter: nn.Parameter, layer: Layer) -> bool:
    """Weight and bias of every BatchNorm (BN tuning)."""
    return is_batchnorm(layer.module)


@register("ln", hint="it trains LayerNorm layers. Try 'norm' or 'ssf'.")
def ln(name: str, parameter: nn.Parameter, layer: Layer) -> bool:
    """Weight and bias of every LayerNorm."""
    return is_layernorm(layer.module)


@register("norm", hint="it trains normalisation layers that have parameters. Try 'bias' or 'lora'.")
def norm(name: str, parameter: nn.Parameter, layer: Layer) -> bool:
    """Parameters of every normalisation layer of any kind."""
    return is_norm(layer.module)


@register("attention", hint="it trains attention layers. Try 'ssf', 'lora' or 'norm'.")
def attention(
    name: str, parameter: nn.Parameter, layer: Layer, *, scope: Literal["layer", "block"] = "layer"
) -> bool:
    """Every attention layer as a whole; with scope="block" the block around it (diffusers' `attentions`)."""
    if scope == "layer":
        return layer.attention != ""
    return layer.attention_block != ""


@register("bias", hint="it trains biases. Try 'ssf' or 'lora'.")
def bias(name: str, parameter: nn.Parameter, layer: Layer, *, tables: bool = False) -> bool:
    """Every bias, norms' included; relative position tables too with tables=True (bias tuning)."""
    last = name.rpartition(".")[2]
    if last == "bias" or last.endswith("_bias") or last in ("bias_k", "bias_v"):
        return is_vector(parameter) or tables
    return tables and "bias" in last


@register("bitfit", hint="it trains biases. Try 'ssf' or 'lora'.")
def bitfit(name: str, parameter: nn.Parameter, layer: Layer, *, tables: bool = False) -> bool:
    """Every bias, norms' included: what transformers' literature calls BitFit."""
    return bias(name, parameter, layer, tables=tables)
