"""Strategies of hypothesis: a layer of any kind and size with an input, and the options of a method.

`MEDPEFT_EXAMPLES` in the environment is the number of examples a test draws, anew each time. Without it they are few and
always the same.
"""

import os
from functools import cache

import torch
from choices import values, variants
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from models import randomise
from tiny_places import (
    Attention,
    BasicBlock,
    ReadingAttention,
    SeparateAttention,
    TorchAttention,
    Transformer,
    apply_at,
    build,
)
from torch import nn

import medpeft
from medpeft.adapters.registry import find

EXAMPLES = os.environ.get("MEDPEFT_EXAMPLES")

thorough = settings(
    max_examples=int(EXAMPLES or 40),
    deadline=None,
    derandomize=EXAMPLES is None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCHNORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCENORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}

few = st.integers(1, 4)


def tensor(*shape):
    """A tensor of the standard normal distribution, the same for every shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@st.composite
def linears(draw):
    layer = nn.Linear(draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(st.booleans()))
    before = draw(st.sampled_from([(), (3,), (0,), (2, 3), (1, 1), (2, 1, 2)]))
    return layer, tensor(*before, layer.in_features)


@st.composite
def convolutions(draw):
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel, stride, dilation, padding, sizes = (
        [draw(st.integers(low, high)) for _ in range(dims)]
        for low, high in ((1, 3), (1, 3), (1, 2), (0, 2), (5, 6))
    )
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    layer = CONVS[dims](inputs, outputs, kernel, stride, padding, dilation, groups, draw(st.booleans()), mode)
    return layer, tensor(*draw(st.sampled_from([(2,), (1,), ()])), inputs, *sizes)


@st.composite
def transposed_convolutions(draw):
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel, stride, padding, sizes = (
        [draw(st.integers(low, high)) for _ in range(dims)] for low, high in ((2, 3), (1, 2), (0, 1), (3, 4))
    )
    layer = TRANSPOSED[dims](inputs, outputs, kernel, stride, padding, 0, groups, draw(st.booleans()))
    return layer, tensor(2, inputs, *sizes)


@st.composite
def embeddings(draw):
    count = draw(st.integers(1, 6))
    options = {
        "padding_idx": draw(st.sampled_from([None, 0])),
        "max_norm": draw(st.sampled_from([None, 1.0])),
    }
    layer = nn.Embedding(count, draw(st.integers(1, 6)), **options)
    shape = draw(st.sampled_from([(), (3,), (2, 2), (0,)]))
    return layer, torch.randint(count, shape, generator=torch.Generator().manual_seed(7))


@st.composite
def norms(draw):
    dims, channels = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    sizes, affine = [draw(st.integers(2, 3)) for _ in range(dims)], draw(st.booleans())
    kind = draw(st.sampled_from(["layer", "rms", "batch", "group", "instance"]))
    channels_first = tensor(2, channels, *sizes)
    if kind == "layer":
        return nn.LayerNorm(channels, elementwise_affine=affine), tensor(2, *sizes, channels)
    if kind == "rms":
        return nn.RMSNorm(channels, elementwise_affine=affine), tensor(2, *sizes, channels)
    if kind == "batch":
        return BATCHNORMS[dims](channels, affine=affine), channels_first
    if kind == "group":
        return nn.GroupNorm(draw(st.sampled_from([1, channels])), channels, affine=affine), channels_first
    tracked = draw(st.booleans())
    return INSTANCENORMS[dims](channels, affine=affine, track_running_stats=tracked), channels_first


@st.composite
def attentions(draw):
    heads = draw(st.integers(1, 3))
    width = heads * draw(st.integers(1, 3))
    kind = draw(st.sampled_from([Attention, ReadingAttention, SeparateAttention, TorchAttention]))
    options = {"bias": draw(st.booleans())}
    if kind is TorchAttention:
        options |= {"kdim": draw(st.integers(1, width)), "vdim": draw(st.integers(1, width))}
    return kind(width, heads, **options), tensor(draw(st.integers(1, 2)), draw(few), width)


@st.composite
def transformers(draw):
    heads = draw(st.integers(1, 2))
    width = heads * draw(st.integers(2, 4))
    layer = Transformer(
        draw(st.integers(1, 2)),
        width=width,
        heads=heads,
        hidden=draw(st.integers(1, 9)),
        attention=draw(st.sampled_from([Attention, ReadingAttention, SeparateAttention, TorchAttention])),
    )
    return layer, tensor(draw(st.integers(1, 2)), draw(st.sampled_from([1, 4, 9])), width)


@st.composite
def residual_blocks(draw):
    channels = draw(st.integers(1, 4))
    return BasicBlock(channels), tensor(2, channels, draw(few), draw(few))


# A place of `tiny_places` for each, by which it is known whether a method fits.
KINDS = {
    "linear": linears(),
    "conv 2-d": convolutions(),
    "conv 1×1": convolutions(),
    "transposed conv": transposed_convolutions(),
    "embedding": embeddings(),
    "LayerNorm": norms(),
    "fused qkv": attentions(),
    "transformer": transformers(),
    "residual block": residual_blocks(),
}

# Of several layers, so that rounding in one is amplified by the next.
NETWORKS = ("fused qkv", "transformer", "residual block")


@cache
def kinds_for(method):
    """The kinds that any variant of a method fits."""
    return [kind for kind in KINDS if any(_fits(kind, method, options) for options in variants(method))]


def _fits(kind, method, options):
    try:
        apply_at(kind, build(kind, torch.float32), method, **options)
    except medpeft.MedpeftError:
        return False
    return True


@st.composite
def cases(draw, method):
    """The name of a kind, a model in float64 with random weights, and its input."""
    kind = draw(st.sampled_from(kinds_for(method)))
    layer, x = draw(KINDS[kind])
    model = nn.Sequential(layer)
    # It says what the dtype of the model is where a norm has no weights.
    model.register_parameter("other", nn.Parameter(torch.ones(1)))
    model = randomise(model.double()).eval()
    # A softmax or a norm of large values is a step, at which every rounding shows.
    sizes = [1.0, 0.01] if kind in NETWORKS else [1.0, 1.0, 0.01, 20.0]
    _disturb(model, draw(st.sampled_from(sizes)), draw(st.sampled_from(["", "", "row", "all"])))
    return kind, model, x


@torch.no_grad()
def _disturb(model, size, zeros):
    """Scale every weight, and set rows of it to zero."""
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            parameter.mul_(size)
            if zeros == "row" and parameter.ndim > 1:
                parameter[0] = 0
            if zeros == "all" and parameter.ndim > 1:
                parameter.zero_()


@st.composite
def options_of(draw, method):
    """Options of a method: words and yeses as it names them, numbers in a small range."""
    return {option: draw(_values_of(method, option)) for option in find(method).options}


def _values_of(method, option):
    default = find(method).options[option]
    if option in ("dropout", "drop_path"):
        return st.sampled_from([0.0, 0.0, 0.0, 0.5])
    if option == "alpha":
        return st.none() | st.floats(0.1, 20)
    if option == "block_size":
        return st.integers(2, 6)
    words = st.sampled_from(values(method, option))
    if isinstance(default, (bool, str)) or default is None:
        return words
    if isinstance(default, int):
        return few
    return words | st.floats(0.1, 4)
