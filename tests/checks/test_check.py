"""`check` finds what cannot act, says why, and passes what can."""

import pytest
import timm
import torch
import torch.nn.functional as F
from checked import IMAGES, Net, Norms, X, adapted, failure, unused
from models import example, make, randomise
from torch import nn
from torch.utils.checkpoint import checkpoint

import medpeft


def directly(net, x):
    return net.second.forward(x)


def by_alias(net, x):
    return F.linear(x, net.weights[0])


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


def test_a_layer_whose_forward_is_called_directly_is_adapted_too():
    assert medpeft.check(adapted(directly), X).tensors == 6


@pytest.mark.parametrize(
    ("run", "reason"),
    [
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
    model = medpeft.apply(
        Net(lambda net, x: checkpoint(net.second, x, use_reentrant=True)), "lora", target="second"
    )
    text = failure(model)
    assert (
        "second.adapters.lora.down, second.adapters.lora.up cannot act in train mode: reentrant checkpointing"
        in text
    )
    assert "use_reentrant=False" in text


def test_checkpointing_that_is_not_reentrant_passes():
    model = medpeft.apply(
        Net(lambda net, x: checkpoint(net.second, x, use_reentrant=False)), "lora", target="second"
    )
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
    assert (
        "layer1.0.conv1.adapters.tsa.alpha, layer1.0.conv2.adapters.tsa.alpha cannot act in train and eval mode"
        in text
    )
    assert (
        "layer1.0.bn2.weight is frozen and all zeros (a zero-initialised norm, as in a fresh model)" in text
    )


def test_a_zero_initialised_norm_is_named_for_its_own_adapter_too():
    text = failure(
        medpeft.apply(timm.create_model("resnet18", num_classes=3, channels=(8, 8, 8, 8)), "ssf"), IMAGES
    )
    assert (
        "layer2.1.bn2.adapters.ssf.scale cannot act in train and eval mode: layer2.1.bn2.weight is frozen"
        in text
    )


def test_a_tiny_layer_scale_does_not_pass_for_a_zero():
    model = timm.create_model(
        "convnext_atto", num_classes=3, depths=(1, 1, 1, 1), dims=(4, 8, 8, 12), ls_init_value=1e-6
    )
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
    assert (
        "conv1.adapters.shift_for_this_test.shift cannot act in train mode: bn1 (BatchNorm2d) behind it"
        in text
    )
    assert (
        "shift_for_this_test.shift cannot act in train and eval mode: norm2 (InstanceNorm2d) behind it"
        in text
    )
    medpeft.remove(model)


def test_a_selected_bias_that_a_norm_cancels_is_exempt():
    found = medpeft.check(medpeft.apply(Norms(), "full"), IMAGES)
    assert found.exempt == {
        "conv1.bias": "bn1 (BatchNorm2d) behind it normalises it away",
        "conv2.bias": "norm2 (InstanceNorm2d) behind it normalises it away",
    }
    assert "exempt: conv1.bias: bn1" in str(found)


@pytest.mark.parametrize(("method", "shift"), [("ssf", "0.adapters.ssf.shift"), ("bias", "0.bias")])
def test_a_shift_that_a_groupnorm_of_single_channels_cancels_is_exempt(method, shift):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(8, 8), nn.ReLU(), nn.AvgPool2d(6), nn.Flatten(), nn.Linear(8, 2)
    )
    found = medpeft.check(medpeft.apply(model, method, head="5"), IMAGES)
    assert found.exempt == {shift: "1 (GroupNorm) behind it normalises it away"}


@pytest.mark.parametrize("method", ["bitfit", "ssf"])
def test_the_bias_of_a_key_is_exempt_because_the_softmax_cancels_it(method):
    found = medpeft.check(
        medpeft.apply(make("hf_vit", torch.float32), method), example("hf_vit", torch.float32)
    )
    assert len(found.exempt) == 2
    assert all("k_proj" in name and "softmax" in reason for name, reason in found.exempt.items())


@pytest.mark.parametrize(
    "name", ["resnet", "vit", "beit", "eva02", "swinv2", "transformer_encoder", "multihead_attention"]
)
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


def test_dropped_branches_are_tried_again():
    options = {
        "img_size": 32,
        "patch_size": 8,
        "depth": 3,
        "embed_dim": 16,
        "num_heads": 2,
        "drop_path_rate": 0.6,
    }
    model = randomise(timm.create_model("vit_tiny_patch16_224", num_classes=3, **options))
    medpeft.check(medpeft.apply(model, "lora"), torch.randn(1, 3, 32, 32))


def test_a_resnet50_takes_seconds():
    model = timm.create_model("resnet50", num_classes=3, zero_init_last=False)
    found = medpeft.check(medpeft.apply(model, "tsa"), torch.randn(2, 3, 64, 64))
    assert found.tensors == 50
