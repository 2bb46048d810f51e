"""A pretrained encoder of timm with a small fresh decoder: an output for every pixel."""

from collections.abc import Sequence
from typing import Any

import timm
from torch import Tensor, nn
from torch.nn.functional import interpolate

WIDTH = 32  # channels of the decoder
TAPS = 4  # blocks that are read of an encoder whose features are all of one size


def build(model_name: str, outputs: int, **options: Any) -> "Segmenter":
    """Build one around a model of timm, without weights.

    Args:
        model_name: as timm knows it.
        outputs: for every pixel.
        options: further keywords of `timm.create_model`.
    """
    return Segmenter(timm.create_model(model_name, **options), outputs)


def gives_features(encoder: nn.Module) -> bool:
    """Say whether a model gives its features on several scales, as timm's do."""
    return bool(getattr(encoder, "feature_info", None)) and hasattr(encoder, "forward_intermediates")


class Segmenter(nn.Module):
    """An encoder whose features on several scales a decoder joins.

    The decoder is the head: it begins at random and trains as a whole, whatever the method. What the features
    do not need of the encoder, such as its pooling, is taken off.

    Args:
        encoder: a model of timm.
        outputs: for every pixel.

    Raises:
        ValueError: the encoder does not give its features.
    """

    encoder: Any

    def __init__(self, encoder: nn.Module, outputs: int) -> None:
        super().__init__()
        if not gives_features(encoder):
            raise ValueError(f"{type(encoder).__name__} does not give its features on several scales.")
        features: Any = encoder.feature_info
        self.indices = taps([one["reduction"] for one in features])
        self.encoder = encoder
        self.pretrained_cfg: Any = getattr(encoder, "pretrained_cfg", {})
        chosen = [features[i] for i in self.indices]
        prune: Any = encoder.prune_intermediate_layers
        prune(self.indices, prune_norm=True)
        self.decoder = Decoder([one["num_chs"] for one in chosen], chosen[0]["reduction"], outputs)

    def get_classifier(self) -> nn.Module:
        """Give the head, as timm's models do."""
        return self.decoder

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the activations of the encoder's blocks again in the backward pass."""
        self.encoder.set_grad_checkpointing(enable)

    def forward(self, images: Tensor) -> Tensor:
        """Give (B, outputs, H, W) for images (B, 3, H, W)."""
        # medpeft looks for this call: tokens that are added must not be among the features.
        features = self.encoder.forward_intermediates(images, indices=self.indices, intermediates_only=True)
        logits: Tensor = interpolate(
            self.decoder(features), images.shape[2:], mode="bilinear", align_corners=False
        )
        return logits


class Decoder(nn.Module):
    """A feature pyramid (Lin et al. 2017): each scale is brought to one width, and the coarser ones added.

    Coarse features, such as those of a ViT, are refined while they are enlarged, until every other pixel has
    an output.

    Args:
        channels: of the features, the finest first.
        reduction: of the finest: how many pixels of the image lie in one of its own, along a side.
        outputs: for every pixel.
    """

    def __init__(self, channels: Sequence[int], reduction: int, outputs: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList([nn.Conv2d(count, WIDTH, 1) for count in channels])
        self.merges = nn.ModuleList([_refining() for _ in channels])
        self.enlarging = nn.ModuleList()
        while reduction > 2:
            self.enlarging.append(_refining())
            reduction //= 2
        self.output = nn.Conv2d(WIDTH, outputs, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Give (B, outputs, h, w) for features (B, C, h, w), the finest first."""
        joined: Tensor | None = None
        for place in reversed(range(len(features))):
            own = self.laterals[place](features[place])
            if joined is not None:
                own = own + _enlarged(joined, own.shape[2:])
            joined = self.merges[place](own)
        assert joined is not None
        for refine in self.enlarging:
            height, width = joined.shape[2:]
            joined = refine(_enlarged(joined, (2 * height, 2 * width)))
        logits: Tensor = self.output(joined)
        return logits


def taps(reductions: Sequence[int]) -> list[int]:
    """Choose the features to read: the last of each scale, of one scale four that are evenly spaced."""
    last = {reduction: place for place, reduction in enumerate(reductions)}
    if len(last) > 1:
        return sorted(last.values())
    count = len(reductions)
    return sorted({count * (i + 1) // TAPS - 1 for i in range(TAPS) if count * (i + 1) >= TAPS})


def _refining() -> nn.Module:
    return nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.GroupNorm(8, WIDTH), nn.ReLU())


def _enlarged(features: Tensor, size: Sequence[int]) -> Tensor:
    return interpolate(features, tuple(size), mode="bilinear", align_corners=False)
