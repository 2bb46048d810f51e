"""Methods by name, their options, and methods of the user's own."""

from typing import get_args

import pytest
import torch
from models import example, make, output, randomise_adapters
from torch import nn

import medpeft
from medpeft.adapters import registry
from medpeft.adapters.registry import find
from medpeft.adapters.requests import Name

BUILT_IN = [
    "full", "linear_probe", "bn", "ln", "norm", "attention", "bias", "bitfit", "adaptformer", "lora", "tsa", "ssf", "svdiff"
]  # fmt: skip


def test_every_method_has_one_line_about_it(own_registry):
    assert [name for name in medpeft.methods() if name in BUILT_IN] == BUILT_IN
    for name in BUILT_IN:
        line = medpeft.methods()[name]
        assert 20 < len(line) < 128, name
        assert "\n" not in line, name


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lra", {}, "Unknown method 'lra'. Did you mean 'lora'? Available: full, linear_probe, bn, "),
        ("lora+ssff", {}, "Unknown method 'ssff'. Did you mean 'ssf'? Available: "),
        ("qqq", {}, "Unknown method 'qqq'. Available: full, "),
        ("", {}, "Unknown method ''."),
        (
            {},
            {},
            "{} names no method: give a name such as 'lora', a union such as 'bias+norm', or a dict of options by name.",
        ),
        (3, {}, "3 names no method"),
        (
            "lora",
            {"rnk": 4},
            "Unknown option 'rnk'. Did you mean 'rank'? Options: 'lora' takes parts, rank, alpha, dropout, ",
        ),
        ("bn", {"rank": 4}, "Unknown option 'rank'. Options: 'bn' takes none."),
        ({"lora": {"rnk": 4}}, {}, "Unknown option 'rnk'. Did you mean 'rank'? Options: 'lora' takes "),
        (
            "lora+adaptformer",
            {"dropout": 0.5},
            (
                "'dropout' is an option of 'lora' and 'adaptformer': give each its own, "
                "{'lora': {'dropout': …}, 'adaptformer': {'dropout': …}}."
            ),
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_can(method, options, message):
    with pytest.raises(medpeft.MedpeftError) as error:
        medpeft.apply(make("vit"), method, **options)

    assert str(error.value).startswith(message)


def test_an_option_goes_to_the_one_method_that_has_it():
    assert medpeft.plan(make("vit"), "lora+bias", rank=3, tables=True).record.methods["lora"]["rank"] == 3


def test_an_option_of_one_method_overrides_none_of_the_other():
    planned = medpeft.plan(make("vit"), {"lora": {"dropout": 0.5}, "adaptformer": None})

    assert planned.record.methods["lora"]["dropout"] == 0.5
    assert planned.record.methods["adaptformer"]["dropout"] == 0.1


def test_spaces_around_a_plus_do_not_matter():
    assert medpeft.plan(make("vit"), "bias + norm").record.name == "bias+norm"


@pytest.fixture
def gain(own_registry):
    """A method of the user's own, on outputs and weights."""

    @medpeft.register("gain", hint="it scales linear layers. Try 'ssf'.")
    class Gain(medpeft.Adapter):
        """A gain for each output feature of every linear layer: y · g."""

        layers = (nn.Linear,)

        def __init__(self, site, *, start=1.0):
            super().__init__(site)
            self.gain = nn.Parameter(torch.full((site.layer.out_features,), start))

        def forward(self, x, y):
            return y * self.gain

        def merged(self, weight, bias):
            return weight * self.gain[:, None], None if bias is None else bias * self.gain

    return Gain


def test_a_method_of_ones_own_acts_merges_and_joins_a_union(gain):
    model, x = make("beit"), example("beit")
    base = output(model, x)

    medpeft.apply(model, {"gain": {}, "lora": {"rank": 2}, "ssf": {"target": "norm"}})
    torch.testing.assert_close(output(model, x), base, rtol=1e-12, atol=1e-12)
    adapted = output(randomise_adapters(model), x)
    assert not torch.allclose(adapted, base)
    with medpeft.merged(model):
        torch.testing.assert_close(output(model, x), adapted, rtol=1e-10, atol=1e-10)
    report = medpeft.report(model)
    assert ("gain", "Linear", 2 * (48 + 16 + 64 + 16)) in [
        (row.method, row.type, row.parameters) for row in report.rows
    ]
    assert torch.equal(output(medpeft.remove(model), x), base)


def test_its_options_targets_and_refusals_work_as_those_of_the_built_in_ones(gain):
    assert medpeft.methods()["gain"] == "A gain for each output feature of every linear layer: y · g."
    model = medpeft.apply(make("vit"), "gain", start=0.5, target="mlp")
    assert {n.partition(".adapters")[0].rpartition(".")[2] for n, _ in model.named_parameters() if n.endswith("gain")} == {
        "fc1", "fc2"
    }  # fmt: skip
    assert model.blocks[0].mlp.fc1.adapters["gain"].gain.eq(0.5).all()
    with pytest.raises(
        medpeft.MedpeftError, match=r"'gain' found nothing to train in Sequential .* it scales linear layers"
    ):
        medpeft.apply(nn.Sequential(nn.Conv2d(1, 1, 1)), "gain", head=None)


def test_a_method_that_keeps_its_output_for_backward_can_come_before_lora(own_registry):
    @medpeft.register("squash")
    class Squash(medpeft.Adapter):
        """The tanh of the output, scaled."""

        layers = (nn.Linear,)

        def __init__(self, site):
            super().__init__(site)
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x, y):
            return torch.tanh(y * self.gain)

    for later in ("lora", "tsa"):  # Methods act in the order in which they were registered.
        registry._METHODS[later] = registry._METHODS.pop(later)
    model, x = make("vit"), example("vit")
    medpeft.apply(model, {"squash": {}, "lora": {"target": "*"}, "tsa": {"target": "*"}})
    randomise_adapters(model)

    output(model, x).sum().backward()

    assert all(p.grad is not None for n, p in model.named_parameters() if ".lora." in n)


