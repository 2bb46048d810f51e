"""Which trainable tensors act on the output, on real values, all of them at once.

Every trainable tensor is set to a random value near its own. One forward and one backward then give each tensor's gradient, and
a gradient that is not zero proves that the output depends on the tensor there. A gradient too small to tell from rounding is
looked at again in float64, and, if it is zero there too, with one possible cause after the other taken away.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..architecture.layers import erases_scale, is_norm
from ..errors import MedpeftError
from .connections import Silent
from .copies import cast_floats, mapped, own_twin, real_twin, run, seed

# Relative effects on the output below these are not told from rounding: in the model's own type, and in float64.
_ROUNDING = 1e3
_ZERO = 1e-11
# Weights all below this shrink what comes before them to next to nothing.
_SMALL = 1e-3

Modes = dict[str, list[str]]


def inert(model: nn.Module, example_input: Any, names: Iterable[str]) -> tuple[list[Silent], list[str]]:
    """Those of the trainable tensors that do not act in train or in eval mode, and names of the buffers that training changes.

    Raises:
        MedpeftError: the model does not run on the input, or returns nothing finite.
    """
    example = mapped(example_input, _varied)
    trial = Trial(real_twin(model), example)
    buffers = {name: buffer.clone() for name, buffer in trial.model.named_buffers()}
    effects = {"train": trial.effects("train")}
    changed = [name for name, buffer in trial.model.named_buffers() if not _same(buffer, buffers[name])]
    effects["eval"] = trial.effects("eval")
    smallest = _ROUNDING * trial.precision
    suspects = {mode: [n for n in names if not found[n] > smallest] for mode, found in effects.items()}
    if any(suspects.values()):
        # A single value may be meant: noise in place of a mask of ones shuts an attention. What acts on either input acts.
        given = Trial(real_twin(model), example_input)
        again = {mode: given.effects(mode) for mode in suspects if suspects[mode]}
        suspects = {mode: [n for n in found if not again[mode][n] > smallest] for mode, found in suspects.items()}
    silent = _explain(model, example, suspects) if any(suspects.values()) else []
    bypassed = trial.bypassed([n for n in names if n not in suspects["eval"]])
    reason = "without gradients (torch.no_grad) the model takes a path that does not use it"
    return [*silent, *(Silent(name, ("eval",), reason) for name in bypassed)], changed


def _varied(tensor: Tensor) -> Tensor:
    """Noise in place of an input of a single value, such as `torch.zeros(…)`, which could hide what acts."""
    constant = tensor.is_floating_point() and tensor.ndim > 1 and bool((tensor == tensor.flatten()[0]).all())
    if not constant:
        return tensor
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


class Trial:
    """A twin with random values in its trainable tensors, and an input to try it on."""

    def __init__(self, twin: nn.Module, example: Any, number: int = 0) -> None:
        self.model, self.example, self.number = twin, example, number
        self.parameters = {name: p for name, p in twin.named_parameters() if p.requires_grad}
        self.scales = {name: _scale(p) for name, p in self.parameters.items()}
        self.precision = 0.0
        self.drew = False
        self.move(self.parameters)

    @torch.no_grad()
    def move(self, names: Iterable[str]) -> None:
        """Add noise to these tensors."""
        generator = torch.Generator().manual_seed(self.number)
        for name in names:
            parameter = self.parameters[name]
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_(noise.to(parameter) * self.scales[name])

    def effects(self, mode: str) -> dict[str, float]:
        """How far noise in each tensor moves the output, relative to the output, to first order; 0 without a gradient."""
        outputs = self._forward(mode)
        for parameter in self.parameters.values():
            parameter.grad = None
        weighted = [_weighted(out) for out in outputs if out.requires_grad]
        if weighted:
            torch.stack([w.to("cpu", torch.float64) for w in weighted]).sum().backward()
        return {name: _norm(p.grad) * self.scales[name] for name, p in self.parameters.items()}

    def _forward(self, mode: str) -> list[Tensor]:
        self.model.train(mode == "train")
        seed(self.number)
        before = torch.get_rng_state()
        try:
            outputs = [out.abs() if out.is_complex() else out for out in run(self.model, self.example)]
        except MedpeftError:
            raise
        except Exception as error:
            raise MedpeftError(
                f"{type(self.model).__name__} does not run on example_input in {mode} mode: {type(error).__name__}: {error}"
            ) from error
        self.drew = self.drew or not torch.equal(before, torch.get_rng_state()) or torch.cuda.is_initialized()
        self.precision = max(torch.finfo(out.dtype).eps for out in outputs)
        return outputs

    @torch.no_grad()
    def bypassed(self, names: list[str]) -> list[str]:
        """Those of the tensors that act in eval mode with gradients, but not under `torch.no_grad()`."""
        with torch.enable_grad():
            outputs = self._forward("eval")
        without = self._forward("eval")
        # Equal outputs at random values of all tensors: the same function, so what acts in one acts in the other.
        if _distance(outputs, without) <= _ROUNDING * self.precision:
            return []
        noise = 10 * _distance(without, self._forward("eval"))
        return [name for name in names if self._distance_moved(name, without) <= noise]

    def _distance_moved(self, name: str, outputs: list[Tensor]) -> float:
        values = self.parameters[name].clone()
        self.number += 1
        self.move([name])
        self.number -= 1
        distance = _distance(outputs, self._forward("eval"))
        self.parameters[name].copy_(values)
        return distance


def _scale(parameter: Tensor) -> float:
    """Size of the noise: a tenth of the values, or where they are zero of those of a fresh layer."""
    rms = float(parameter.detach().double().square().mean().sqrt()) if parameter.numel() else 0.0
    fan_in = parameter[0].numel() if parameter.ndim > 1 and len(parameter) else 1
    return 0.1 * rms if rms > 0 else 0.1 / max(fan_in, 1) ** 0.5


def _weighted(output: Tensor) -> Tensor:
    """The output as one number, its elements randomly weighted: it moves by about ε if they move by ε of their norm."""
    finite = output.isfinite()
    if not bool(finite.any()):
        raise MedpeftError("Every element of an output is NaN or infinite: the tensors that act cannot be told on this input.")
    kept = torch.where(finite, output, torch.zeros_like(output))
    wide = kept.to(torch.promote_types(kept.dtype, torch.float32))
    weights = torch.randn(kept.shape, generator=torch.Generator().manual_seed(1)).to(wide)
    size = torch.linalg.vector_norm(wide.detach()).clamp(min=1e-30)
    return (weights * wide).sum().div(size)


def _norm(gradient: Tensor | None) -> float:
    return 0.0 if gradient is None else float(gradient.nan_to_num().double().norm())


def _distance(outputs: list[Tensor], others: list[Tensor]) -> float:
    """Largest difference relative to the largest element; infinite elements count as equal."""
    found = 0.0
    for a, b in zip(outputs, others, strict=True):
        if a.numel():
            before, after = a.double().nan_to_num(0, 0, 0), b.double().nan_to_num(0, 0, 0)
            found = max(found, float((before - after).abs().max() / before.abs().max().clamp(min=1e-30)))
    return found


def _explain(model: nn.Module, example: Any, suspects: Modes) -> list[Silent]:
    """Those of the suspects whose gradient is zero in float64 too, with the first cause that, taken away, lets them act."""
    gates = {name: float(p.detach().abs().max()) for name, p in model.named_parameters() if _is_gate(name, p)}
    zeros = [name for name, largest in gates.items() if largest == 0]
    # What acts behind a LayerScale of 1e-6 acts, but may be too small to tell.
    small = [name for name, largest in gates.items() if 0 < largest < _SMALL]
    left = _still(model, example, suspects, lambda twin: _open(twin, small))
    opened = _still(model, example, left, lambda twin: _open(twin, [*small, *zeros])) if zeros else left
    unnormalised = _still(model, example, opened, lambda twin: _pass_norms(twin, [*small, *zeros]))
    found = []
    for name in dict.fromkeys([*left["train"], *left["eval"]]):
        modes = tuple(mode for mode in left if name in left[mode])
        gated = any(name not in opened[mode] for mode in modes)
        normalised = any(name not in unnormalised[mode] for mode in modes)
        found.append(Silent(name, modes, _reason(model, name, zeros if gated else [], normalised)))
    return found


def _still(model: nn.Module, example: Any, suspects: Modes, change: Callable[[nn.Module], None]) -> Modes:
    """Those of the suspects that do not act in a twin in float64 after a change of it."""
    left = {mode: list(names) for mode, names in suspects.items()}
    if not any(left.values()):
        return left
    for number in range(1, 5):  # Stochastic depth may skip a branch; four times in a row is not chance.
        try:
            dtype, smallest = torch.float64, _ZERO
            trial = _trial(model, example, dtype, change, number)
            effects = {mode: trial.effects(mode) for mode in left if left[mode]}
        except MedpeftError:  # Some models name their type in their code.
            smallest = 0.0
            trial = _trial(model, example, None, change, number)
            effects = {mode: trial.effects(mode) for mode in left if left[mode]}
        for mode, found in effects.items():
            left[mode] = [name for name in left[mode] if not found[name] > smallest]
        if not trial.drew or not any(left.values()):
            break
    return left


def _trial(
    model: nn.Module, example: Any, dtype: torch.dtype | None, change: Callable[[nn.Module], None], number: int
) -> Trial:
    twin = own_twin(model, dtype)
    change(twin)
    return Trial(twin, cast_floats(example, dtype), number)


def _is_gate(name: str, parameter: nn.Parameter) -> bool:
    """Whether it is frozen and may shut what comes before it: a norm's weight, a LayerScale, a zero convolution."""
    return not parameter.requires_grad and "bias" not in name.rpartition(".")[2] and parameter.numel() > 0


