"""What flows around a place, or changes before it, is refused by name."""

import pytest
import torch
from models import example, make, randomise
from torch import nn

import medpeft


class Returned(nn.Module):
    def __init__(self, together):
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.second = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.together = together

    def forward(self, x, scale=None):
        first = self.first(x)
        second = self.second(first)
        if scale is not None:
            second = second * scale
        return self.together(self, x, first, second)


def test_hidden_states_that_are_returned_flow_around_unless_the_output_is_named():
    model = randomise(Returned(lambda net, x, first, second: (net.head(second), [first])))
    medpeft.apply(model, "linear_probe", head="head")
    x = torch.randn(3, 4)
    with pytest.raises(medpeft.MedpeftError, match="what 'first' makes flows around"):
        medpeft.prefix(model, x)
    split = medpeft.prefix(model, x, output=lambda y: y[0])
    assert torch.equal(split.rest(split.features(x)), model(x)[0])


@pytest.mark.parametrize(
    ("together", "reason"),
    [
        (lambda net, x, first, second: net.head(second) + first[:, :2], "what 'first' makes flows around"),
        (
            lambda net, x, first, second: net.head(second) * (x > 0).any(1, True),
            "the model's input flows around",
        ),
        (
            lambda net, x, first, second: net.head(second[:, :4]) + first.flip(0)[:, :2],
            "what 'first' makes flows around",
        ),
    ],
)
def test_what_flows_around_is_named(together, reason):
    model = medpeft.apply(randomise(Returned(together)), "linear_probe", head="head")
    with pytest.raises(medpeft.MedpeftError, match=reason):
        medpeft.prefix(model, torch.randn(3, 4))


def test_a_second_input_that_is_used_later_flows_around_and_one_used_before_does_not():
    model = randomise(Returned(lambda net, x, first, second: net.head(second)))
    medpeft.apply(model, "linear_probe", head="head")
    inputs = {"x": torch.randn(3, 4), "scale": torch.rand(3, 1)}
    split = medpeft.prefix(model, inputs)
    assert torch.equal(split.rest(split.features(inputs)), model(**inputs))


def test_a_u_net_s_decoder_is_refused():
    model = make("monai_unet2d", torch.float32)
    medpeft.apply(model, "ssf", head=None, target="model.1.submodule.2.*")
    with pytest.raises(medpeft.MedpeftError, match=r"UNet cannot go on from one place .* flows around it"):
        medpeft.prefix(model, example("monai_unet2d", torch.float32))


def test_stochastic_depth_and_dropout_before_the_place_are_refused():
    import timm

    options = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 16, "num_heads": 2, "num_classes": 3}
    for rates in ({"drop_path_rate": 0.2}, {"proj_drop_rate": 0.1}):
        model = timm.create_model("vit_tiny_patch16_224", **options, **rates)
        medpeft.apply(model, "lora", target="blocks.2.*")
        with pytest.raises(
            medpeft.MedpeftError, match=r"random numbers are drawn in train mode in 'blocks\.[01]\."
        ):
            medpeft.prefix(model, torch.randn(2, 3, 32, 32))


def test_adapting_statistics_before_the_place_are_refused():
    model = medpeft.apply(make("resnet", torch.float32), "lora", target="layer4.*", batchnorm="adapt")
    with pytest.raises(medpeft.MedpeftError, match=r"changes '.*running_mean'.*batchnorm='frozen'"):
        medpeft.prefix(model, example("resnet", torch.float32))


class OverTheBatch(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)


def test_features_that_depend_on_the_other_images_are_refused():
    model = randomise(nn.Sequential(nn.Linear(4, 8), OverTheBatch(), nn.Linear(8, 2)))
    medpeft.apply(model, "linear_probe", head="2")
    with pytest.raises(medpeft.MedpeftError, match="depend on the other images of its batch"):
        medpeft.prefix(model, torch.randn(3, 4))


class Mode(nn.Module):
    def forward(self, x):
        return 2 * x if self.training else x


def test_what_differs_between_the_modes_is_refused_and_named():
    model = randomise(nn.Sequential(nn.Linear(4, 8), Mode(), nn.Linear(8, 2)))
    medpeft.apply(model, "linear_probe", head="2")
    with pytest.raises(medpeft.MedpeftError, match="another in train than in eval mode, first in '1'"):
        medpeft.prefix(model, torch.randn(3, 4))


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = nn.Linear(4, 4)

    def forward(self, x):
        return self.rows(torch.eye(4, dtype=x.dtype)), x.shape[0]


class WithConstant(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions, self.first, self.last = Constant(), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        rows, images = self.positions(x)
        x = self.first(x).relu_()
        x = self.last(x) @ rows
        return self.head(x.reshape(images, -1))


def test_what_does_not_depend_on_the_image_is_computed_again():
    model = randomise(WithConstant())
    medpeft.apply(model, "lora", target="last", head="head")
    x = torch.randn(3, 4)
    split = medpeft.prefix(model, x)
    more = torch.randn(7, 4)
    assert torch.equal(split.rest(split.features(more)), model(more))


@pytest.mark.parametrize("earlier", ["lora", "bias"])
def test_a_method_that_was_applied_before_the_place_since(earlier, tmp_path):
    layers, x = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)], torch.randn(3, 4)
    model = medpeft.apply(randomise(nn.Sequential(*layers)), "lora", target="1", head="2")
    split = medpeft.prefix(model, x)
    features = split.features(x)
    split.store(tmp_path / "features", list(x), data="x", preprocessing="none")
    medpeft.remove(model)
    assert torch.equal(split.rest(features), model(x))
    medpeft.apply(model, earlier, target="[01]", head="2")
    for ask in (
        lambda: split.rest(features),
        lambda: split.features(x),
        lambda: split.open(tmp_path / "features", data="x", preprocessing="none"),
    ):
        with pytest.raises(medpeft.MedpeftError, match=r"'0.*' comes before the input of '1'"):
            ask()
    medpeft.remove(model)
    medpeft.apply(model, "ssf", target="1", head="2")
    assert torch.equal(split.rest(features), model(x))
