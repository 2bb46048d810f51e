"""`check` finds what cannot act, says why, passes what can, and leaves the model and the random state alone."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from models import example, make, randomise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import medpeft
from medpeft.connected import connected


class Net(nn.Module):
    """Two linear layers and a head; `run` says how the second is used."""

    def __init__(self, run=None):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.run = run
        self.weights = [self.second.weight]
        randomise(self)

    def forward(self, x):
        x = self.first(x).relu()
        x = self.second(x) if self.run is None else self.run(self, x)
        return self.head(x)


class Norms(nn.Module):
    """Convolution, BatchNorm, convolution, instance norm, head."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4)
        self.head = nn.Linear(4, 2)
        randomise(self)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.head(x.mean((2, 3)))


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def adapted(run=None, method="lora", **options):
    return medpeft.apply(Net(run), method, target="linear", **options)


def failure(model, x=X, **options):
    with pytest.raises(medpeft.MedpeftError) as caught:
        medpeft.check(model, x, **options)
    return str(caught.value)


def directly(net, x):
    return net.second.forward(x)


def by_alias(net, x):
    return F.linear(x, net.weights[0])


def unused(net, x):
    return x


def discarded(net, x):
    net.second(x)
    return x


def detached(net, x):
    return net.second(x).detach()


def in_training_alone(net, x):
    return net.second(x) if net.training else x


def with_gradients_alone(net, x):
    return net.second(x) if torch.is_grad_enabled() else x


def test_a_sound_model_passes_and_the_result_counts_what_acts():
    found = medpeft.check(adapted(), X)
    assert found.tensors == 6
    assert found.parameters == sum(p.numel() for p in adapted().parameters() if p.requires_grad)
    assert str(found).startswith("6 trainable tensors (213 parameters) act in train and in eval mode")


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (directly, "second.forward is called directly, which passes its hooks by; call the layer itself, second(x)"),
        (by_alias, "the weight of second is read, but the layer is never called"),
        (unused, "second never runs: its branch is not used for this input"),
        (discarded, "second runs, but its output is not used for the output of the model"),
        (detached, "its gradient is cut off on the way"),
        (in_training_alone, "cannot act in eval mode"),
        (with_gradients_alone, "cannot act in eval mode"),
    ],
)
def test_an_adapter_that_cannot_act_is_named_with_the_reason(run, reason):
    text = failure(adapted(run))
    assert "second.adapters.lora.down, second.adapters.lora.up cannot act in " in text
    assert reason in text


def test_a_tensor_of_a_sound_layer_is_not_named():
    text = failure(adapted(unused))
    assert "first" not in text
    assert "head" not in text
    assert "2 findings" in text


def test_reentrant_checkpointing_on_frozen_inputs_is_found():
    model = medpeft.apply(Net(lambda net, x: checkpoint(net.second, x, use_reentrant=True)), "lora", target="second")
    text = failure(model)
    assert "second.adapters.lora.down, second.adapters.lora.up cannot act in train mode: reentrant checkpointing" in text
    assert "use_reentrant=False" in text


def test_checkpointing_that_is_not_reentrant_passes():
    model = medpeft.apply(Net(lambda net, x: checkpoint(net.second, x, use_reentrant=False)), "lora", target="second")
    assert medpeft.check(model, X).tensors == 4


def test_an_eval_path_that_fake_tensors_do_not_show_is_found_on_real_values():
    def run(net, x):
        # Asking for a value, so that fake tensors cannot follow.
        fast = bool(x.sum() < 1e9) and not net.training and not torch.is_grad_enabled()
        return x if fast else net.second(x)

    text = failure(adapted(run))
    assert "second.adapters.lora.up cannot act in eval mode: without gradients (torch.no_grad)" in text


def test_control_flow_that_depends_on_values_is_checked_on_real_values_with_a_note():
    found = medpeft.check(adapted(lambda net, x: net.second(x) if bool(x.sum() < 1e9) else x), X)
    assert found.tensors == 6
    assert "real values alone were checked: Net does not run on fake tensors" in found.notes[0]


def test_a_zero_initialised_norm_is_named():
    model = timm.create_model("resnet18", num_classes=3, channels=(8, 8, 8, 8))
    text = failure(medpeft.apply(model, "tsa"), torch.randn(2, 3, 32, 32))
    assert "layer1.0.conv1.adapters.tsa.alpha, layer1.0.conv2.adapters.tsa.alpha cannot act in train and eval mode" in text
    assert "layer1.0.bn2.weight is frozen and all zeros (a zero-initialised norm, as in a fresh model)" in text


