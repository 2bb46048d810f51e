"""The trainer builds timm's models for its input, with weights that know photographs, and computes activations again."""

import numpy as np
import pytest
import torch
from small_training import messages
from trainer.errors import TrainerError
from trainer.networks.model import build_model, checkpoint_activations, input_statistics

import medpeft


def test_the_default_model_knows_photographs():
    from skimage import data, transform

    model = build_model("tf_efficientnet_lite0", 1000, 224)
    fresh = model.get_classifier()
    assert fresh.out_features == 1000
    assert input_statistics(model) == ([0.5] * 3, [0.5] * 3)
    # The fresh head knows nothing, so the features speak: two crops of a cat are closer than a rocket.
    views = [data.chelsea()[:, 60:360], data.chelsea()[:, 100:400], data.rocket()[:, 100:400]]
    pixels = [transform.resize(view, (160, 160)) * 2 - 1 for view in views]
    batch = torch.tensor(np.stack(pixels), dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        a, b, c = model.eval().forward_head(model.forward_features(batch), pre_logits=True)
    close, far = torch.cosine_similarity(a, b, dim=0), torch.cosine_similarity(a, c, dim=0)
    assert close > 0.7 > 0.4 > far


def test_a_model_of_fixed_size_is_built_for_the_input():
    model = build_model("test_vit", 3, 64, pretrained=False)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_an_unknown_model_is_answered_with_a_near_name(capsys):
    assert "timm has no model 'resnet5'. Did you mean resnet50" in messages(capsys, "--model", "resnet5")


def test_weights_that_cannot_be_fetched_are_answered_with_a_way_out(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host\nand much more")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(TrainerError, match=r"'resnet18' .* no route to host .*--no-pretrained"):
        build_model("resnet18", 2, 64)


def test_activations_computed_again_give_the_same_gradients():
    x = torch.randn(2, 3, 64, 64)
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        model = build_model("test_vit", 3, 64, pretrained=False)
        if again:
            checkpoint_activations(model)
        medpeft.apply(model, "lora", init="kaiming", seed=0)
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        model.train()(x).square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*found, strict=True))
    assert min(float(g.abs().max()) for g in found[0]) > 0


def test_a_model_that_cannot_compute_activations_again_says_so():
    with pytest.raises(
        TrainerError,
        match=r"Linear cannot compute its activations again\. Leave --checkpoint-activations out",
    ):
        checkpoint_activations(torch.nn.Linear(2, 2))


# MONAI


@pytest.mark.parametrize("name", ["DenseNet121", "resnet10"])
def test_a_network_of_monai_takes_volumes_and_images(name):
    for dimensions in (2, 3):
        model = build_model(f"monai:{name}", 4, 32, pretrained=False, dimensions=dimensions)
        shape = (2, 3, *([32] * dimensions))
        assert model.eval()(torch.zeros(shape)).shape == (2, 4)


def test_a_network_that_monai_does_not_have_is_answered_with_a_near_name():
    with pytest.raises(TrainerError, match=r"MONAI has no network 'DenseNet12'\. Did you mean DenseNet121"):
        build_model("monai:DenseNet12", 2, 32, pretrained=False)
    with pytest.raises(TrainerError, match="VNet cannot be built in 2-d"):
        build_model("monai:VNet", 2, 32, pretrained=False)
    with pytest.raises(TrainerError, match=r"no pretrained weights\. Add --no-pretrained"):
        build_model("monai:DenseNet121", 2, 32)


def test_volumes_need_a_network_that_takes_them():
    with pytest.raises(TrainerError, match="The data are volumes, and 'resnet18' takes images"):
        build_model("resnet18", 2, 32, pretrained=False, dimensions=3)
