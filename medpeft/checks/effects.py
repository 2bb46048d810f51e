"""Which trainable tensors have an effect on the output? Asked on real values, of all tensors at once.

Noise is added to every trainable tensor of a copy. One forward and one backward then give each tensor's
gradient, and a gradient that is not zero proves an effect. One too small to tell from rounding is tried again

- on the input as it is, if noise had taken the place of a constant one,
- in float64, where zero counts as without effect,
- in float64 without what may cancel the effect: frozen weights that are all zeros, then norms.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..architecture.layers import erases_scale, is_norm
from ..architecture.quantised import holds_integers
from ..errors import MedpeftError
from .connections import BYPASSED, Dataflow, WithoutEffect, layer_of
from .copies import cast_floats, copied, mapped, run, seed_everything, trainable

# Relative effects too small to tell from rounding: in units of the output's precision, and in float64.
_ROUNDING = 1e3
_ZERO = 1e-11
# Weights all below this shrink everything before them to next to nothing.
_SMALL = 1e-3
# Stochastic depth may skip a branch; four times in a row is not chance.
_TRIES = 4

NamesByMode = dict[str, list[str]]


def effects(model: nn.Module, example_input: Any, names: list[str]) -> tuple[list[WithoutEffect], list[str]]:
    """Find the trainable tensors without effect, and names of the buffers that training changes."""
    example = mapped(example_input, _outside_inference)
    varied = mapped(example, _varied)
    trial = Trial(copied(model, share_frozen=True), varied)
    buffers = list(map(torch.clone, trial.model.buffers()))
    suspects = {"train": trial.without_effect("train", names)}
    changed = []
    for (name, buffer), before in zip(trial.model.named_buffers(), buffers, strict=True):
        if not torch.equal(buffer.nan_to_num(), before.nan_to_num()):
            changed.append(name)
    suspects["eval"] = trial.without_effect("eval", names)
    if any(suspects.values()):
        # A constant input may be a mask of ones; noise in its place would block attention.
        suspects = Trial(copied(model, share_frozen=True), example).remaining_without_effect(suspects)
    without = _confirmed(model, varied, suspects) if any(suspects.values()) else []
    in_inference = trial.flowing_in_inference()
    for name in names:
        if name not in suspects["eval"] and name not in in_inference:
            without.append(WithoutEffect(name, ("eval",), BYPASSED))
    return without, changed


def _outside_inference(tensor: Tensor) -> Tensor:
    """Copy a tensor made under `torch.inference_mode`: autograd refuses it."""
    return tensor.clone() if tensor.is_inference() else tensor


def _varied(tensor: Tensor) -> Tensor:
    """Replace a constant input, such as `torch.zeros(…)`, by noise: it could hide an effect."""
    constant = tensor.is_floating_point() and tensor.ndim > 1 and bool((tensor == tensor.flatten()[0]).all())
    if not constant:
        return tensor
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor)


class Trial:
    """A copy of a model with noise in its trainable tensors, and an input to try it on.

    Attributes:
        smallest: Relative effect that proves one; None for what the output's precision allows.
        draws: Whether a forward has drawn random numbers.
    """

    def __init__(self, model: nn.Module, example: Any, smallest: float | None = None, seed: int = 0) -> None:
        self.model, self.example = model, example
        self.smallest, self.seed = smallest, seed
        self.precision, self.draws = 0.0, False
        self.parameters = trainable(model)
        self.scales: dict[str, float] = {}
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.parameters.items():
            scale = _noise_scale(parameter)
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.data.add_(noise.to(parameter), alpha=scale)
            self.scales[name] = scale

    def without_effect(self, mode: str, names: list[str]) -> list[str]:
        """List the tensors that have no effect in a mode, whatever random numbers the model draws."""
        for number in range(self.seed, self.seed + _TRIES):
            sizes = self._effects(mode, number)
            smallest = self.smallest
            if smallest is None:
                smallest = _ROUNDING * self.precision
            # Not `<=`: NaN proves nothing.
            names = [name for name in names if not sizes[name] > smallest]
            if not names or not self.draws:
                break
        return names

    def remaining_without_effect(self, suspects: NamesByMode) -> NamesByMode:
        """List the suspects of each mode that have no effect in this trial either."""
        remaining = dict(suspects)
        for mode, names in suspects.items():
            if names:
                remaining[mode] = self.without_effect(mode, names)
        return remaining

    @torch.no_grad()
    def flowing_in_inference(self) -> set[str]:
        """Names of the tensors whose values flow into the output in eval mode, without gradients."""
        flow = Dataflow(self.parameters)
        with flow:
            return flow.sources_of(self._forward("eval", self.seed))

    def _effects(self, mode: str, number: int) -> dict[str, float]:
        """First-order relative change of the output under noise in each tensor; 0 without a gradient."""
        self.model.zero_grad()
        projections = [_projection(out) for out in self._forward(mode, number) if out.requires_grad]
        if projections:
            torch.stack(projections).sum().backward()
        sizes = dict.fromkeys(self.parameters, 0.0)
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                slope = parameter.grad.nan_to_num().double().norm()
                sizes[name] = float(slope) * self.scales[name]
        return sizes

    def _forward(self, mode: str, number: int) -> list[Tensor]:
        self.model.train(mode == "train")
        seed_everything(number)
        before = torch.get_rng_state()
        try:
            outputs = run(self.model, self.example)
        except MedpeftError:
            raise
        except Exception as error:
            kind, reason = type(self.model).__name__, f"{type(error).__name__}: {error}"
            raise MedpeftError(f"{kind} does not run on example_input in {mode} mode: {reason}") from error
        # Draws from a GPU's generator do not change the CPU's, so with CUDA they are assumed.
        if torch.cuda.is_initialized() or not torch.equal(before, torch.get_rng_state()):
            self.draws = True
        self.precision = max(torch.finfo(output.dtype).eps for output in outputs)
        return outputs


def _noise_scale(parameter: Tensor) -> float:
    """Size of the noise: a tenth of the values, or where they are zero of those of a fresh layer."""
    if not parameter.numel():
        return 0.0
    rms = math.sqrt(parameter.detach().double().square().mean())
    if rms > 0:
        return 0.1 * rms
    fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
    return 0.1 / math.sqrt(fan_in)


def _projection(output: Tensor) -> Tensor:
    """Project an output to one number at random, divided by the output's norm."""
    if output.is_complex():
        output = output.abs()
    finite = output.isfinite()
    if not bool(finite.any()):
        hint = "the tensors that act cannot be told on this input"
        raise MedpeftError(f"Every element of an output is NaN or infinite: {hint}.")
    kept = torch.where(finite, output, torch.zeros_like(output))
    wide = kept.to(torch.promote_types(kept.dtype, torch.float32))
    weights = torch.randn(kept.shape, generator=torch.Generator().manual_seed(1)).to(wide)
    size: Tensor = torch.linalg.vector_norm(wide.detach()).clamp(min=1e-30)
    return ((weights * wide).sum() / size).to("cpu", torch.float64)