def test_a_predicate_is_a_method(own_registry):
    @medpeft.register("last_blocks")
    def last_blocks(name, parameter, layer, *, first=1):
        """Every parameter of the blocks from number `first` on."""
        steps = name.split(".")
        return steps[0] == "blocks" and int(steps[1]) >= first

    model = medpeft.apply(make("vit"), "last_blocks+bias", head=None)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}

    assert trained == {
        n for n, _ in model.named_parameters() if n.startswith("blocks.1.") or n.endswith("bias")
    } - {"head.bias"} | {"head.bias"}
    assert medpeft.methods()["last_blocks"] == "Every parameter of the blocks from number `first` on."
    assert medpeft.plan(make("vit"), "last_blocks", first=0).selected.keys() >= {"blocks.0.norm1.weight"}


def test_a_predicate_sees_the_layer_and_what_it_belongs_to(own_registry):
    seen = {}

    @medpeft.register("look")
    def look(name, parameter, layer):
        """Nothing; notes what it is asked."""
        seen[name] = (layer.name, type(layer.module).__name__, layer.attention, layer.attention_block)
        return False

    with pytest.raises(medpeft.MedpeftError, match="'look' found nothing to train in VisionTransformer"):
        medpeft.apply(make("vit"), "look", head=None)
    assert seen["blocks.0.attn.qkv.weight"] == ("blocks.0.attn.qkv", "Linear", "blocks.0.attn", "blocks.0")
    assert seen["cls_token"] == ("", "VisionTransformer", "", "")


@pytest.mark.parametrize("name", ["a+b", "two words", ""])
def test_a_name_that_cannot_be_written_in_a_union_is_refused(name):
    with pytest.raises(
        medpeft.MedpeftError, match="cannot name a method: use letters, digits and underscores"
    ):
        medpeft.register(name)


