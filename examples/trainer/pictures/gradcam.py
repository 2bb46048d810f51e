"""Where a network looked: Grad-CAM (Selvaraju et al. 2017) on its last feature map, found by running it.

Every layer whose output is laid out as the image is a candidate: maps (1, C, H, W), channels last as of Swin,
of volumes, and tokens (1, N, C) after a norm. The last one is taken through which more than one place reaches
the output: after a ViT's last attention that is the class token alone.
"""

import math

import torch
from torch import Tensor, nn

from medpeft.architecture.layers import is_norm

Candidate = tuple[nn.Module, Tensor]


def gradcam(network: nn.Module, image: Tensor, output: int) -> Tensor | None:
    """Give how much each place speaks for an output, from 0 to 1, on the grid of the last feature map.

    Args:
        network: on the CPU; in eval mode while it runs.
        image: (C, H, W) or (C, D, H, W), normalised, with equal sides.
        output: a position in the network's outputs (1, C).

    Returns:
        (h, w) or (d, h, w); None where the network has no such map, or nothing there speaks for the output.
    """
    seen: list[Candidate] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...], value: object) -> None:
        if isinstance(value, Tensor) and value.requires_grad and not isinstance(layer, nn.Identity):
            seen.append((layer, value))

    handles = [layer.register_forward_hook(keep) for layer in network.modules() if layer is not network]
    was_training = network.training
    try:
        with torch.enable_grad():
            network.eval()
            # Frozen layers pass gradients on if their input asks for them.
            batch = image[None].clone().requires_grad_(True)
            # Not by a call, which may be compiled.
            score = network.forward(batch)[0, output]
            return _last_map(seen, score, image.dim() - 1)
    finally:
        network.train(was_training)
        for handle in handles:
            handle.remove()


def _last_map(seen: list[Candidate], score: Tensor, dimensions: int) -> Tensor | None:
    for layer, value in reversed(seen):
        features = _on_a_grid(layer, value, dimensions)
        if features is None:
            continue
        (gradient,) = torch.autograd.grad(score, value, retain_graph=True, allow_unused=True)
        if gradient is None:
            continue
        slopes = _on_a_grid(layer, gradient, dimensions)
        # (C, …) → (places,)
        if slopes is None or int((slopes.flatten(1).abs().sum(0) > 0).sum()) < 2:
            continue
        return _weighed(features, slopes)
    return None


def _weighed(features: Tensor, slopes: Tensor) -> Tensor | None:
    """Weigh the channels (C, …) by their mean slope, and keep what speaks for the output."""
    axes = tuple(range(1, slopes.dim()))
    weights = slopes.mean(axes, keepdim=True)
    found = (weights * features).sum(0).relu().detach()
    if not torch.isfinite(found).all() or found.max() == 0:
        return None
    return found / found.max()


def _on_a_grid(layer: nn.Module, value: Tensor, dimensions: int) -> Tensor | None:
    """Lay an output as (C, h, w) or (C, d, h, w), None where it is not laid out as the image."""
    if value.dim() == 3 and len(value) == 1 and is_norm(layer):
        return _tokens_on_a_grid(value[0], dimensions)
    if value.dim() != dimensions + 2 or len(value) != 1:
        return None
    first, last = set(value.shape[2:]), set(value.shape[1:-1])
    if len(first) == 1 and max(first) > 1:
        return value[0]
    if len(last) == 1 and max(last) > 1:
        # (1, H, W, C) → (C, H, W)
        return value[0].movedim(-1, 0)
    return None


def _tokens_on_a_grid(tokens: Tensor, dimensions: int) -> Tensor | None:
    """Lay tokens (N, C) on the square or cube that they fill, without class and register tokens."""
    count, channels = tokens.shape
    side = math.floor(count ** (1 / dimensions) + 1e-6)
    extra = count - side**dimensions
    if side < 2 or extra > 8:
        return None
    # (N, C) → (C, side, …)
    return tokens[extra:].T.reshape(channels, *[side] * dimensions)
