"""What a user does to a model: apply, disabled, remove; refusals leave it as it was."""

import copy
import sys
import threading

import pytest
import torch
from models import example, make, output, randomise, randomise_adapters
from torch import nn
from traces import same, tensors

import medpeft
from medpeft.adapters.wiring import wiring_of


def test_apply_returns_the_model_it_was_given_with_its_class_and_keys():
    model = make("vit")
    keys = list(model.state_dict())

    assert medpeft.apply(model, "lora+ssf+adaptformer") is model
    assert type(model).__name__ == "VisionTransformer"
    assert [key for key in model.state_dict() if "adapters." not in key] == keys


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
        pytest.raises(medpeft.MedpeftError, match=r"does not work inside disabled\(model\), scaled"),
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