def test_a_zero_initialised_norm_is_named_for_its_own_adapter_too():
    text = failure(medpeft.apply(timm.create_model("resnet18", num_classes=3, channels=(8, 8, 8, 8)), "ssf"), IMAGES)
    assert "layer2.1.bn2.adapters.ssf.scale cannot act in train and eval mode: layer2.1.bn2.weight is frozen" in text


def test_a_tiny_layer_scale_does_not_pass_for_a_zero():
    model = timm.create_model("convnext_atto", num_classes=3, depths=(1, 1, 1, 1), dims=(4, 8, 8, 12), ls_init_value=1e-6)
    model = medpeft.apply(model, "ssf")
    assert not medpeft.check(model, torch.randn(2, 3, 32, 32)).exempt


def test_an_adapter_that_a_batchnorm_normalises_away_is_named(own_registry):
    @medpeft.register("shift_for_this_test")
    class Shift(medpeft.Adapter):
        """A shift of a convolution's output."""

        layers = (nn.Conv2d,)

        def __init__(self, site):
            super().__init__(site)
            self.shift = nn.Parameter(torch.zeros(site.host.shape[0]))

        def forward(self, x, y):
            return y + self.shift[:, None, None]

    model = medpeft.apply(Norms(), "shift_for_this_test", batchnorm="adapt")
    text = failure(model, IMAGES)
    assert "conv1.adapters.shift_for_this_test.shift cannot act in train mode: bn1 (BatchNorm2d) behind it" in text
    assert "shift_for_this_test.shift cannot act in train and eval mode: norm2 (InstanceNorm2d) behind it" in text
    medpeft.remove(model)


def test_a_selected_bias_that_a_norm_cancels_is_exempt():
    found = medpeft.check(medpeft.apply(Norms(), "full"), IMAGES)
    assert found.exempt == {
        "conv1.bias": "bn1 (BatchNorm2d) behind it normalises it away",
        "conv2.bias": "norm2 (InstanceNorm2d) behind it normalises it away",
    }
    assert "exempt: conv1.bias: bn1" in str(found)


@pytest.mark.parametrize("method", ["bitfit", "ssf"])
def test_the_bias_of_a_key_is_exempt_because_the_softmax_cancels_it(method):
    found = medpeft.check(medpeft.apply(make("hf_vit", torch.float32), method), example("hf_vit", torch.float32))
    assert len(found.exempt) == 2
    assert all("k_proj" in name and "softmax" in reason for name, reason in found.exempt.items())


@pytest.mark.parametrize("name", ["resnet", "vit", "beit", "eva02", "swinv2", "transformer_encoder", "multihead_attention"])
@pytest.mark.parametrize("method", ["lora", "ssf", "norm", "svdiff", "adaptformer", "tsa"])
def test_every_method_passes_on_models_of_every_kind(name, method):
    model = make(name, torch.float32)
    try:
        medpeft.apply(model, method, head=None)
    except medpeft.MedpeftError:
        pytest.skip(f"{method} does not fit {name}")
    found = medpeft.check(model, example(name, torch.float32))
    assert not found.exempt
    assert not found.notes


def test_an_input_without_variation_is_replaced_by_noise():
    model = medpeft.apply(make("resnet", torch.float32), "full")
    assert medpeft.check(model, torch.zeros(2, 3, 32, 32)).tensors > 20


class Masked(nn.Module):
    """A weighting of tokens that a float mask of ones lets through, scores far below every other where it is 0."""

    def __init__(self):
        super().__init__()
        self.score, self.head = nn.Linear(6, 1), nn.Linear(6, 3)
        randomise(self)

    def forward(self, x, mask):
        scores = self.score(x)[..., 0] + 10_000 * (mask - 1)
        return self.head((scores.softmax(-1)[..., None] * x).sum(1))


def test_a_mask_of_ones_is_left_as_it_is():
    model = medpeft.apply(Masked(), "lora", target="score", rank=1)
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))

    assert medpeft.check(model, (x, torch.ones(2, 5))).tensors == 4


def test_dropped_branches_are_tried_again():
    options = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 16, "num_heads": 2, "drop_path_rate": 0.6}
    model = randomise(timm.create_model("vit_tiny_patch16_224", num_classes=3, **options))
    medpeft.check(medpeft.apply(model, "lora"), torch.randn(1, 3, 32, 32))


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None
    count: int = 0


