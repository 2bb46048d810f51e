"""Kind of a layer, and its place in a model: decided here for all methods, by type and structure."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import is_parametrized

from .quantised import is_quantised, shape_alone

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

_MLP = re.compile(r"(Mlp|MLP|MLPBlock|FeedForward|FFN|Ffn|SwiGLU\w*|Intermediate)$")
_MLP_NAMES = ("mlp", "ff", "ffn", "linear1", "linear2", "feed_forward")
_RESIDUAL = re.compile(
    r"Bottle|Residual|DenseLayer|MBConv|MbConv|CNBlock|ConvNe[Xx]t\w*Layer|BasicLayer|DepthwiseSeparable"
    r"|Block(2D|2d|1D|3D|V2|v2)?$|BasicBlock"
)
NOT_BODY = re.compile(r"(stem|downsampl|shortcut|skip|patch_embed|embedder|upsampl|residual$|transition)")
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


def is_differentiable(tensor: Tensor) -> bool:
    """Whether a tensor holds floating-point or complex numbers: of all others torch makes no gradient."""
    return tensor.is_floating_point() or tensor.is_complex()


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


def is_computed(layer: nn.Module, name: str) -> bool:
    """Whether the layer has a tensor of that name that is no parameter or buffer of its own.

    It is computed for every forward, as by weight_norm, spectral_norm, pruning and parametrizations, or it is
    a plain attribute.
    """
    if isinstance(getattr(type(layer), name, None), property):
        return True
    return own_tensor(layer, name) is None and isinstance(layer.__dict__.get(name), Tensor)


def way_back(layer: nn.Module, name: str) -> str:
    """Say what makes a computed tensor a parameter again."""
    own = {*layer._parameters, *layer._buffers}
    if f"{name}_g" in own:
        return "call torch.nn.utils.remove_weight_norm first"
    if f"{name}_mask" in own:
        return "call torch.nn.utils.prune.remove first"
    if f"{name}_u" in own:
        return "call torch.nn.utils.remove_spectral_norm first"
    if nn.utils.parametrize.is_parametrized(layer, name):
        return "call torch.nn.utils.parametrize.remove_parametrizations first"
    return "register it as one"


def any_tensor(layer: nn.Module, name: str) -> Tensor | None:
    """Return the layer's tensor of that name, its own or a computed one; None where it has none.

    A parametrization is copied to compute it, since a spectral norm changes its buffers when it does. A
    quantised tensor is shown by its shape alone.
    """
    tensor = own_tensor(layer, name)
    if tensor is not None and is_quantised(layer, name):
        return shape_alone(layer, tensor)
    if tensor is not None or not is_computed(layer, name):
        return tensor
    if is_parametrized(layer, name):
        parametrizations: Any = layer.parametrizations
        computed: Tensor = copy.deepcopy(parametrizations[name])()
    else:
        computed = getattr(layer, name)
    return computed


def lies_transposed(layer: nn.Module) -> bool:
    """Whether the layer is linear and keeps its weight as (in, out): transformers' `Conv1D`, of GPTs."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def outputs_first(layer: nn.Module, weight: Tensor) -> Tensor:
    """View a layer's weight as (out, in, …), as methods see it."""
    if lies_transposed(layer):
        return weight.t()  # (in, out) → (out, in)
    return weight


def as_kept(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight (out, in, …) as the layer keeps it, and in its order in memory: it rounds as before."""
    if lies_transposed(layer):
        return weight.t().contiguous()  # (out, in) → (in, out)
    return weight


def made_by(parameter: str) -> str:
    """Name of the tensor that a parameter stands for, by its full name: `fc.bias` for one that was pruned.

    >>> made_by("fc.bias_orig"), made_by("fc.parametrizations.bias.original"), made_by("fc.bias")
    ('fc.bias', 'fc.bias', 'fc.bias')
    """
    parametrized = re.sub(r"(^|\.)parametrizations\.(\w+)\.original\d*$", r"\1\2", parameter)
    return parametrized.removesuffix("_orig")


def class_names(layer: nn.Module) -> list[str]:
    """Names of the layer's class and of its bases, the most derived first."""
    return [cls.__name__ for cls in type(layer).__mro__ if cls not in (nn.Module, object)]


def kind_of(layer: nn.Module) -> str:
    """Kind of the layer: "linear", "conv", "transposed", "norm", "embedding", or "" for any other module.

    >>> kind_of(nn.Conv2d(3, 8, 3))
    'conv'
    """
    if isinstance(layer, nn.Linear) or lies_transposed(layer):
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


def is_norm_of_buffers(layer: nn.Module) -> bool:
    """Whether a norm keeps its weight and bias as buffers, which never train, as `FrozenBatchNorm2d` does."""
    if not any("Norm" in name for name in class_names(layer)):
        return False
    return "weight" in layer._buffers and "bias" in layer._buffers


def is_activation(layer: nn.Module) -> bool:
    """Whether the layer is an activation, by the name of the module that defines its class."""
    return "activation" in type(layer).__module__ and not list(layer.children())


def is_layernorm(layer: nn.Module) -> bool:
    """Whether the layer is a LayerNorm; timm's and Hugging Face's channel-first ones count."""
    return is_norm(layer) and any("LayerNorm" in name for name in class_names(layer))


def erases_scale(layer: nn.Module) -> bool:
    """Whether the layer undoes a per-channel scale and shift of its input."""
    return isinstance(layer, (_BatchNorm, _InstanceNorm))


def is_scaling_norm(layer: nn.Module) -> bool:
    """Whether the norm ends in `weight * … + bias` with one element of each per channel."""
    if not is_norm(layer) or not all(_has_place(layer, name) for name in ("weight", "bias")):
        return False
    is_usual = isinstance(layer, (_NormBase, nn.GroupNorm, nn.LayerNorm))
    if not is_usual and not any(map(_SCALING_NORM.search, class_names(layer))):
        return False
    tensors = (own_tensor(layer, "weight"), own_tensor(layer, "bias"))
    return all(tensor is None or tensor.ndim == 1 for tensor in tensors)


def rounds_otherwise_with_weights(norm: nn.Module) -> bool:
    """Whether torch rounds the norm otherwise than it does now if it gets a weight of ones."""
    return type(norm) is nn.GroupNorm and norm.weight is None


def _has_place(layer: nn.Module, name: str) -> bool:
    """Whether the layer has a tensor of that name, or could have one that is None."""
    return name in layer._parameters or name in layer._buffers or is_computed(layer, name)


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
    if NOT_BODY.search(name):
        return False
    return any(is_residual_block(modules[parent]) for parent in parents(name))


def has_own_forward(layer: nn.Module) -> bool:
    """Whether a forward was put on the instance that may do anything; accelerate's keeps the layer's own."""
    return "forward" in layer.__dict__ and "_old_forward" not in layer.__dict__