def _confirmed(model: nn.Module, example: Any, suspects: NamesByMode) -> list[WithoutEffect]:
    """Try the suspects in float64 or, if the model names its type in its code, in that."""
    try:
        copy, inputs = copied(model, dtype=torch.float64), cast_floats(example, torch.float64)
        return _explained(Trial(copy, inputs, smallest=_ZERO, seed=_TRIES), suspects)
    except MedpeftError:
        return _explained(Trial(copied(model), example, smallest=0.0, seed=_TRIES), suspects)


def _explained(trial: Trial, suspects: NamesByMode) -> list[WithoutEffect]:
    """Confirm suspects, then take one possible cause after the other away and see which let them act."""
    small, zeros = _shut_gates(trial.model)
    # Behind a LayerScale of 1e-6 an effect may be too small to measure.
    _open(trial.model, small)
    confirmed = trial.remaining_without_effect(suspects)
    _open(trial.model, zeros)
    behind_open = confirmed
    if zeros:
        behind_open = trial.remaining_without_effect(confirmed)
    _bypass_norms(trial.model)
    behind_norms = trial.remaining_without_effect(behind_open)
    without = []
    for name in dict.fromkeys([*confirmed["train"], *confirmed["eval"]]):
        modes = _modes(name, confirmed)
        if _modes(name, behind_open) != modes:
            reason = _zero_reason(trial.model, name, zeros)
        elif _modes(name, behind_norms) != modes:
            reason = _norm_reason(trial.model, name)
        else:
            reason = "its gradient is exactly zero, at random values too"
        without.append(WithoutEffect(name, modes, reason))
    return without