class Wrapped(Net):
    """A model with keyword inputs and a nested output."""

    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, pixels, mask=None):
        logits = super().forward(pixels)
        return self.wrap(logits if mask is None else logits * mask)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: Output(y, (y.detach(),)),
        lambda y: {"logits": y, "ids": y.argmax(-1)},
        lambda y: (None, [y]),
        lambda y: [{"a": Output(y)}],
        lambda y: torch.view_as_complex(torch.stack([y, y], -1)),
    ],
)
@pytest.mark.parametrize("inputs", [X, (X, torch.ones(3)), {"pixels": X, "mask": torch.ones(3)}])
def test_any_nesting_of_inputs_and_outputs_is_followed(wrap, inputs):
    model = medpeft.apply(Wrapped(wrap), "lora", target="linear", head="head")
    assert medpeft.check(model, inputs).tensors == 6


def test_hugging_face_outputs_and_keyword_inputs_are_followed():
    model = medpeft.apply(make("hf_vit", torch.float32), "lora")
    assert medpeft.check(model, {"pixel_values": example("hf_vit", torch.float32)}).tensors > 8


def test_a_model_without_floating_point_outputs_is_refused():
    model = medpeft.apply(Wrapped(lambda y: y.argmax(-1)), "lora", target="linear", head="head")
    assert "returned Tensor without a floating-point tensor in it" in failure(model)


def test_a_model_that_does_not_run_on_the_input_is_refused_with_its_own_error():
    assert "Net does not run on example_input in train mode: RuntimeError:" in failure(adapted(), X[:, :3])


def test_an_optimizer_built_before_apply_is_found():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    text = failure(medpeft.apply(model, "lora", target="linear"), optimizer=optimizer)
    assert (
        "first.adapters.lora.down, first.adapters.lora.up, second.adapters.lora.down, second.adapters.lora.up is not in" in text
    )
    assert "build it after apply, from medpeft.parameter_groups" in text
    assert "head" not in text


def test_an_optimizer_that_holds_a_replaced_head_is_found():
    model = adapted()
    optimizer = torch.optim.SGD(medpeft.parameter_groups(model, lr=0.1))
    assert medpeft.check(model, X, optimizer=optimizer).tensors == 6
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    assert "head.weight is not in the optimizer (it holds a replaced one of the same shape)" in failure(
        model, optimizer=optimizer
    )


def test_conversion_to_syncbatchnorm_after_apply_is_found():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(medpeft.apply(Norms(), "ssf"))
    text = failure(model, IMAGES)
    assert "bn1 (SyncBatchNorm) would change its frozen statistics in training: convert (to SyncBatchNorm) first" in text
    assert "bn1 has lost the hook of its adapters" in text


def test_batchnorms_that_adapt_may_change():
    assert medpeft.check(medpeft.apply(Norms(), "bn", batchnorm="adapt"), IMAGES).tensors == 4


def test_lost_hooks_are_found():
    model = adapted()
    model.first._forward_hooks.clear()
    assert "first has lost the hook of its adapters (was the layer converted, or its hooks cleared?)" in failure(model)
    model = medpeft.apply(make("beit", torch.float32), "lora")
    model.blocks[0].attn._forward_pre_hooks.clear()
    assert "blocks.0.attn.qkv has lost the hook" in failure(model, example("beit", torch.float32))
    model = medpeft.apply(make("vit", torch.float32), "adaptformer")
    model.blocks[0].norm2._forward_pre_hooks.clear()
    model.blocks[0].mlp._forward_pre_hooks.clear()
    model.blocks[0]._forward_pre_hooks.clear()
    assert "blocks.0 has lost the hook" in failure(model, example("vit", torch.float32))


def test_a_replaced_layer_is_found():
    model = adapted()
    model.second, model.head = nn.Linear(6, 6), nn.Linear(6, 3, bias=False)
    text = failure(model)
    assert "second has lost its adapter (lora): was the layer replaced?" in text
    assert "second.weight, second.bias would train, though apply froze it" in text
    assert "head.bias was chosen by apply and is no longer there" in text


def test_frozen_parameters_that_would_train_and_trained_ones_that_are_frozen_are_found():
    model = adapted().requires_grad_(True)
    assert "first.weight, first.bias, second.weight, second.bias would train, though apply froze it" in failure(model)
    text = failure(adapted().requires_grad_(False))
    assert "head.weight, head.bias is frozen, though apply chose it to train" in text
    assert "first, second has an adapter (lora) that is frozen" in text


def test_switched_off_adapters_are_found():
    model = adapted()
    with medpeft.disabled(model):
        assert "has its adapters switched off; leave `with medpeft.disabled" in failure(model)


