"""FID and KID are those of their formulas, and name the network whose features they compare."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusion import scores
from diffusion.scores import find_extractor, score, warning
from scipy.linalg import sqrtm
from torch import nn
from trainer.errors import TrainerError


class Means(nn.Module):
    """Three features of an image: the means of its channels."""

    num_features = 3

    def forward(self, images):
        return images.float().mean((2, 3)) / 255


def cloud(count, seed, shift=0.0):
    values = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)) * 20 + 100 + shift
    return values.round().clamp(0, 255).to(torch.uint8).view(count, 3, 1, 1).expand(count, 3, 4, 4)


def test_fid_is_the_frechet_distance_of_the_features():
    real, generated = cloud(60, 0), cloud(50, 1, 40.0)
    found = score(real, generated, ("means", Means()))

    a, b = (Means()(images).double().numpy() for images in (real, generated))
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert found["fid"] == pytest.approx(expected, rel=1e-3)
    assert found["kid"] > 3 * found["kid_std"] > 0
    assert abs(score(real, cloud(50, 2), ("means", Means()))["kid"]) < found["kid"] / 20


def test_a_score_names_its_extractor_and_warns_of_few_images():
    found = score(cloud(10, 0), cloud(12, 1), ("means", Means()))

    assert (found["extractor"], found["real"], found["generated"]) == ("means", 10, 12)
    assert "10 images are too few for an FID" in found["warning"]
    assert "singular" not in found["warning"]
    assert "singular" in score(cloud(3, 0), cloud(3, 1), ("means", Means()))["warning"]
    assert warning(5000, 2048) == ""


def test_one_image_cannot_be_scored():
    with pytest.raises(TrainerError, match="1 real and 5 generated images cannot be compared"):
        score(cloud(1, 0), cloud(5, 1), ("means", Means()))


def test_scoring_waits_for_no_other_process(tmp_path, monkeypatch):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        monkeypatch.setattr("torchmetrics.Metric._sync_dist", lambda *_, **__: pytest.fail("waited"))
        assert np.isfinite(score(cloud(5, 0), cloud(5, 1), ("means", Means()))["fid"])
    finally:
        torch.distributed.destroy_process_group()


def test_without_inception_s_weights_the_extractor_is_declared(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    name, network = find_extractor()

    assert "EfficientNet-Lite0" in name
    assert "not Inception" in name
    images = cloud(3, 0)
    with torch.no_grad():
        features = network(images)
    assert features.shape == (3, network.num_features)
    assert torch.allclose(features[:1], network(images[:1]), atol=1e-4)


def test_weights_of_inception_that_do_not_load_are_refused_where_they_were_named(tmp_path):
    (tmp_path / "inception.pth").write_text("no weights")
    with pytest.raises(
        TrainerError, match=r"--inception_weights .* cannot be used: .* give its weights-inception"
    ):
        find_extractor(tmp_path / "inception.pth")


def test_inception_is_taken_where_its_weights_are_at_hand(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / scores.INCEPTION).write_text("")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    loaded = SimpleNamespace()
    monkeypatch.setattr("diffusion.scores.NoTrainInceptionV3", lambda *args: loaded)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_extractor() == ("Inception-v3, FID's weights, 2048 features", loaded)
    assert loaded.num_features == 2048
