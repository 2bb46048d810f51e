"""How far generated images lie from real ones: FID and KID, always with the name of the network whose features they compare.

Both were defined on the features of Inception-v3; numbers of another extractor compare with each other alone. Heusel et al.
(2017), arXiv 1706.08500; Bińkowski et al. (2018), arXiv 1801.01401.
"""

import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from trainer.errors import TrainerError
from trainer.models import DEFAULT, build_model, input_statistics

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity names it
ENOUGH = 2048  # Inception's features: with fewer images their covariance is singular


@dataclass
class Score:
    """FID and KID of generated images, with what they depend on.

    Attributes:
        extractor: the network and its features.
        fid: the Fréchet distance, from 0; biased upwards with few images.
        kid: the squared kernel distance, unbiased; near 0, below it too, for images of one kind.
        kid_std: its standard deviation over subsets.
        real: the number of real images.
        generated: the number of generated ones.
        features: of each image.
    """

    extractor: str
    fid: float
    kid: float
    kid_std: float
    real: int
    generated: int
    features: int

    def __str__(self) -> str:
        return (
            f"FID {self.fid:.2f}, KID {self.kid:.4f} ± {self.kid_std:.4f} ({self.extractor}; {self.real} real and "
            f"{self.generated} generated images)"
        )

    def as_dict(self) -> dict[str, Any]:
        """Give all as plain values."""
        return {**asdict(self), "warning": self.warning}

    @property
    def warning(self) -> str:
        """What is wrong with so few images; "" where there are enough."""
        fewest, needed = min(self.real, self.generated), max(ENOUGH, self.features)
        if fewest >= needed:
            return ""
        singular = (
            f" With fewer than its {self.features} features the covariance is singular."
            if fewest <= self.features
            else ""
        )
        return (
            f"{fewest} images are too few for an FID: it is biased upwards below {needed:,}, and compares only with others of "
            f"as many images.{singular} KID is unbiased."
        )


class Lite0(nn.Module):
    """The mean over space of EfficientNet-Lite0's last block, 320 features, of images resized to its 224 pixels."""

    num_features = 320
    name = "EfficientNet-Lite0, ImageNet, 320 features of its last block; not Inception"

    def __init__(self) -> None:
        super().__init__()
        self.model = build_model(DEFAULT, 1, 224).eval().requires_grad_(False)
        mean, std = input_statistics(self.model)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    mean: Tensor
    std: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, 320) of uint8 images (N, 3, H, W)."""
        model: Any = self.model
        parts = []
        for some in images.split(32):
            resized = F.interpolate(some.float() / 255, size=(224, 224), mode="bilinear", antialias=True)
            x = model.blocks(model.bn1(model.conv_stem((resized - self.mean) / self.std)))
            parts.append(x.mean((2, 3)))
        return torch.cat(parts)


def find_extractor(inception: Path | None = None) -> tuple[str, nn.Module]:
    """Give Inception-v3 with FID's weights where they are at hand, else EfficientNet-Lite0, with a name to print.

    Args:
        inception: the file of the weights; None looks where torch-fidelity and torch.hub keep it.

    Raises:
        TrainerError: a file was named and cannot be used.
    """
    path = inception or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    if inception is None and not path.is_file():
        return Lite0.name, Lite0()
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path))
    # torch-fidelity is no dependency; a file that is not its own raises many things.
    except Exception as error:
        if inception is None:
            return Lite0.name, Lite0()
        raise TrainerError(
            f"--inception-weights {path} cannot be used: {error} Install torch-fidelity and give its {INCEPTION}, or leave it "
            "out."
        ) from error
    network.num_features = 2048  # torchmetrics reads it
    return "Inception-v3, FID's weights, 2048 features", network


@torch.no_grad()
def score(real: Tensor, generated: Tensor, extractor: tuple[str, nn.Module], seed: int = 0) -> Score:
    """Compare generated with real images.

    Args:
        real: (N, 3, H, W), uint8.
        generated: (M, 3, H, W), uint8.
        extractor: as from `find_extractor`.
        seed: of KID's subsets.

    Raises:
        TrainerError: fewer than two images.
    """
    if min(len(real), len(generated)) < 2:
        raise TrainerError(
            f"{len(real)} real and {len(generated)} generated images cannot be compared. Give at least two each."
        )
    name, network = extractor
    found = _Features(network)
    # Half of the images, so that subsets differ.
    subset = max(2, min(100, len(real) // 2, len(generated) // 2))
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Metric `Kernel Inception Distance` will save all extracted features"
        )
        kid = KernelInceptionDistance(feature=found, subsets=50, subset_size=subset, sync_on_compute=False)
    # One process has all images; others, that train beside it, would be waited for.
    fid = FrechetInceptionDistance(feature=found, sync_on_compute=False)
    for images, is_real in ((real, True), (generated, False)):
        features = network(images)
        # The metrics extract features themselves: given as "images", these are passed through.
        fid.update(features, real=is_real)
        kid.update(features, real=is_real)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = kid.compute()
    distance = float(fid.compute())
    if not math.isfinite(distance):
        raise TrainerError(f"The FID became {distance}: are the {len(generated)} generated images finite?")
    return Score(name, distance, float(mean), float(std), len(real), len(generated), found.num_features)


class _Features(nn.Module):
    """Passes features through, so that both metrics share one pass of the network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.num_features = int(network.num_features)  # type: ignore[arg-type]  # a number on both networks

    def forward(self, features: Tensor) -> Tensor:
        """The features."""
        return features
