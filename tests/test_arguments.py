"""No argument of a public function, of whatever type, gives a raw Python error."""

import io
import math
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import make
from torch import nn

import medpeft
from medpeft.adapters.options import annotations_of, require_options
from medpeft.adapters.registry import _method, find


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def adapted():
    return medpeft.apply(network(), "lora", target="linear", head="2")


WRONG = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.just(10**20), st.floats(), st.text(max_size=4),
    st.binary(max_size=3), st.lists(st.integers(), max_size=2), st.dictionaries(st.text(), st.integers(), max_size=2),
    st.sampled_from([
        object(), nn.Linear, nn.Linear(2, 2), torch.ones(2), torch.ones(2, 4), torch.float16, torch.int8, len, 1j, {1: 2},
        "lora", "LoRA", "auto", "2", "float16", ("2", 3), torch.optim.AdamW, io.BytesIO(), Path("nowhere"), {"lora": 4},
        {"lora": {3: 4}}, {"rank": "8"}, {"method": "lora", "rank": 4}, range(2), {"lora"}, math.nan, lambda: None,
    ]),
)  # fmt: skip


OF_APPLY = ("target", "exclude", "depth", "head", "batchnorm", "keep_base", "dtype", "seed")


def call(function, *arguments, **options):
    """Call it, and let what medpeft raises pass."""
    with suppress(medpeft.MedpeftError):
        function(*arguments, **options)


any_number_of_times = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@any_number_of_times
@given(method=WRONG, name=st.sampled_from(OF_APPLY), value=WRONG)
def test_apply_and_plan_take_anything_or_say_why_not(method, name, value):
    call(medpeft.apply, network(), method)
    call(medpeft.plan, method, "lora")
    call(medpeft.search_space, method)
    call(medpeft.plan, network(), "lora", **{"target": "linear", "head": "2", name: value})
    call(medpeft.apply, network(), "lora", **{"target": "linear", "head": "2", name: value})


@any_number_of_times
@given(data=st.data(), value=WRONG)
def test_every_option_takes_anything_or_says_why_not(data, value):
    method = data.draw(st.sampled_from(sorted(medpeft.methods())))
    options = find(method).options
    if options:
        family = "resnet" if method in ("tsa", "conv_adapter", "residual_adapter") else "vit"
        option = data.draw(st.sampled_from(sorted(options)))
        call(medpeft.apply, make(family), method, **{option: value})


@any_number_of_times
@given(model=WRONG, value=WRONG)
def test_functions_of_an_adapted_model_take_anything_or_say_why_not(model, value):
    for function in (medpeft.report, medpeft.merge, medpeft.remove):
        call(function, model)
    call(medpeft.check, model, torch.ones(2, 4))
    call(medpeft.parameter_groups, model, lr=0.1)
    for context in (medpeft.disabled, medpeft.merged):
        with suppress(medpeft.MedpeftError), context(model):
            pass
    call(medpeft.check, adapted(), value)
    call(medpeft.check, adapted(), torch.ones(2, 4), optimizer=value)
    call(medpeft.report, adapted(), value)
    for name in ("example_input", "tolerance", "min_kept"):
        call(medpeft.merge, adapted(), **{name: value})
    for name in ("lr", "weight_decay", "head_lr", "lora_plus"):
        call(medpeft.parameter_groups, adapted(), **{"lr": 0.1, name: value})


