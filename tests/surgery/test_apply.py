"""What a user does to a model: apply, disabled, remove; refusals leave it as it was."""

import copy
import sys
import threading

import pytest
import torch
from models import example, make, output, randomise, randomise_adapters
from torch import nn
from traces import same, tensors, trace

import medpeft
from medpeft.adapters.wiring import wiring_of


def test_apply_returns_the_model_it_was_given_with_its_class_and_keys():
    model = make("vit")
    keys = list(model.state_dict())

    assert medpeft.apply(model, "lora+ssf+adaptformer") is model
    assert type(model).__name__ == "VisionTransformer"
    assert [key for key in model.state_dict() if "adapters." not in key] == keys


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


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_apply_leaves_the_random_state_of_torch_alone(init):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    medpeft.apply(
        make("vit"), {"lora": {"init": init}, "ssf": {"init": "official"}, "adaptformer": {}, "svdiff": {}}
    )

    assert torch.equal(torch.rand(3), expected)


def adapters(model):
    return {name: tensor for name, tensor in model.state_dict().items() if ".adapters." in name}


def test_the_seed_fixes_the_initial_values_whatever_else_is_applied():
    one = adapters(medpeft.apply(make("vit"), "lora", seed=1))
    again = adapters(medpeft.apply(make("vit"), "lora", seed=1))
    other = adapters(medpeft.apply(make("vit"), "lora", seed=2))
    union = adapters(medpeft.apply(make("vit"), "adaptformer+lora+ssf", seed=1))

    assert same(one, again)
    assert all(torch.equal(union[name], tensor) for name, tensor in one.items())
    downs = [name for name in one if name.endswith("down")]
    assert not any(torch.equal(one[name], other[name]) for name in downs)
    assert not torch.equal(one[downs[0]], one[downs[1]])


@pytest.mark.parametrize("call", [medpeft.remove, lambda model: medpeft.disabled(model).__enter__()])
def test_values_that_were_given_up_cannot_be_brought_back(call):
    model = medpeft.apply(make("vit"), "full")

    with pytest.raises(
        medpeft.MedpeftError, match="needs the original values, which 'full' gave up: pass keep_base=True"
    ):
        call(model)
    assert medpeft.report(model).method == "full"


def test_an_error_inside_disabled_brings_the_adapters_back():
    model, x = medpeft.apply(make("vit"), "lora+bias"), example("vit")
    randomise_adapters(model)
    adapted = output(model, x)

    with pytest.raises(RuntimeError, match="mine"), medpeft.disabled(model):
        raise RuntimeError("mine")

    assert torch.equal(output(model, x), adapted)


def test_disabled_inside_disabled_is_the_base_until_the_outer_one_ends():
    model, x = medpeft.apply(make("vit"), "lora+bias"), example("vit")
    base = output(model, x)
    adapted = output(randomise_adapters(model), x)

    with medpeft.disabled(model):
        with medpeft.disabled(model):
            assert torch.equal(output(model, x), base)
        assert torch.equal(output(model, x), base)
    assert torch.equal(output(model, x), adapted)


def test_merged_inside_merged_is_merged_until_the_outer_one_ends():
    model, x = randomise_adapters(medpeft.apply(make("vit"), "lora+bias")), example("vit")
    adapted = output(model, x)
    with medpeft.merged(model):
        expected = output(model, x)

    with medpeft.merged(model):
        with medpeft.merged(model):
            assert torch.equal(output(model, x), expected)
        assert torch.equal(output(model, x), expected)
    assert torch.equal(output(model, x), adapted)


OTHER_VALUES = {
    "remove": medpeft.remove,
    "merging": medpeft.merge,
}


@pytest.mark.parametrize("within", [medpeft.disabled, medpeft.merged])
@pytest.mark.parametrize("action", OTHER_VALUES)
def test_the_trained_values_cannot_be_replaced_while_others_are_in_their_place(within, action):
    model, x = medpeft.apply(make("vit"), "lora+bias"), example("vit")
    adapted = output(randomise_adapters(model), x)

    with (
        within(model),
        pytest.raises(
            medpeft.MedpeftError, match=r"does not work inside disabled\(model\) or merged\(model\)"
        ),
    ):
        OTHER_VALUES[action](model)

    assert torch.equal(output(model, x), adapted)


def test_the_base_cannot_be_shown_while_the_adapters_are_merged_nor_the_other_way_round():
    model = medpeft.apply(make("vit"), "lora")

    with medpeft.merged(model), pytest.raises(medpeft.MedpeftError, match="disabled does not work inside"):
        medpeft.disabled(model).__enter__()
    with medpeft.disabled(model), pytest.raises(medpeft.MedpeftError, match="merged does not work inside"):
        medpeft.merged(model).__enter__()


def test_disabling_a_part_leaves_the_model_adapted_elsewhere():
    model = medpeft.apply(make("vit"), "lora")

    with (
        pytest.raises(medpeft.MedpeftError, match="This Block is not adapted"),
        medpeft.disabled(model.blocks[0]),
    ):
        pass


def test_a_shared_layer_is_adapted_once_and_stays_shared():
    shared = nn.Linear(4, 4)
    model = randomise(nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)}).double())
    medpeft.apply(model, "ssf", head=None)

    assert model["a"][0] is model["b"][0]
    assert (
        len([name for name, _ in model.named_modules(remove_duplicate=False) if name.endswith("adapters")])
        == 2
    )
    assert len([name for name, _ in model.named_modules() if name.endswith("adapters")]) == 1
    assert wiring_of(shared) is not None
    assert medpeft.report(model).trainable == 8
    medpeft.remove(model)
    assert wiring_of(shared) is None


def test_a_keyword_input_is_adapted_too():
    model, x = randomise(nn.Sequential(nn.Linear(4, 4)).double()), torch.randn(2, 4, dtype=torch.float64)
    randomise_adapters(medpeft.apply(model, "lora", head=None, target="*"))

    assert torch.equal(model[0](input=x), model[0](x))


def test_the_base_is_kept_apart_from_the_parameters_that_train():
    model = make("vit")
    before = tensors(model)
    medpeft.apply(model, "bias")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1)
    copied = copy.deepcopy(model)

    for adapted in (model, copied):
        assert same(tensors(medpeft.remove(adapted)), before)


@pytest.fixture
def hasty_threads():
    """Threads take turns so often that what is not safe shows."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("hasty_threads")
@pytest.mark.parametrize(
    ("family", "method", "times"),
    [("multihead_attention", "lora+ssf", 300), ("beit", "lora", 30), ("vit", "adaptformer+lora+svdiff", 30)],
)
def test_threads_that_run_one_adapted_model_get_what_one_gets(family, method, times):
    model = randomise_adapters(medpeft.apply(make(family), method)).eval()
    inputs = [example(family), example(family) * 0.5]
    with torch.no_grad():
        expected = [output(model, x) for x in inputs]
    wrong = []

    def work(which):
        with torch.no_grad():
            results = [output(model, inputs[which]) for _ in range(times)]
        wrong.extend(which for y in results if not torch.equal(y, expected[which]))

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not any({"weight", "in_proj_weight"} & vars(module).keys() for module in model.modules())
