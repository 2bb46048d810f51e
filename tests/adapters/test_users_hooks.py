"""A user's hooks, checkpointing and wrappers see and do the same as on a plain model."""

import copy

import pytest
import torch
from every_method import CASES, adapted, perturb
from models import make, output, randomise
from torch import nn

import medpeft


def gradients(model, x):
    model.zero_grad()
    y = output(model, x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(first, second, tolerance=1e-10):
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing:UserWarning", "ignore:For backward hooks to be:UserWarning"
)
@pytest.mark.parametrize("case", CASES)
def test_full_backward_hooks_on_every_module_change_nothing(case):
    # Behind such a hook torch allows no step in place, as timm's ResNets take them, on a plain model either.
    model, x = adapted(case, family="monai_unet3d" if CASES[case][0] == "resnet" else None)
    expected = gradients(model, x)
    seen = []
    for module in model.modules():
        module.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(module))

    assert_close(expected, gradients(model, x))
    assert seen


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("method", ["ssf", "lora", "tsa", "bias", "svdiff", "oft", "bn"])
def test_a_users_hooks_see_and_do_the_same_before_and_after_apply(method):
    torch.manual_seed(0)
    base = randomise(
        nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2)
        ).double()
    )
    x = torch.randn(3, 4, 4, 4, dtype=torch.float64)

    def run(early):
        model, seen = copy.deepcopy(base), []

        def add_hooks():
            for layer in model[:2]:
                layer.register_forward_pre_hook(
                    lambda layer, args: seen.append(args[0].clone()) or (args[0] * 1.5,)
                )
                layer.register_forward_hook(lambda layer, args, y: seen.append(y.clone()) or torch.tanh(y))
                layer.register_full_backward_hook(lambda layer, into, out: seen.append(out[0].clone()))

        if early:
            add_hooks()
        medpeft.apply(
            model, method, head="3", **({"target": "0"} if method in ("lora", "tsa", "oft") else {})
        )
        perturb(model).eval()
        if not early:
            add_hooks()
        found = gradients(model, x)
        return [*seen, output(model, x)], found

    (early, early_gradients), (late, late_gradients) = run(True), run(False)
    for first, second in zip(early, late, strict=True):
        assert torch.equal(first, second)
    assert_close(early_gradients, late_gradients, tolerance=0)


def test_a_bias_behind_a_hook_that_changes_the_output_gets_the_gradient_of_the_plain_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    model[0].register_forward_hook(lambda module, args, output: torch.tanh(output))
    plain = copy.deepcopy(model)
    medpeft.apply(model, "bias", head="2")
    x = torch.randn(3, 2, 6, 6)
    for net in (model, plain):
        net(x).square().sum().backward()
    torch.testing.assert_close(model[0].bias.grad, plain[0].bias.grad)


@pytest.mark.parametrize("case", CASES)
def test_a_forward_called_directly_is_adapted(case):
    model, x = adapted(case)
    expected = output(model, x)
    y = model.forward(x)
    assert torch.equal(y if isinstance(y, torch.Tensor) else y[0], expected)
    for module in model.modules():
        if "adapters" in module._modules and isinstance(module, nn.Linear):
            hidden = torch.randn(2, 8, module.in_features, dtype=torch.float64)
            assert torch.equal(module.forward(hidden), module(hidden))


@pytest.mark.parametrize("method", ["lora", "ssf", "adaptformer", "fact", "repadapter", "vpt_deep", "prefix"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_transformers_own_checkpointing_gives_the_same_gradients(method, reentrant):
    model, x = medpeft.apply(make("hf_vit"), method), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    perturb(model).train()
    expected = gradients(model, x)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()

    assert_close(expected, gradients(model, x), tolerance=1e-9)
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin.eval(), x), output(model.eval(), x))


@pytest.mark.parametrize("method", ["fact", "repadapter", "vera", "lora"])
def test_save_pretrained_ema_and_functional_call_meet_shared_modules_once(method, tmp_path):
    from timm.utils import ModelEmaV3

    model, x = perturb(medpeft.apply(make("hf_vit"), method)), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model.save_pretrained(tmp_path)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names)) == len({id(p) for p in model.parameters()})

    ema = ModelEmaV3(model, decay=0.5)
    before = {name: p.clone() for name, p in ema.module.named_parameters()}
    perturb(model)
    ema.update(model)
    for name, p in model.named_parameters():
        torch.testing.assert_close(dict(ema.module.named_parameters())[name], (before[name] + p) / 2)
    constants = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    first = torch.func.functional_call(model, constants, (x,)).logits
    assert torch.equal(first, torch.zeros_like(first))