def test_a_buffer_that_changes_in_training_is_noted():
    class Counting(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x):
            self.steps += self.training
            return super().forward(x)

    model = medpeft.apply(Counting(), "lora", target="linear")
    assert medpeft.check(model, X).notes == ["steps, a buffer, changes in training and is not saved"]
    assert model.steps == 0


def test_an_unadapted_model_is_refused():
    assert "not adapted: call medpeft.apply(model, method) first" in failure(Net())


def test_a_model_that_cannot_be_copied_is_refused_with_the_reason():
    class Stubborn(Net):
        def __deepcopy__(self, memo):
            raise TypeError("no copies")

    assert "This Stubborn cannot be copied" in failure(medpeft.apply(Stubborn(), "lora", target="linear"))


def state_of(model):
    """Everything of a model that a check could disturb."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "values": {name: t.detach().clone() for name, t in tensors},
        "identities": [id(t) for _, t in tensors],
        "gradients": {name: None if p.grad is None else (id(p.grad), p.grad.clone()) for name, p in model.named_parameters()},
        "trains": [p.requires_grad for p in model.parameters()],
        "versions": [t._version for _, t in tensors],
        "modes": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()],
    }


def same(a, b):
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def random_states():
    return [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002


class Restless(Norms):
    """Draws from every generator, keeps a cache and fails on demand."""

    def __init__(self, fail=False):
        super().__init__()
        self.fail = fail
        self.cache = {}

    def forward(self, x):
        self.cache["x"] = x
        x = x + 0.0 * (torch.rand(()) + random.random() + np.random.rand())  # noqa: NPY002
        if self.fail and torch.is_grad_enabled() and not self.training:
            raise RuntimeError("on demand")
        return super().forward(x)


@pytest.mark.parametrize("method", ["ssf", "svdiff", "bn+bias", "full"])
@pytest.mark.parametrize("fail", [False, True])
def test_every_bit_of_the_model_and_of_the_random_states_stays(method, fail):
    model = medpeft.apply(Restless(fail), method)
    model.train()
    model.bn1.eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before, drawn = state_of(model), random_states()
    if fail:
        assert "RuntimeError: on demand" in failure(model, IMAGES)
    else:
        medpeft.check(model, IMAGES)
    assert same(before, state_of(model))
    assert same(drawn, random_states())
    assert model.cache == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu_passes_and_the_gpus_random_state_stays():
    model, x = adapted(lambda net, x: F.dropout(net.second(x), 0.2, net.training)).cuda(), X.cuda()
    drawn = torch.cuda.get_rng_state()
    assert medpeft.check(model, x).tensors == 6
    assert torch.equal(drawn, torch.cuda.get_rng_state())


def test_an_input_is_not_changed():
    x = X.clone()
    medpeft.check(adapted(), x)
    assert torch.equal(x, X)
    assert x.grad is None


def test_a_model_without_values_has_its_connections_checked():
    with torch.device("meta"):
        model = timm.create_model("vit_large_patch16_224", num_classes=3)
    found = medpeft.check(medpeft.apply(model, "lora"), torch.empty(1, 3, 224, 224, device="meta"))
    assert found.tensors == 50
    assert "the model has no values (meta device): connections alone were checked" in found.notes


def test_connected_lists_what_is_silent_and_prints_it():
    found = connected(adapted(unused), X)
    assert [silent.name for silent in found.silent] == ["second.adapters.lora.down", "second.adapters.lora.up"]
    assert found.silent[0].modes == ("train", "eval")
    assert str(found).startswith("4 of 6 trainable tensors are connected\n  second.adapters.lora.down in train and eval mode")


def test_connected_says_that_a_model_asks_for_values():
    model = adapted(lambda net, x: x if bool(x.sum() > 0) else net.second(x))
    with pytest.raises(medpeft.MedpeftError, match="Net does not run on fake tensors: DataDependentOutputException"):
        connected(model, X)


def test_a_function_cache_keeps_no_fake_tensor():
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = medpeft.apply(DINOv3ViTModel(DINOv3ViTConfig(**sizes, image_size=32, patch_size=8)), "lora", head=None)
    x = torch.randn(1, 3, 32, 32)
    connected(model, x)
    assert model(x).last_hidden_state.sum().isfinite()


def test_a_resnet50_takes_seconds():
    model = timm.create_model("resnet50", num_classes=3, zero_init_last=False)
    found = medpeft.check(medpeft.apply(model, "tsa"), torch.randn(2, 3, 64, 64))
    assert found.tensors == 50
