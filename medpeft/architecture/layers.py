"""Kind of a layer, and its place in a model: decided here for all methods, by type and structure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

_MLP = re.compile(r"(Mlp|MLP|MLPBlock|FeedForward|FFN|Ffn|SwiGLU\w*|Intermediate)$")
_MLP_NAMES = ("mlp", "ff", "ffn", "linear1", "linear2", "feed_forward")
_RESIDUAL = re.compile(
    r"Bottle|Residual|DenseLayer|MBConv|MbConv|CNBlock|ConvNe[Xx]t\w*Layer|BasicLayer|DepthwiseSeparable"
    r"|Block(2D|2d|1D|3D|V2|v2)?$|BasicBlock"
)
_NOT_BODY = re.compile(r"(stem|downsampl|shortcut|skip|patch_embed|embedder|upsampl|residual$|transition)")
_SCALING_NORM = re.compile(r"(Layer|Batch|Group|Instance)Norm")
_CHANNELS_FIRST_NORM = re.compile(r"Norm(1d|2d|3d|Act|1)$|Norm(Act)?[23]d\w*$")


def parents(name: str) -> list[str]:
    """Names of the modules around one, the nearest first; the model itself is left out.

    >>> parents("layer1.0.conv1")
    ['layer1.0', 'layer1']
    """
    around = []
    while "." in name:
        name = name.rpartition(".")[0]
        around.append(name)
    return around


def within(name: str, ancestors: Iterable[str]) -> bool:
    """Whether a module or tensor is one of `ancestors` or lies in one, by their names.

    >>> within("head.fc.weight", ["head"]), within("head_norm", ["head"])
    (True, False)
    """
    return any(name == ancestor or name.startswith(f"{ancestor}.") for ancestor in ancestors)


def child_at(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path below another one; None if there is none."""
    for step in path.split("."):
        child = module._modules.get(step)
        if child is None:
            return None
        module = child
    return module


def own_tensor(layer: nn.Module, name: str) -> Tensor | None:
    """Return the layer's parameter or buffer of that name, None where it has none.

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


def class_names(layer: nn.Module) -> list[str]:
    """Names of the layer's class and of its bases, the most derived first."""
    return [cls.__name__ for cls in type(layer).__mro__ if cls not in (nn.Module, object)]


def kind_of(layer: nn.Module) -> str:
    """Kind of the layer: "linear", "conv", "transposed", "norm", "embedding", or "" for any other module.

    >>> kind_of(nn.Conv2d(3, 8, 3))
    'conv'
    """
    if isinstance(layer, nn.Linear):
        return "linear"
    if isinstance(layer, _ConvTransposeNd):
        return "transposed"
    if is_conv(layer):
        return "conv"
    if isinstance(layer, nn.Embedding):
        return "embedding"
    if is_norm(layer):
        return "norm"
    return ""


def is_conv(layer: nn.Module) -> bool:
    """Whether the layer is a convolution; transposed ones count."""
    return isinstance(layer, _ConvNd)


def is_norm(layer: nn.Module) -> bool:
    """Whether the layer is one of torch's norms, or of a class called …Norm… that owns vectors alone."""
    if isinstance(layer, NORMS):
        return True
    if not any("Norm" in name for name in class_names(layer)):
        return False
    parameters = list(layer.parameters(recurse=False))
    has_nested_parameters = len(list(layer.parameters())) > len(parameters)
    return bool(parameters) and not has_nested_parameters and all(map(is_vector, parameters))


def is_vector(tensor: Tensor) -> bool:
    """Whether one axis holds all elements, as in a scale of shape (1, C, 1, 1)."""
    return tensor.numel() == max(tensor.shape, default=1)


def is_batchnorm(layer: nn.Module) -> bool:
    """Whether the layer normalises by statistics over the batch."""
    return isinstance(layer, _BatchNorm)


def is_layernorm(layer: nn.Module) -> bool:
    """Whether the layer is a LayerNorm; timm's and Hugging Face's channel-first ones count."""
    return is_norm(layer) and any("LayerNorm" in name for name in class_names(layer))


def erases_scale(layer: nn.Module) -> bool:
    """Whether the layer undoes a per-channel scale and shift of its input."""
    return isinstance(layer, (_BatchNorm, _InstanceNorm))


def is_scaling_norm(layer: nn.Module) -> bool:
    """Whether the norm ends in `weight * … + bias` with one element of each per channel."""
    has_both = {"weight", "bias"} <= {*layer._parameters, *layer._buffers}
    if not is_norm(layer) or not has_both:
        return False
    is_usual = isinstance(layer, (_NormBase, nn.GroupNorm, nn.LayerNorm))
    if not is_usual and not any(map(_SCALING_NORM.search, class_names(layer))):
        return False
    return all(tensor is None or tensor.ndim == 1 for tensor in (layer.weight, layer.bias))


def norm_channels(layer: nn.Module) -> int:
    """Number of channels of a norm, with or without weights; 0 if its type does not tell."""
    weight = own_tensor(layer, "weight")
    if weight is not None:
        return weight.numel()
    if isinstance(layer, nn.LayerNorm):
        return layer.normalized_shape[-1] if len(layer.normalized_shape) == 1 else 0
    return int(getattr(layer, "num_features", getattr(layer, "num_channels", 0)))


def channel_axis(layer: nn.Module) -> int:
    """Axis of the channels in the layer's output: told by the layer's type, never by matching sizes.

    That of a convolution counts from the end, since it also takes one image without a batch, (C, H, W).
    """
    if isinstance(layer, _ConvNd):
        return -1 - len(layer.kernel_size)
    if isinstance(layer, (_NormBase, nn.GroupNorm)):
        return 1
    if hasattr(layer, "data_format"):  # Hugging Face's ConvNextLayerNorm can be of either kind.
        return 1 if layer.data_format == "channels_first" else -1
    if is_norm(layer) and _CHANNELS_FIRST_NORM.search(type(layer).__name__):
        return 1
    return -1


def is_mlp(name: str, layer: nn.Module) -> bool:
    """Whether the module is the MLP of a transformer block, by its class or the last part of its name."""
    return bool(_MLP.search(type(layer).__name__)) or name.rpartition(".")[2] in _MLP_NAMES


def is_residual_block(layer: nn.Module) -> bool:
    """Whether the module is a block of a residual, dense or inverted-bottleneck network, by its class."""
    return bool(_RESIDUAL.search(type(layer).__name__))


def in_body(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a layer lies in a residual block, outside stems, shortcuts and embeddings.

    Args:
        name: Name of the layer.
        modules: All modules of the model by name.
    """
    if _NOT_BODY.search(name):
        return False
    return any(is_residual_block(modules[parent]) for parent in parents(name))