def _modes(name: str, names: NamesByMode) -> tuple[str, ...]:
    return tuple(mode for mode in names if name in names[mode])


def _shut_gates(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the frozen weights, as of a norm or a LayerScale, that are all small, or all zeros."""
    small, zeros = [], []
    for name, parameter in model.named_parameters():
        is_bias = "bias" in name.rpartition(".")[2]
        if parameter.requires_grad or is_bias or not parameter.numel() or holds_integers(parameter):
            continue
        largest = float(parameter.detach().abs().max())
        if largest == 0:
            zeros.append(name)
        elif largest < _SMALL:
            small.append(name)
    return small, zeros


@torch.no_grad()
def _open(model: nn.Module, gates: list[str]) -> None:
    for name in gates:
        model.get_parameter(name).uniform_(0.5, 1.5)


def _bypass_norms(model: nn.Module) -> None:
    for layer in model.modules():
        if _cancels_constants(layer):
            # With the input added to the output, a change that the norm cancels still shows.
            layer.register_forward_hook(lambda module, args, output: output + args[0])


def _cancels_constants(layer: nn.Module) -> bool:
    """Whether the layer cancels an input that is constant over space, or over space and batch."""
    return erases_scale(layer) or isinstance(layer, nn.GroupNorm)


def _zero_reason(model: nn.Module, name: str, zeros: list[str]) -> str:
    gate = _nearest(model, name, zeros)
    cause = "zero-initialised"
    if is_norm(model.get_submodule(gate.rpartition(".")[0])):
        cause = "a zero-initialised norm"
    hint = "load pretrained weights, or initialise the model without (timm: zero_init_last=False)"
    return f"{gate} is frozen and all zeros ({cause}, as in a fresh model); {hint}"


def _norm_reason(model: nn.Module, name: str) -> str:
    norms = []
    for norm, layer in model.named_modules():
        if _cancels_constants(layer) and not name.startswith(f"{norm}."):
            norms.append(norm)
    norm = _nearest(model, name, norms)
    kind = type(model.get_submodule(norm)).__name__
    return f"{norm} ({kind}) behind it normalises it away; adapt the norm instead, or exclude this layer"


def _nearest(model: nn.Module, name: str, others: list[str]) -> str:
    """Choose the first of the layers or tensors behind a tensor that share most of its path."""
    order = list(dict(model.named_modules()))
    layer = layer_of(name)

    def nearness(other: str) -> tuple[bool, int]:
        owner = other
        if other not in order:
            owner = other.rpartition(".")[0]
        is_behind = order.index(owner) > order.index(layer) or f"{layer}.".startswith(f"{owner}.")
        return is_behind, _shared_depth(layer, other)

    return max(others, key=nearness)


def _shared_depth(path: str, other: str) -> int:
    depth = 0
    for step, other_step in zip(path.split("."), other.split("."), strict=False):
        if step != other_step:
            break
        depth += 1
    return depth
