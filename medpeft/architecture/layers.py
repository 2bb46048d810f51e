"""What a layer is: convolution, norm, attention, MLP. Decided here, by type and structure, once for all methods."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

_MLP = re.compile(r"(Mlp|MLP|MLPBlock|FeedForward|FFN|Ffn|SwiGLU\w*|Intermediate)$")

_RESIDUAL = re.compile(
    r"Bottle|Residual|DenseLayer|MBConv|MbConv|CNBlock|ConvNe[Xx]t\w*Layer|BasicLayer|DepthwiseSeparable"
    r"|Block(2D|2d|1D|3D|V2|v2)?$|BasicBlock"
)

_NOT_BODY = re.compile(r"(stem|downsampl|shortcut|skip|patch_embed|embedder|upsampl|residual$|transition)")


def class_names(layer: nn.Module) -> list[str]:
    """The names of the layer's class and of its bases, most derived first."""
    return [cls.__name__ for cls in type(layer).__mro__ if cls not in (nn.Module, object)]


def is_conv(layer: nn.Module) -> bool:
    """Whether the layer is a convolution, transposed ones included."""
    return isinstance(layer, _ConvNd)


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer is a transposed convolution."""
    return isinstance(layer, _ConvTransposeNd)


def is_norm(layer: nn.Module) -> bool:
    """Whether the layer normalises: torch's norms, and any class called …Norm… that owns only vectors."""
    if isinstance(layer, NORMS):
        return True
    if not any("Norm" in name for name in class_names(layer)):
        return False
    own = list(layer.parameters(recurse=False))
    nested = sum(1 for _ in layer.parameters()) > len(own)
    return bool(own) and not nested and all(p.numel() == max(p.shape, default=1) for p in own)


def is_batchnorm(layer: nn.Module) -> bool:
    """Whether the layer normalises by statistics over the batch."""
    return isinstance(layer, _BatchNorm)


def is_layernorm(layer: nn.Module) -> bool:
    """Whether the layer is a LayerNorm, timm's and Hugging Face's channel-first ones included."""
    return is_norm(layer) and any("LayerNorm" in name for name in class_names(layer))


def erases_scale(layer: nn.Module) -> bool:
    """Whether the layer undoes a per-channel scale and shift of its input."""
    return isinstance(layer, (_BatchNorm, _InstanceNorm))


def is_scaling_norm(layer: nn.Module) -> bool:
    """Whether the norm ends in `weight * … + bias`, one of each per channel."""
    if not is_norm(layer) or not {"weight", "bias"} <= _own_tensors(layer):
        return False
    weight, bias = getattr(layer, "weight"), getattr(layer, "bias")  # noqa: B009 - typed as Any
    known = isinstance(layer, (_NormBase, nn.GroupNorm, nn.LayerNorm))
    known = known or any(re.search("(Layer|Batch|Group|Instance)Norm", name) for name in class_names(layer))
    return known and all(tensor is None or tensor.ndim == 1 for tensor in (weight, bias))


def _own_tensors(layer: nn.Module) -> set[str]:
    return {*layer._parameters, *layer._buffers}


def norm_channels(layer: nn.Module) -> int:
    """Number of channels of a norm, affine or not; 0 where its type does not say."""
    weight = {**layer._buffers, **layer._parameters}.get("weight")
    if isinstance(weight, Tensor):
        return weight.numel()
    if isinstance(layer, nn.LayerNorm):
        return layer.normalized_shape[-1] if len(layer.normalized_shape) == 1 else 0
    return int(getattr(layer, "num_features", getattr(layer, "num_channels", 0)))


def channel_axis(layer: nn.Module) -> int:
    """Axis of the layer's output that holds its channels, from its type, never from matching sizes."""
    if isinstance(layer, (_ConvNd, _NormBase, nn.GroupNorm)):
        return 1
    if hasattr(layer, "data_format"):  # Hugging Face's ConvNextLayerNorm is both
        return 1 if layer.data_format == "channels_first" else -1
    channels_first = re.compile(r"Norm(1d|2d|3d|Act|1)$|Norm(Act)?[23]d\w*$")
    return 1 if is_norm(layer) and channels_first.search(type(layer).__name__) else -1


def is_mlp(name: str, layer: nn.Module) -> bool:
    """Whether the module is the MLP of a transformer block, by its class or the last part of its name."""
    last = name.rsplit(".", 1)[-1]
    return bool(_MLP.search(type(layer).__name__)) or last in ("mlp", "ff", "ffn", "linear1", "linear2", "feed_forward")


def is_residual_block(layer: nn.Module) -> bool:
    """Whether the module is a block of a residual, dense or inverted-bottleneck network."""
    return bool(_RESIDUAL.search(type(layer).__name__))


def is_outside_body(name: str) -> bool:
    """Whether a layer of this name is a stem, a downsampling shortcut, or a patch embedding."""
    return bool(_NOT_BODY.search(name))


def in_body(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the layer of that name lies in a residual block, its shortcut left out; `modules` are the model's by name."""
    steps = name.split(".")
    around = (".".join(steps[:i]) for i in range(1, len(steps)))
    return not is_outside_body(name) and any(is_residual_block(modules[n]) for n in around)


def own_tensor(layer: nn.Module, name: str) -> Tensor | None:
    """The layer's parameter or buffer of that name, None where it has none.

    A replica of `nn.DataParallel` keeps its tensors as plain attributes.
    """
    tensor: Tensor | None = layer._parameters.get(name)
    if tensor is None:
        tensor = layer._buffers.get(name)
    if tensor is None and "_is_replica" in layer.__dict__:
        attribute = layer.__dict__.get(name)
        if isinstance(attribute, Tensor):
            return attribute
    return tensor


def kind_of(layer: nn.Module) -> str:
    """Kind of a layer: "linear", "conv", "transposed", "norm", "embedding", or "" for none of these."""
    if isinstance(layer, nn.Linear):
        return "linear"
    if is_conv(layer):
        return "transposed" if is_transposed(layer) else "conv"
    if isinstance(layer, nn.Embedding):
        return "embedding"
    return "norm" if is_norm(layer) else ""
