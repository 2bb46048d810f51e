"""A user's hooks, replaced forwards, replicas and wrappers see and do the same as on a plain model."""

import copy
import functools
import importlib
import inspect
import pickle
import types
from unittest import mock

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


class Again(nn.Module):
    """Calls itself, and reads the weight afterwards."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x, times=2):
        if times:
            x = self(x, times - 1)
        return torch.relu(nn.functional.linear(x, self.fc.weight, self.fc.bias))


class Itself(nn.Linear):
    """A layer that calls itself."""

    def forward(self, x, times=2):
        return super().forward(x) if times == 0 else self(x, times - 1).tanh()


class Several(nn.Module):
    """Reads the weights of two layers, one of which a neighbour calls."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.neighbour = nn.Sequential(self.b, nn.Tanh())

    def forward(self, x):
        x = nn.functional.linear(x, self.a.weight, self.a.bias) + nn.functional.linear(
            x, self.b.weight, self.b.bias
        )
        return self.neighbour(x)


class Shared(nn.Module):
    """One layer in two modules, of which the first calls it and the second reads its weight."""

    def __init__(self):
        super().__init__()
        layer = nn.Linear(8, 8)
        self.caller = nn.Sequential(layer)
        self.reader = Reads(layer)

    def forward(self, x):
        return self.reader(self.caller(x))


class Reads(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return nn.functional.linear(x, self.layer.weight, self.layer.bias)


BUILDS = {"again": Again, "itself": lambda: Itself(8, 8), "several": Several, "shared": Shared}
ON_WEIGHTS = (
    "svdiff",
    "dora",
)  # A layer with a forward of its own is no linear map: only its weight has a meaning.


@pytest.mark.parametrize(
    ("build", "method"),
    [
        (build, method)
        for build in BUILDS
        for method in ("lora", "svdiff", "ssf", "oft", "vera", "ia3", "dora")
        if build != "itself" or method in ON_WEIGHTS
    ],
)
def test_layers_within_themselves_and_within_each_other_compute_what_the_merged_model_does(build, method):
    model = randomise(nn.Sequential(BUILDS[build](), nn.Linear(8, 2)).double())
    x = torch.randn(3, 8, dtype=torch.float64)
    name, options = ("lora", {"dora": True}) if method == "dora" else (method, {})
    base = model(x)
    perturb(medpeft.apply(model, name, target="linear", head="1", **options), size=0.3)
    y = model(x)

    assert not torch.allclose(y, base)
    with medpeft.merged(model):
        torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-12)
    medpeft.remove(model)
    assert torch.equal(model(x), base)


def remembering(layer):
    """A forward that keeps what it returned, as for features that are computed once."""
    own, kept = layer.forward, {}

    def forward(x):
        if x not in kept:
            kept[x] = own(x)
        return kept[x]

    return forward


@pytest.mark.parametrize("method", ["ssf", "lora", "tsa", "conv_adapter"])
def test_nothing_is_written_into_what_a_replaced_forward_returns(method):
    for early in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(36, 2))
        if early:
            model[0].forward = replaced = remembering(model[0])
        medpeft.apply(model, method, head="2", target="0")
        perturb(model, size=0.5)
        if not early:
            model[0].forward = replaced = remembering(model[0])
        x = torch.randn(2, 4, 3, 3)
        with torch.no_grad():
            first = model(x).clone()
            assert torch.equal(model(x), first)
        medpeft.remove(model)
        assert model[0].forward is replaced


def test_a_weight_that_a_closure_may_hold_is_refused_with_the_reason():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(36, 2))
    model[0].forward = remembering(model[0])
    with pytest.raises(
        medpeft.MedpeftError, match="forward of 0 was replaced by a function of its own, and 'svdiff' changes"
    ):
        medpeft.apply(model, "svdiff", head="2")
    assert "adapters" not in model[0]._modules


def spelled_out(layer, x):
    return x @ layer.weight.t() + layer.bias