def test_a_name_that_is_taken_is_refused(own_registry):
    with pytest.raises(
        medpeft.MedpeftError, match="A method called 'lora' is registered already: choose another name"
    ):
        medpeft.register("lora")(lambda name, parameter, layer: True)


def test_what_is_neither_an_adapter_nor_a_predicate_is_refused(own_registry):
    with pytest.raises(
        medpeft.MedpeftError,
        match=r"is no method: register a class derived from medpeft\.Adapter or a predicate",
    ):
        medpeft.register("mine")(nn.Linear)
    assert "mine" not in medpeft.methods()


def test_an_adapter_that_does_nothing_is_refused(own_registry):
    class Idle(medpeft.Adapter):
        """Nothing."""

    with pytest.raises(
        medpeft.MedpeftError,
        match=r"Idle does nothing: define forward\(x, y\), enter\(x, others\) or merged\(weight, bias\)",
    ):
        medpeft.register("idle")(Idle)
    assert "idle" not in medpeft.methods()


def test_an_option_without_a_default_must_be_given(own_registry):
    @medpeft.register("needy")
    def needy(name, parameter, layer, *, what):
        """Parameters whose name ends in `what`."""
        return name.endswith(what)

    with pytest.raises(medpeft.MedpeftError, match="'needy' needs what: it has no default"):
        medpeft.apply(make("vit"), "needy")
    assert medpeft.plan(make("vit"), "needy", what="norm.bias", head=None).selected == {"norm.bias": "needy"}


# What a search tries


def test_the_search_space_names_every_option_after_its_method():
    space = medpeft.search_space("lora+bias+ssf")
    assert space["lora.rank"] == (2, 4, 8, 16, 32)
    assert {name.partition(".")[0] for name in space} == {"lora", "ssf"}
    assert medpeft.search_space("bias") == {}


def test_an_option_that_is_given_is_not_searched():
    space = medpeft.search_space({"lora": {"rank": 8}, "ssf": None})
    assert "lora.rank" not in space
    assert {"lora.dora", "ssf.init"} <= set(space)


def test_a_search_space_of_an_unknown_method_is_refused():
    with pytest.raises(medpeft.MedpeftError, match=r"Unknown method 'lra'\. Did you mean 'lora'"):
        medpeft.search_space("lra")


def test_a_method_that_would_search_what_it_does_not_take_is_refused(own_registry):
    class Gain(medpeft.Adapter):
        """A gain."""

        layers = (nn.Linear,)

        def forward(self, x, y):
            return y

    with pytest.raises(medpeft.MedpeftError, match=r"'gain' would search rank, which is none of its options"):
        medpeft.register("gain", search={"rank": (1, 2)})(Gain)
    with pytest.raises(medpeft.MedpeftError, match=r"'gain' would read from older files rank, which is none"):
        medpeft.register("gain", older={"rank": 1})(Gain)


@pytest.mark.parametrize("name", [name for name in BUILT_IN if medpeft.search_space(name)])
def test_every_declared_value_is_one_the_method_takes(name):
    model = "resnet" if name == "tsa" else "vit"
    for option, values in medpeft.search_space(name).items():
        assert len(set(values)) == len(values) > 1, option
        for value in values:
            assert medpeft.plan(make(model), {name: {option.partition(".")[2]: value}}).trainable > 0, (
                option,
                value,
            )


@pytest.mark.parametrize("method", ["difffit", "fact", "ia3", "oft", "repadapter", "vera"])
def test_every_value_that_a_search_would_try_can_be_applied(method):
    for option, values in find(method).search.items():
        for value in values:
            planned = medpeft.plan(make("vit"), method, **{option: value})
            assert planned.trainable > 0


def test_an_editor_is_told_every_method_of_the_package():
    built_in = [name for name in medpeft.methods() if find(name).define.__module__.startswith("medpeft.")]
    assert list(get_args(Name)) == built_in
