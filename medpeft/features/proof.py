"""The proof that a model's rest goes on from its features, on real values and on copies of the model.

- Features are the same bits in train mode, whatever random numbers are drawn. In eval mode they are the same
  but for rounding: torch's attention takes another kernel in inference.
- Computing them changes no buffer.
- Those of an image do not depend on the other images of the batch.
- The rest makes of them, in both modes, the same bits as the model does of the images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..checks.copies import call, copied, mapped, seed_everything, tensors_in, undisturbed
from ..errors import MedpeftError, listed, require
from .rest import Route, run_from, run_until
from .route import images_of

_ROUNDING = 50
"""Units of rounding, of the largest feature, by which the two modes may differ."""


def prove(model: nn.Module, route: Route, example: Any) -> None:
    """Prove a route on an example.

    Raises:
        MedpeftError: it does not hold; the message says what differs.
    """
    kind = type(model).__name__
    with undisturbed():
        copy = copied(model, share_frozen=True)
        copy.eval()
        in_eval = run_until(copy, route, example)
        require(
            bool(torch.isfinite(in_eval).all()),
            f"{route.place} of {kind} is not finite on the example, which then proves nothing.",
        )
        _require_same_rest(copy, route, example, in_eval, "eval")
        copy.train()
        in_train = _steady_features(copy, route, example)
        if not _is_close(in_train, in_eval):
            raise MedpeftError(
                f"What {kind} computes before {route.place} is another in train than in eval mode, first in "
                f"{_first_difference(copy, route, example)!r} (dropout, stochastic depth, statistics of the "
                f"batch?). Switch that off, at least before the first trainable tensor."
            )
        _require_independent_images(copy, route, example)
        _require_same_rest(copy, route, example, in_train, "train")


def _require_same_rest(model: nn.Module, route: Route, example: Any, features: Tensor, mode: str) -> None:
    """Require that the rest gives the bits of the whole model."""
    with torch.set_grad_enabled(mode == "train"):
        seed_everything(0)
        whole = call(model, example)
        whole = route.output(whole) if route.output else whole
        seed_everything(0)
        rest = run_from(model, route, features)
    same = all(map(same_bits, tensors_in(whole), tensors_in(rest)))
    require(
        same,
        f"{type(model).__name__} does not go on from {route.place}: on the example its rest gives other "
        f"values than the model does in {mode} mode. Train on images.",
    )


def _steady_features(model: nn.Module, route: Route, example: Any) -> Tensor:
    """Compute features in train mode; require the same for all random numbers, and that no buffer changes."""
    kind = type(model).__name__
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    features = []
    for seed in range(2):
        seed_everything(seed)
        features.append(run_until(model, route, example))
    changed = [name for name, buffer in model.named_buffers() if not same_bits(buffer, buffers[name])]
    require(
        not changed,
        f"Computing the features of {kind} changes {listed(changed)} in train mode: apply with "
        f"batchnorm='frozen', so that statistics before {route.place} stay as they are.",
    )
    require(
        same_bits(*features),
        f"What {kind} computes before {route.place} is not the same every time in train mode.",
    )
    return features[0]


def _is_close(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors differ by rounding alone."""
    largest = float((first.double() - second.double()).abs().max())
    return largest <= _ROUNDING * torch.finfo(first.dtype).eps * float(second.double().abs().max())


def _require_independent_images(model: nn.Module, route: Route, example: Any) -> None:
    """Require that an image has the same features beside any other image."""
    images = images_of(example)
    beside_itself = mapped(example, lambda tensor: _pair(tensor, images, lambda image: image))
    beside_another = mapped(example, lambda tensor: _pair(tensor, images, _another))
    first, second = run_until(model, route, beside_itself)[0], run_until(model, route, beside_another)[0]
    require(
        same_bits(first, second),
        f"The features of an image, {route.place}, depend on the other images of its batch in this "
        f"{type(model).__name__}, so that they cannot be computed once.",
    )


def _pair(tensor: Tensor, images: int, other: Callable[[Tensor], Tensor]) -> Tensor:
    """Put the first image of a batch beside another one made from it."""
    if tensor.ndim == 0 or len(tensor) != images:
        return tensor
    return torch.cat([tensor[:1], other(tensor[:1])])


def _another(image: Tensor) -> Tensor:
    return 0.5 - image if image.is_floating_point() else image.flip(-1)


def _first_difference(model: nn.Module, route: Route, example: Any) -> str:
    """Name of the first module whose output differs between the modes."""
    outputs: dict[bool, list[tuple[str, list[Tensor]]]] = {True: [], False: []}
    for name, module in model.named_modules():

        def note(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            outputs[model.training].append((name, [tensor.clone() for tensor in tensors_in(output)]))

        module.register_forward_hook(note)
    for mode in (True, False):
        model.train(mode)
        run_until(model, route, example)
    for (name, in_train), (_, in_eval) in zip(outputs[True], outputs[False], strict=False):
        if not all(map(same_bits, in_train, in_eval)):
            return name
    return "the model itself"


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same values: NaN equals NaN, and -0 equals 0."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    both_nan = (first != first) & (second != second)
    return bool(((first == second) | both_nan).all())
