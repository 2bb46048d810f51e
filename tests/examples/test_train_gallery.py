"""Grad-CAM is what its formula says, and the gallery has the most confident mistakes."""

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from trainer.data.batches import Preprocessing
from trainer.pictures.gradcam import gradcam
from trainer.results.gallery import draw_gallery, without_checkpointing
from trainer.tasks import Mistake, Outcome
from trainer.tasks.classify import Classify

import medpeft


def pooled(dimensions=2, act=None):
    """A convolution whose map is averaged and read by a linear layer: there Grad-CAM is CAM."""
    kind = {2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    pool = {2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[dimensions](1)
    torch.manual_seed(0)
    return nn.Sequential(kind(3, 5, 3, stride=2), act or nn.Tanh(), pool, nn.Flatten(), nn.Linear(5, 2))


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("act", [nn.Tanh(), nn.ReLU(inplace=True)])
def test_the_map_is_the_channels_weighed_by_their_weights_in_the_head(dimensions, act):
    network = pooled(dimensions, act)
    image = torch.randn(3, *[9] * dimensions)
    with torch.no_grad():
        features = network[:2](image[None])[0]
        weighed = torch.einsum("c,c...->...", network[-1].weight[1], features).relu()
    assert torch.allclose(gradcam(network, image, 1), weighed / weighed.max(), atol=1e-5)


def test_the_network_is_left_as_it_was():
    network = pooled()
    network.train()
    gradcam(network, torch.randn(3, 9, 9), 0)
    assert network.training
    assert not any(layer._forward_hooks for layer in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("test_vit", {}, (4, 4)),  # a class token, which alone reaches the output after the last attention
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2, "depths": (1, 1, 1, 1)}, (2, 2)),
        ("test_efficientnet", {}, (2, 2)),
    ],
)
def test_networks_of_every_layout_show_where_they_looked(name, options, shape):
    torch.manual_seed(0)
    network = medpeft.apply(timm.create_model(name, num_classes=3, **options), "bias")
    for parameter in network.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    image = torch.randn(3, 64, 64)
    found = [gradcam(network, image, output) for output in range(3)]
    there = [one for one in found if one is not None]
    assert there
    for one in there:
        assert tuple(one.shape) == shape
        assert one.min() >= 0
        assert one.max() == 1


def test_a_network_without_a_map_has_none_and_the_gallery_says_so(tmp_path, monkeypatch):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2))
    assert gradcam(network, torch.randn(3, 16, 16), 0) is None
    figures = drawn(network, [Mistake(0, "true: a\npredicted: b, 0.90", 1)], tmp_path, monkeypatch)
    assert "No feature map of this network" in figures[0].get_suptitle()


def drawn(network, mistakes, folder, monkeypatch, shape=(8, 8)):
    figures = []
    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (figures.append(self), original(self, path)))
    pixels = torch.randint(0, 256, (20, 1, *shape), dtype=torch.uint8)
    preprocessing = Preprocessing(shape, 16, [0.5] * 3, [0.5] * 3)
    names = [f"image {i}" for i in range(20)]
    draw_gallery(network, mistakes, pixels, names, preprocessing, folder / "gallery.png")
    return figures


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 8)])
def test_the_gallery_shows_the_first_twelve_with_their_words(tmp_path, monkeypatch, shape):
    mistakes = [Mistake(i, f"true: a\npredicted: b, 0.{90 - i}", 1) for i in range(14)]
    figures = drawn(pooled(len(shape)), mistakes, tmp_path, monkeypatch, shape)
    title = figures[0].get_suptitle()
    assert title.startswith("The 12 most confident of 14 mistakes.")
    assert f"on a grid of {' × '.join(['7'] * len(shape))} (Grad-CAM)" in title
    texts = [text.get_text() for axes in figures[0].axes for text in axes.texts]
    for i in range(12):
        assert f"image {i}\ntrue: a\npredicted: b, 0.{90 - i}" in texts
    assert ("slice" in " ".join(texts)) == (len(shape) == 3)
    assert np.asarray(Image.open(tmp_path / "gallery.png").convert("L")).std() > 15


def test_a_sharded_network_is_not_asked(tmp_path, monkeypatch):
    figures = drawn(None, [Mistake(3, "true: a", 0)], tmp_path, monkeypatch)
    assert len(figures[0].axes) == 2
    assert "No feature map" in figures[0].get_suptitle()


def test_activations_that_are_computed_again_are_kept_for_it():
    network = timm.create_model("test_vit", num_classes=2)
    network.set_grad_checkpointing(True)
    without_checkpointing(network)
    assert gradcam(network, torch.randn(3, 64, 64), 0) is not None
    without_checkpointing(nn.Linear(2, 2))


def test_mistakes_come_by_confidence():
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.3, 0.7]])
    outcome = Outcome(probabilities.log(), torch.tensor([0, 0, 0, 1]), {"temperature": 1.0})
    found = Classify(["cat", "dog"]).mistakes(outcome)
    assert [(one.row, one.output) for one in found] == [(1, 1), (2, 1)]
    assert found[0].words == "true: cat\npredicted: dog, 0.80"