@torch.no_grad()
def _open(twin: nn.Module, gates: list[str]) -> None:
    parameters = dict(twin.named_parameters())
    for name in gates:
        parameters[name].fill_(1.0)
        parameters[name].mul_(torch.rand(parameters[name].shape).to(parameters[name]) + 0.5)


def _pass_norms(twin: nn.Module, gates: list[str]) -> None:
    _open(twin, gates)
    for layer in twin.modules():
        if _normalises(layer):
            # What the layer would cancel gets past it, and its own weight and bias still act.
            layer.register_forward_hook(lambda module, args, output: output + args[0])


def _normalises(layer: nn.Module) -> bool:
    """Whether what is constant over space, or over space and batch, does not get past the layer."""
    return erases_scale(layer) or isinstance(layer, nn.GroupNorm)


def _reason(model: nn.Module, name: str, zeros: list[str], normalised: bool) -> str:
    if zeros:
        gate = _nearest(model, name, zeros)
        gate_is_norm = is_norm(model.get_submodule(gate.rpartition(".")[0]))
        what = "a zero-initialised norm" if gate_is_norm else "zero-initialised"
        return (
            f"{gate} is frozen and all zeros ({what}, as in a fresh model); load pretrained weights, or initialise "
            "the model without (timm: zero_init_last=False)"
        )
    if normalised:
        norms = [n for n, layer in model.named_modules() if _normalises(layer) and not name.startswith(f"{n}.")]
        norm = _nearest(model, name, norms)
        kind = type(model.get_submodule(norm)).__name__
        return f"{norm} ({kind}) behind it normalises it away; adapt the norm instead, or exclude this layer"
    return "its gradient is exactly zero, at random values too"


def _nearest(model: nn.Module, name: str, others: list[str]) -> str:
    """Which of the others, layers or tensors, lies behind `name` and shares most of its path; the first among equals."""
    order = {module: i for i, (module, _) in enumerate(model.named_modules())}
    layer = name.partition(".adapters.")[0] if ".adapters." in name else name.rpartition(".")[0]

    def nearness(other: str) -> tuple[bool, int]:
        owner = other if other in order else other.rpartition(".")[0]
        shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(layer.split("."), other.split("."), strict=False))
        behind = order[owner] > order[layer] or f"{layer}.".startswith(f"{owner}.")
        return behind, len(list(shared))

    return max(others, key=nearness)