@pytest.mark.parametrize("method", ["svdiff", "ssf", "lora"])
@pytest.mark.parametrize(
    "bind", [types.MethodType, lambda f, layer: functools.partial(f, layer)], ids=["method", "partial"]
)
def test_a_replaced_forward_that_is_bound_to_its_layer_meets_the_adapted_weight(method, bind):
    model, x = (
        randomise(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double()),
        torch.randn(3, 4, dtype=torch.float64),
    )
    model[0].forward = bind(spelled_out, model[0])
    base = model(x)
    perturb(
        medpeft.apply(model, method, target="0", head="1", **({"dora": True} if method == "lora" else {}))
    )
    y = model(x)
    with medpeft.merged(model):
        torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-12)
    twins = [copy.deepcopy(model)]
    if bind is not types.MethodType:  # Such a method is pickled by name.
        twins.append(pickle.loads(pickle.dumps(model)))
    for twin in twins:
        assert torch.equal(twin(x), y)
    medpeft.remove(model)
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("method", ["ssf", "lora", "svdiff"])
@pytest.mark.parametrize("early", [True, False])
def test_accelerates_hooks_are_added_and_taken_off_at_any_time(method, early):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model, x = make("vit"), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    base = model(x)
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.LayerNorm))]
    if early:
        for layer in layers:
            add_hook_to_module(layer, ModelHook())
    perturb(medpeft.apply(model, method))
    expected = model(x)
    if not early:
        for layer in layers:
            add_hook_to_module(layer, ModelHook())
    assert torch.equal(model(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    for layer in layers:
        remove_hook_from_module(layer)
    assert torch.equal(model(x), expected)
    medpeft.remove(model)
    assert torch.equal(model(x), base)
    assert not any(
        "forward" in vars(layer) and isinstance(layer.forward, functools.partial) for layer in layers
    )


def cloned(tensors, devices, detach=False):
    """What torch's broadcast to several GPUs does, on one CPU."""
    return [[tensor.detach().clone() if detach else tensor.clone() for tensor in tensors] for _ in devices]


def replicas_of(model):
    """Two replicas of `nn.DataParallel`, both on the CPU."""
    module = importlib.import_module("torch.nn.parallel.replicate")
    with (
        mock.patch.object(module, "_broadcast_coalesced_reshape", cloned),
        mock.patch.object(module, "_get_device_index", lambda device, *_: device),
    ):
        return module.replicate(model, [torch.device("cpu")] * 2)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("full", "linear_probe")])
def test_replicas_of_dataparallel_compute_with_their_own_tensors(case):
    model, x = adapted(case)
    expected = output(model, x)
    replicas = replicas_of(model)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor
    for replica in replicas:
        torch.testing.assert_close(output(replica, x), expected, rtol=1e-12, atol=1e-12)


def test_a_replica_keeps_the_dtype_of_a_weight_that_its_parent_reads():
    attention = randomise(nn.MultiheadAttention(8, 2)).bfloat16()
    medpeft.apply(attention, "lora", target="out_proj", head=None)
    perturb(attention)
    x = torch.randn(3, 1, 8, dtype=torch.bfloat16)
    expected = attention(x, x, x)[0]
    for replica in replicas_of(attention):
        assert torch.equal(replica(x, x, x)[0], expected)


@pytest.mark.parametrize("method", ["lora", "oft", "ssf"])
def test_a_call_without_input_fails_as_on_the_plain_layer(method):
    layer = medpeft.apply(make("vit"), method, target="blocks.0.mlp.fc1").blocks[0].mlp.fc1
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        layer()


def test_the_model_keeps_the_signature_of_its_forward():
    model = make("hf_vit")
    before = list(inspect.signature(model.forward).parameters)
    medpeft.apply(model, "lora")
    assert list(inspect.signature(model.forward).parameters) == before
    assert list(inspect.signature(pickle.loads(pickle.dumps(model)).forward).parameters) == before


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
