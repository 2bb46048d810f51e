"""Apply, disabled, remove: in place, all or nothing, and without a trace."""

import copy
import threading

import pytest
import timm
import torch
from models import example, make, output, randomise_adapters
from torch import nn

import medpeft


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(model, before):
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_method_that_fits_only_in_part_changes_nothing():
    model = make("vit")
    before, trained = state(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(medpeft.MedpeftError, match="'tsa' found nothing to train"):
        medpeft.apply(model, "lora+tsa")
    assert same_state(model, before)
    assert [p.requires_grad for p in model.parameters()] == trained
    assert hooks(model) == 0
    assert "_medpeft" not in vars(model)


def test_remove_after_training_gives_back_every_bit():
    model, x = make("resnet"), example("resnet")
    before, trained = state(model), [p.requires_grad for p in model.parameters()]
    medpeft.apply(model, "bn+tsa", batchnorm="adapt").train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    output(model, x).square().sum().backward()
    optimizer.step()
    assert not same_state(model, before)
    with medpeft.disabled(model):
        assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    medpeft.remove(model)
    assert same_state(model, before)
    assert [p.requires_grad for p in model.parameters()] == trained
    assert hooks(model) == 0
    assert all("train" not in vars(m) for m in model.modules())


def test_full_gives_up_the_base_unless_asked_to_keep_it():
    model = medpeft.apply(make("resnet"), "full")
    with pytest.raises(
        medpeft.MedpeftError, match="remove needs the original values, which 'full' gave up: pass keep_base=True"
    ):
        medpeft.remove(model)
    with pytest.raises(medpeft.MedpeftError, match="disabled needs the original values"), medpeft.disabled(model):
        pass
    model = make("resnet")
    before = state(model)
    medpeft.remove(medpeft.apply(model, "full", keep_base=True))
    assert same_state(model, before)


def test_an_adapted_model_is_not_adapted_again():
    model = medpeft.apply(make("vit"), "lora")
    with pytest.raises(
        medpeft.MedpeftError, match=r"is adapted already, by 'lora': remove or merge that first, .*'lora\+bias'"
    ):
        medpeft.apply(model, "bias")
    with pytest.raises(medpeft.MedpeftError, match=r"Sequential \(0\) is adapted already"):
        medpeft.apply(nn.Sequential(model), "bias", head=None)


def test_a_compiled_model_is_refused():
    compiled = torch.compile(make("vit"), backend="eager")
    with pytest.raises(medpeft.MedpeftError, match=r"is compiled, .* apply first, then compile"):
        medpeft.apply(compiled, "lora", head=None)


def test_what_is_no_module_is_refused():
    with pytest.raises(medpeft.MedpeftError, match=r"dict is no torch.nn.Module"):
        medpeft.apply({}, "lora")


@pytest.mark.parametrize("call", [medpeft.remove, medpeft.report, medpeft.merge])
def test_a_call_on_an_unadapted_model_says_what_to_do(call):
    with pytest.raises(medpeft.MedpeftError, match=r"is not adapted: call medpeft.apply\(model, method\) first"):
        call(make("vit"))


def test_the_seed_fixes_the_adapters_and_torchs_own_randomness_is_left_alone():
    torch.manual_seed(5)
    first = state(medpeft.apply(make("vit"), "lora+adaptformer", seed=3))
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert same_state(medpeft.apply(make("vit"), "lora+adaptformer", seed=3), first)
    assert not same_state(medpeft.apply(make("vit"), "lora+adaptformer", seed=4), first)


@pytest.mark.parametrize("given", [None, torch.bfloat16])
def test_adapters_are_in_float32_or_the_dtype_asked_for(given):
    model = medpeft.apply(make("vit", torch.float32).bfloat16(), "lora", dtype=given)
    found = {p.dtype for name, p in model.named_parameters() if ".adapters." in name}
    assert found == {given or torch.float32}


def test_frozen_batchnorms_stay_in_eval_when_the_model_trains():
    model, x = make("resnet"), example("resnet")
    before = state(model)
    medpeft.apply(model, "linear_probe").train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert model.training
    assert not any(norm.training for norm in norms)
    output(model, x)
    assert same_state(model, before)
    twin = copy.deepcopy(model).train()
    assert not any(m.training for m in twin.modules() if isinstance(m, nn.BatchNorm2d))
    medpeft.remove(model)
    assert all(norm.training for norm in norms)


def test_adapting_batchnorms_move_and_are_part_of_what_was_trained():
    model, x = make("resnet"), example("resnet")
    medpeft.apply(model, "bn", batchnorm="adapt").train()
    mean = model.bn1.running_mean.clone()
    output(model, x)
    assert not torch.equal(model.bn1.running_mean, mean)
    with medpeft.disabled(model):
        assert torch.equal(model.bn1.running_mean, mean)


def test_an_error_in_the_forward_leaves_no_cover_behind():
    model = medpeft.apply(make("beit"), "lora")
    qkv = model.blocks[0].attn.qkv
    with pytest.raises(RuntimeError):
        model.blocks[0](torch.randn(2, 5, 3, dtype=torch.float64))
    assert "weight" not in vars(qkv)


def test_two_threads_may_run_one_model_at_once():
    model = randomise_adapters(medpeft.apply(make("beit"), "lora+adaptformer"))
    inputs = [example("beit") + i for i in range(2)]
    with torch.no_grad():
        expected = [output(model, x) for x in inputs]
    wrong = []

    def work(i):
        with torch.no_grad():
            wrong.extend(i for _ in range(20) if not torch.equal(output(model, inputs[i]), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_parameter_groups_hold_every_trainable_once_and_decay_no_scale():
    model = medpeft.apply(make("vit"), "lora+ssf+norm")
    groups = medpeft.parameter_groups(model, lr=1e-3, weight_decay=0.05, head_lr=1e-2, lora_plus=16.0)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert (id(p) in decayed) == (p.ndim > 1), name
            rate = 1e-2 if name.startswith("head.") else 1.6e-2 if name.endswith("lora.up") else 1e-3
            assert rates[id(p)] == pytest.approx(rate), name
    torch.optim.AdamW(groups)
    with pytest.raises(medpeft.MedpeftError, match=r"lr=0 and lora_plus=1.0 must be above 0"):
        medpeft.parameter_groups(model, lr=0)


def test_a_report_adds_up_and_warns_of_an_adapter_larger_than_its_layer():
    model = medpeft.apply(timm.create_model("tf_efficientnet_lite0", num_classes=3), "lora", rank=32)
    found = medpeft.report(model)
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.trainable == trains == sum(row.parameters for row in found.rows)
    assert found.total == sum(p.numel() for p in model.parameters())
    assert found.head == 1280 * 3 + 3
    assert found.to_dict()["percent"] == pytest.approx(100 * trains / found.total)
    assert any("lora has" in text and "Conv2d" in text for text in found.warnings)
    text, markdown, page = str(found), found.to_markdown(), found._repr_html_()
    assert f"{trains:,}" in text
    assert "| method | type | parameters |" in markdown
    assert "<table>" in page


def test_a_plan_counts_what_apply_trains_and_touches_nothing():
    model = make("vit")
    before = state(model)
    planned = medpeft.plan(model, "svdiff+bias", scale=0.5)
    assert same_state(model, before)
    assert "blocks.0.attn.qkv" in str(planned)
    medpeft.apply(model, "svdiff+bias", scale=0.5)
    assert planned.trainable == medpeft.report(model).trainable


def test_integers_that_are_parameters_stay_as_they_are():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].register_parameter("steps", nn.Parameter(torch.tensor(3), requires_grad=False))
    medpeft.apply(model, "full", head="1", keep_base=True)
    assert not model[0].steps.requires_grad
    assert model[0].weight.requires_grad
    medpeft.remove(model)
    assert not model[0].steps.requires_grad