@any_number_of_times
@given(model=WRONG, value=WRONG, name=st.sampled_from(["check_base", "head", "keep_base"]))
def test_files_take_anything_or_say_why_not(model, value, name, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "a.safetensors"
    medpeft.save(adapted(), path)
    call(medpeft.save, model, path)
    if not isinstance(value, (str, Path)):
        call(medpeft.save, adapted(), value)
    call(medpeft.save, adapted(), path, metadata=value)
    call(medpeft.load, model, path)
    call(medpeft.load, network(), value)
    call(medpeft.load, network(), path, **{name: value})
    call(medpeft.inspect, value)


@any_number_of_times
@given(
    value=WRONG,
    name=st.sampled_from(["hint", "search", "selects", "fast", "decays", "identity", "unmergeable"]),
)
def test_register_takes_anything_or_says_why_not(value, name):
    def predicate(name, parameter, layer):
        return False

    call(medpeft.register, value)
    with suppress(medpeft.MedpeftError):
        medpeft.register("lora", **{name: value})(predicate)
    call(_method, "mine", value)
    assert isinstance(find("lora").define, type)


@pytest.mark.parametrize("name", sorted(medpeft.methods()))
def test_every_option_of_every_method_is_checked_and_its_default_is_allowed(name):
    method = find(name)
    for option, default in method.options.items():
        require_options(name, {option: default}, method.annotations)
        with pytest.raises(medpeft.MedpeftError, match=f"{name}: {option}=.* "):
            require_options(name, {option: object()}, method.annotations)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lora", {"alpha": "16"}, "'lora': alpha='16' must be a finite number other than 0 or be None."),
        ("lora", {"alpha": 0}, "'lora': alpha=0 must be a finite number other than 0 or be None."),
        ("lora", {"rank": True}, "'lora': rank=True must be a whole number above 0 (up to 16,777,216)."),
        ("lora", {"rank": 10**20}, "'lora': rank=100000000000000000000 must be a whole number above 0 (up to"),
        ("lora", {"dropout": math.nan}, "'lora': dropout=nan must be at least 0 and below 1."),
        ("lora", {"dora": "yes"}, "'lora': dora='yes' must be True or False."),
        ("svdiff", {"scale": math.inf}, "'svdiff': scale=inf must be a finite number other than 0."),
        ("vera", {"d_initial": 1e308}, "'vera': d_initial=1e+308 must be a finite number other than 0."),
        ("oft", {"block_size": 1.5}, "'oft': block_size=1.5 must be at least 2: a number has nowhere to rotate."),
        ("adaptformer", {"scale": "x"}, "'adaptformer': scale='x' must be a finite number other than 0 or be 'learnable'."),
        ("ssf", {"init": None}, "'ssf': init=None is not known: choose one of 'identity', 'official'."),
        ("lora", {"dtype": "float16"}, "dtype='float16' is text: write dtype=torch.float16."),
        ("lora", {"dtype": torch.int8}, "dtype=torch.int8 must be one of torch.float16, torch.bfloat16, "),
        ("lora", {"keep_base": "yes"}, "keep_base='yes' must be True or False or be None."),
        ("lora", {"seed": 0.5}, "seed=0.5 must be a whole number."),
        ("lora", {"head": nn.Linear(2, 2)}, "head=Linear(in_features=2, out_features=2, bias=True) must be a module's name"),
        ("LoRA", {}, "Unknown method 'LoRA'. Did you mean 'lora'? Available: "),
        ("bias,norm", {}, "Unknown method 'bias,norm'. Did you mean 'bias+norm'? Available: "),
        ("lora", {"r": 4}, "Unknown option 'r'. Did you mean 'rank'? Options: "),
        ("lora", {"target_modules": "x"}, "Unknown option 'target_modules'. Did you mean 'target'? Options: "),
        ({"lora": 4}, {}, "The options of 'lora' must be a dict, such as {'lora': {'parts': 'qv'}}, and are 4."),
        ({"method": "lora", "rank": 4}, {}, "Unknown method 'method'."),
        ("lora", {"target": 3}, "target 3 is no pattern: give a glob such as 'blocks.*', "),
        ("lora", {"target": nn.Linear(2, 2)}, "target Linear(in_features=2, out_features=2, bias=True) is no pattern"),
        ("lora", {"target": []}, "target=[] picks no layer: leave it out for those that 'lora' adapts."),
        ("lora", {"target": len}, "target <built-in function len> cannot be asked (name, layer): "),
    ],
)  # fmt: skip
def test_what_is_refused_is_named_with_what_it_must_be(method, options, message):
    with pytest.raises(medpeft.MedpeftError) as error:
        medpeft.apply(make("vit"), method, **options)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(("target", "meant"), [("attn", "attention"), ("qkv", "*.qkv"), ("Linear", "linear")])
def test_a_target_that_picks_nothing_gets_the_one_that_was_meant(target, meant):
    with pytest.raises(
        medpeft.MedpeftError, match=f"picks no layer .*Did you mean '{meant}'".replace("*.q", r"\*\.q")
    ):
        medpeft.plan(make("vit"), "lora", target=target)


def test_exchanged_arguments_of_save_and_load_are_told(tmp_path):
    with pytest.raises(medpeft.MedpeftError, match="The model comes first and the path second"):
        medpeft.save(tmp_path / "a.safetensors", adapted())
    with pytest.raises(medpeft.MedpeftError, match="The model comes first and the path second"):
        medpeft.load(str(tmp_path / "a.safetensors"), network())


def test_the_class_of_an_optimizer_is_no_optimizer():
    with pytest.raises(medpeft.MedpeftError, match="is no optimizer: pass the one that you made"):
        medpeft.check(adapted(), torch.ones(2, 4), optimizer=torch.optim.AdamW)


def test_of_a_wrapper_its_only_child_is_offered():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = network()

    with pytest.raises(medpeft.MedpeftError, match="which wraps one module, 'model': apply to that"):
        medpeft.apply(Wrapper(), "lora")


def test_annotations_that_only_a_type_checker_can_read_leave_the_option_to_the_method():
    def predicate(name, parameter, layer, *, first: "Unknown" = 1):  # noqa: F821
        return True

    require_options("mine", {"first": object()}, annotations_of(predicate))
