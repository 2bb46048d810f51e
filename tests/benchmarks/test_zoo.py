"""The zoo in small: every method on one architecture of each of many kinds."""

import pytest
import timm
import torch
from timm.models import mobilevit
from torch import nn
from zoo import kind_of
from zoo_models import timm_models
from zoo_verdicts import verdicts

import medpeft

SHALLOW = {"depth": 2}
# Kinds beside the families of `models.py`, on which every method's promises are tested. Each has as few blocks
# and stages as are still of the whole architecture's kind (`kind_of`).
SAMPLE = {
    "test_byobnet": {},
    "test_efficientnet_gn": {},
    "test_mambaout": {"depths": (1, 1), "dims": (16, 32)},
    "test_nfnet": {"depths": (1, 1), "channels": (32, 64)},
    "beit_base_patch16_224": SHALLOW,
    "cait_xxs24_224": {"depth": 2, "depth_token_only": 1},
    "efficientvit_m0": {
        "depth": (1, 1),
        "embed_dim": (64, 128),
        "key_dim": (16, 16),
        "num_heads": (4, 4),
        "window_size": (7, 7),
        "down_ops": (("", 1), ("subsample", 2)),
    },
    "levit_128s": {"depth": (1, 1), "embed_dim": (128, 256), "num_heads": (4, 6)},
    "mixer_s32_224": {},
    "mobilevitv2_050": {"blocks": mobilevit.model_cfgs["mobilevitv2_050"].blocks[:3]},
    "pvt_v2_b0": {
        "depths": (1, 1),
        "embed_dims": (32, 64),
        "num_heads": (1, 2),
        "sr_ratios": (2, 1),
        "mlp_ratios": (8, 8),
    },
    "swinv2_tiny_window8_256": {"depths": (2, 1), "num_heads": (3, 6)},
    "tnt_s_patch16_224": SHALLOW,
    "vgg11_bn": {},
    "xcit_nano_12_p16_224": {"depth": 1, "cls_attn_layers": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("arch", SAMPLE)
def test_every_method_works_or_is_refused_with_a_reason(arch):
    with torch.device("meta"):
        model = timm.create_model(arch, num_classes=3, **SAMPLE[arch])
        example = torch.empty(2, *model.pretrained_cfg["input_size"])
    classes = {name: type(module) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    found, _ = verdicts(model, example, list(medpeft.methods()), alone=False)
    assert set(found) == set(medpeft.methods())
    assert {status for status, _ in found.values()} <= {"works", "refused"}, found
    assert all(text for status, text in found.values() if status == "refused")
    assert {found[method][0] for method in ("full", "linear_probe", "svdiff", "ssf", "bias")} == {"works"}
    assert (classes, keys) == (
        {name: type(module) for name, module in model.named_modules()},
        list(model.state_dict()),
    )


def test_the_zoo_finds_an_adapter_that_never_runs():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            # Read through an alias, which the search in the source does not follow.
            body = self.body
            return self.head(nn.functional.linear(x, body.weight, body.bias))

    model = Silent()
    found, unused = verdicts(model, torch.randn(2, 4), ["linear_probe", "ssf"], alone=False)
    assert unused == []
    assert found["linear_probe"][0] == "works"
    assert found["ssf"][0] == "silent"
    assert "body" in found["ssf"][1]


def test_a_method_that_refuses_an_input_with_a_reason_does_not_count_as_a_crash(own_registry):
    class Picky(medpeft.Adapter):
        """What sees on its input alone that it does not fit."""

        layers = (nn.Linear,)

        def __init__(self, site):
            super().__init__(site)
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x, y):
            raise medpeft.MedpeftError("'picky' wants a square.")

    class Broken(Picky):
        def forward(self, x, y):
            return y.view(-1, 7)

    medpeft.register("picky")(Picky)
    medpeft.register("broken")(Broken)

    model = nn.Sequential()
    model.add_module("body", nn.Linear(4, 4))
    model.add_module("head", nn.Linear(4, 2))
    found, _ = verdicts(model, torch.randn(3, 4), ["picky", "broken"], alone=True)

    assert found["picky"] == ("refused", "'picky' wants a square.")
    assert found["broken"][0] == "crashed"
    # One that refuses is judged apart from the others, which are tried together.
    found, _ = verdicts(model, torch.randn(3, 4), ["picky", "ssf"], alone=False)
    assert found["picky"] == ("refused", "'picky' wants a square.")
    assert found["ssf"][0] == "works"


def test_a_parameter_that_the_model_does_not_use_is_told_from_a_silent_one():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.idle, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.body(x))

    found, unused = verdicts(Idle(), torch.randn(2, 4), ["full", "bias", "ssf"], alone=False)
    assert unused == ["idle.bias", "idle.weight"]
    assert {status for status, _ in found.values()} == {"works"}


def test_a_kind_is_the_same_at_any_depth_and_differs_with_the_classes():
    def kind(name):
        return kind_of(next(c for c in timm_models() if c.name == name).build()[0])

    assert kind("resnet50") == kind("resnet101")
    assert len({kind(name) for name in ("resnet18", "resnet50", "seresnet50")}) == 3
