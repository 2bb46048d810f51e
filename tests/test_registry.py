"""Names, unions, options, and a user's own methods."""

import pytest
import torch
from torch import nn

import medpeft


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(medpeft.MedpeftError, match=r"Unknown method 'lra'. Did you mean 'lora'\? Available: full"):
        medpeft.apply(tiny(), "lra")


def test_an_unknown_option_names_the_nearest_and_lists_all():
    with pytest.raises(medpeft.MedpeftError, match=r"Unknown option 'rang'. Did you mean 'rank'\? .*'lora' takes parts, rank"):
        medpeft.apply(tiny(), "lora", rang=4)


def test_an_option_of_two_methods_must_be_given_to_each():
    with pytest.raises(medpeft.MedpeftError, match=r"'init' is an option of 'ssf' and 'lora': give each its own"):
        medpeft.apply(tiny(), "ssf+lora", init="official")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0 must be a whole number above 0"),
        ({"rank": 2.5}, r"rank=2\.5 must be a whole number above 0"),
        ({"init": "zeros"}, "init='zeros' is not known: choose one of 'kaiming', 'pissa', 'olora'"),
        ({"parts": "x"}, "parts='x' must be letters of 'qkvo'"),
        ({"dropout": 1.5}, r"dropout=1\.5 must be at least 0 and below 1"),
        ({"init": "pissa", "rank": 50}, "rank=50 is more than a weight of"),
    ],
)
def test_a_value_that_cannot_be_leaves_the_model_as_it_was(options, message):
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(medpeft.MedpeftError, match=message):
        medpeft.apply(model, "lora", head="2", target="linear", **options)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("nothing", [{}, 3, ["lora"], ""])
def test_a_request_that_names_no_method_says_how_to_name_one(nothing):
    with pytest.raises(medpeft.MedpeftError, match=r"names no method|Unknown method"):
        medpeft.apply(tiny(), nothing)


def test_a_users_own_adapter_and_predicate_join_in_a_union(own_registry):
    @medpeft.register("gain")
    class Gain(medpeft.Adapter):
        """One gain for a whole layer."""

        layers = (nn.Linear,)

        def __init__(self, site, *, start: float = 1.0):
            super().__init__(site)
            self.gain = nn.Parameter(torch.tensor(start))

        def forward(self, x, y):
            return y * self.gain

        def merged(self, weight, bias):
            return weight * self.gain, None if bias is None else bias * self.gain

    @medpeft.register("norm_biases")
    def norm_biases(name, parameter, layer):
        """Biases of norms."""
        return isinstance(layer.module, nn.LayerNorm) and name.endswith("bias")

    model, x = tiny().eval(), torch.randn(5, 4)
    plain = model(x).detach()
    medpeft.apply(model, "gain+norm_biases", head="2")
    assert medpeft.methods()["gain"] == "One gain for a whole layer."
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trains == ["0.adapters.gain.gain", "1.bias", "2.weight", "2.bias"]
    assert torch.equal(model(x), plain)
    with torch.no_grad():
        model[0].adapters["gain"].gain.fill_(3.0)
    adapted = model(x).detach()
    assert not torch.allclose(adapted, plain)
    medpeft.merge(model)
    torch.testing.assert_close(model(x).detach(), adapted)


def test_a_name_is_registered_once(own_registry):
    with pytest.raises(medpeft.MedpeftError, match="'lora' is registered already"):
        medpeft.register("lora")(lambda name, parameter, layer: True)
    with pytest.raises(medpeft.MedpeftError, match=r"'a\+b' cannot name a method"):
        medpeft.register("a+b")
    with pytest.raises(medpeft.MedpeftError, match=r"is no method: register a class derived from medpeft\.Adapter"):
        medpeft.register("linear")(nn.Linear)
