"""Options by place: each layer is adapted as if its value were the only one, here, in files and in other libraries' words."""

import io
import re

import pytest
import torch
from every_method import CASES
from models import example, make
from torch import nn

import medpeft
from medpeft.adapters.by_place import ByPlace, choices, shown
from medpeft.adapters.record import own_state

METHODS = {
    "adapter_plus": ("bottleneck", 2, 4),
    "adaptformer": ("input", "residual", "norm"),
    "conv_adapter": ("reduction", 2, 4),
    "houlsby": ("init", "identity", "official"),
    "lokr": ("factor", 2, 4),
    "lora": ("rslora", False, True),
    "oft": ("block_size", 2, 4),
    "prefix": ("tokens", 2, 3),
    "ssf": ("sites", "norm", "linear"),
    "svdiff": ("scale", 0.5, 1.0),
    "tsa": ("form", "matrix", "vector"),
    "vera": ("rank", 3, 6),
    "vpt_deep": ("tokens", 2, 3),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_layer_is_adapted_by_its_own_value(method):
    family, usual = CASES[method]
    option, one, other = METHODS[method]

    def adapted(value):
        return medpeft.apply(make(family), method, **usual | {option: value})

    with_one, with_other = adapted(one), adapted(other)
    layer = with_one._medpeft.sites[0][1]
    mixed = adapted({layer: one, "*": other})
    places = set()
    for name, tensor in own_state(mixed):
        source = with_one if name.startswith(f"{layer}.adapters.") else with_other
        places.add(source is with_one)
        assert torch.equal(dict(own_state(source))[name], tensor), name
    assert places == {True, False}
    mixed(example(family)).sum().backward()


def test_values_differ_within_unions_and_beside_targets_and_depth():
    model = medpeft.apply(
        make("vit"),
        {"lora": {"rank": {"*.fc1": 3}, "target": "mlp"}, "ssf": {"init": {"norm": "official"}}},
        depth=0.5,
        alpha={re.compile("fc2$"): 4, nn.Linear: None},
    )
    lora = {name: m for name, m in model.named_modules() if type(m).__name__ == "LoRA"}
    assert {name.partition(".mlp.")[2]: (m.rank, m.scale) for name, m in lora.items()} == {
        "fc1.adapters.lora": (3, 1.0),
        "fc2.adapters.lora": (8, 0.5),  # No pattern matches: the default rank.
    }
    assert (model.blocks[1].norm1.adapters["ssf"].scale != 1).all()
    assert (model.blocks[1].mlp.fc1.adapters["ssf"].scale == 1).all()


def test_a_selective_method_is_asked_by_place():
    tables = {"blocks.0": True, "*": False}
    model = medpeft.apply(make("beit"), "bias", tables=tables)
    assert sum("relative_position_bias_table" in name for name in model._medpeft.selected) == 1
    assert medpeft.load(make("beit"), saved(model))._medpeft.selected == model._medpeft.selected


def test_one_value_for_all_layers_is_that_value():
    plain = medpeft.plan(make("vit"), "lora", rank={"blocks.0": 4, "*": 4})
    assert plain.record.methods["lora"]["rank"] == 4


def test_plan_report_and_file_say_which_layers_have_which_value():
    given = {"rank": {"*.fc1": 3, "mlp": 2}}
    planned = medpeft.plan(make("vit"), {"lora": given}, target="mlp")
    line = "lora: rank 3 at 2 layers (blocks.0.mlp.fc1, …), 2 at 2 layers (blocks.0.mlp.fc2, …)"
    assert line in str(planned)
    model = medpeft.apply(make("vit"), {"lora": given}, target="mlp")
    assert line in str(medpeft.report(model))
    assert medpeft.report(model).to_dict()["by_place"] == [line]
    header = medpeft.inspect(saved(model))
    assert header.methods["lora"]["rank"]["blocks.1.mlp.fc2"] == 2
    assert "rank=[3 at 2 layers (blocks.0.mlp.fc1, …), 2 at" in str(header)
    assert header.document["schema"] == 2
    assert medpeft.inspect(saved(medpeft.apply(make("vit"), "lora"))).document["schema"] == 1


def saved(model):
    file = io.BytesIO()
    medpeft.save(model, file)
    return file.getvalue()


def test_a_file_gives_every_layer_its_value_back():
    options = {"rank": {"*.qkv": 3, "*": 2}, "parts": {"blocks.0": "k"}, "alpha": {"*.fc2": 8}}
    model = medpeft.apply(make("vit"), {"lora": options}, target="linear")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    loaded = medpeft.load(make("vit"), saved(model))
    assert torch.equal(loaded(example("vit")), model(example("vit")))
    assert loaded._medpeft.methods == model._medpeft.methods
    medpeft.load(loaded, saved(model))
    other = medpeft.apply(make("vit"), "lora", target="linear", rank=2)
    with pytest.raises(medpeft.CheckpointError, match="lora: rank"):
        medpeft.load(other, saved(model))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"*.qvk": 4}, r"rank by place: The pattern '\*\.qvk' picks no layer that 'lora' fits"),
        ({"atention": 4}, "Did you mean 'attention'"),
        ({"qkv": 4}, r"Did you mean '\*\.qkv'"),
        ({"*": 4, "blocks.0": 2}, r"rank\['blocks.0'\] decides nowhere: .*Put it before"),
        ({"*": 0}, r"rank\['\*'\]=0 must be a whole number above 0"),
        ({"*": {"*": 2}}, r"rank\['\*'\]=\{'\*': 2\} must be a whole number"),
        ({}, "rank by place needs patterns"),
        ({7: 4}, "7 is no pattern"),
        ({("*.q", "*.v"): 4}, "no single pattern"),
        ({"*" * 2000: 4}, "no single pattern"),
    ],
)
def test_what_decides_nowhere_or_is_no_value_is_refused(values, message):
    model = make("vit")
    keys = list(model.state_dict())
    with pytest.raises(medpeft.MedpeftError, match=message):
        medpeft.apply(model, "lora", rank=values)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        ("hf_vit", "fact", {"rank": {"*.q_proj": 2}}),
        ("vit", "vera", {"projection_seed": {"blocks.0": 1}}),
        ("vit", "lst", {"reduction": {"blocks.0": 2}}),
        ("vit", "dtl", {"rank": {"blocks.0": 4}}),
    ],
)
def test_layers_that_work_with_the_same_numbers_have_one_value(family, method, options):
    with pytest.raises(medpeft.MedpeftError, match=r"work with the same numbers, so .* cannot differ there"):
        medpeft.apply(make(family), method, **options)


def test_many_values_take_neither_time_nor_room():
    many = ByPlace({f"blocks.{i}": i for i in range(20_000)})
    assert shown(many).endswith("11 at blocks.11, and 19,988 other values")
    with pytest.raises(medpeft.MedpeftError, match="20,000 different ways: 100 is the limit"):
        choices({"parts": many})


def test_an_option_without_an_annotation_may_be_a_dict_itself():
    @medpeft.register("with_a_dict")
    def with_a_dict(name, parameter, layer, *, table=None):
        """Those that a table names."""
        return name in table

    try:
        model = medpeft.apply(nn.Sequential(nn.Linear(2, 2)), "with_a_dict", table={"0.bias": 1}, head=None)
        assert list(model._medpeft.selected) == ["0.bias"]
    finally:
        from medpeft.adapters import registry

        del registry._METHODS["with_a_dict"]
