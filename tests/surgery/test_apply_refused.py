"""Calls that `apply` refuses leave the model as it was."""

import pytest
import torch
from models import make
from torch import nn
from traces import same, tensors, trace

import medpeft

REFUSED = [
    ("tsa", {}),
    ("lora", {"rank": 0}),
    ("lora", {"rank": 17, "init": "pissa", "target": "blocks.*"}),  # More than what the last layers have.
    ("lora+tsa", {}),
    ("adaptformer", {"bottleneck": -1}),
    ("adaptformer", {"scale": "big"}),
    ("adaptformer", {"input": "mlp"}),
    ("ssf", {"init": "zero"}),
    ("ssf", {"sites": "head"}),
    ("attention", {"scope": "model"}),
    ("lora", {"head": "nothing"}),
    ("lora", {"batchnorm": "off"}),
    ("lora", {"target": "nothing"}),
]


@pytest.mark.parametrize(("method", "options"), REFUSED)
def test_a_call_that_fails_leaves_the_model_as_it_was(method, options):
    model = make("vit")
    before, about = tensors(model), trace(model)

    with pytest.raises(medpeft.MedpeftError):
        medpeft.apply(model, method, **options)

    assert same(tensors(model), before)
    assert trace(model) == about


def test_a_method_that_raises_halfway_leaves_the_model_as_it_was(own_registry):
    @medpeft.register("fragile")
    class Fragile(medpeft.Adapter):
        """Breaks at the last layer."""

        layers = (nn.Linear,)

        def __init__(self, site):
            super().__init__(site)
            if site.name == "blocks.1.mlp.fc2":
                raise RuntimeError("broken")

        def forward(self, x, y):
            return y

    model = make("vit")
    before, about = tensors(model), trace(model)
    with pytest.raises(RuntimeError, match="broken"):
        medpeft.apply(model, "lora+bias+fragile")
    assert same(tensors(model), before)
    assert trace(model) == about


def test_an_adapted_model_is_not_adapted_again():
    model = medpeft.apply(make("vit"), "bias+norm")

    with pytest.raises(medpeft.MedpeftError) as error:
        medpeft.apply(model, "lora")
    assert str(error.value) == (
        "This VisionTransformer is adapted already, by 'bias+norm': remove or merge that first, or apply both at once, as in "
        "'lora+bias'."
    )
    with pytest.raises(
        medpeft.MedpeftError, match=r"This Sequential \(0\) is adapted already, by 'bias\+norm'"
    ):
        medpeft.apply(nn.Sequential(model), "lora", head=None)


@pytest.mark.filterwarnings(
    "ignore:.*jit.*is deprecated:DeprecationWarning"
)  # torch 2.11's own inductor, when first imported.
def test_a_compiled_model_is_refused():
    with pytest.raises(medpeft.MedpeftError, match=r"is compiled, .*: apply first, then compile"):
        medpeft.apply(torch.compile(make("vit")), "lora")
    model = make("vit")
    model.blocks[0].compile()
    with pytest.raises(medpeft.MedpeftError, match=r"blocks\.0 is compiled"):
        medpeft.apply(model, "lora")


@pytest.mark.filterwarnings("ignore:.*jit:FutureWarning", "ignore:.*jit:DeprecationWarning")
def test_a_scripted_model_is_refused():
    with pytest.raises(medpeft.MedpeftError, match=r"is compiled"):
        medpeft.apply(torch.jit.script(nn.Sequential(nn.Linear(2, 2))), "lora", head=None)


def test_a_lazy_layer_is_refused():
    with pytest.raises(medpeft.MedpeftError, match="0 has no shape yet: run the model once, then apply"):
        medpeft.apply(nn.Sequential(nn.LazyLinear(2)), "lora", head=None)


def test_a_layer_with_an_attribute_of_that_name_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].adapters = nn.Identity()

    with pytest.raises(medpeft.MedpeftError, match="0 has an attribute 'adapters' already"):
        medpeft.apply(model, "ssf", head=None)


def test_what_is_no_module_is_refused():
    with pytest.raises(medpeft.MedpeftError, match=r"dict is no torch\.nn\.Module: pass the model itself"):
        medpeft.apply({}, "lora")


@pytest.mark.parametrize("call", [medpeft.remove, medpeft.merge, medpeft.report])
def test_calls_that_need_an_adapted_model_say_so(call):
    with pytest.raises(
        medpeft.MedpeftError, match=r"This Linear is not adapted: call medpeft\.apply\(model, method\) first"
    ):
        call(nn.Linear(2, 2))
