"""The costs that `report` counts on fake tensors are those of a real step, and counting leaves everything alone."""

import math

import pytest
import timm
import torch
from models import example, make, output
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import medpeft
from medpeft.reports.costs import Costs, costs, full_costs


def measured(model, x):
    """A real step: operations by torch's own counter, and bytes of every storage saved that the model does not hold."""
    model.train()
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage
        return tensor

    # torch's counter has no formula for the in-place forms, which it would count as nothing.
    aten = torch.ops.aten
    formulas = dict.fromkeys((aten.addmm_, aten.baddbmm_), lambda y, a, b, **_: 2 * math.prod(a) * b[-1])
    # And it counts the gradient of a grouped convolution's weight as if every channel met every other.
    formulas[aten.convolution_backward] = lambda y, x, w, *others, **_: (
        2 * sum(others[-1][:2]) * math.prod(y) * math.prod(w[1:])
    )
    with FlopCounterMode(display=False, custom_mapping=formulas) as flops:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = output(model, x).sum()
        forward = flops.get_total_flops()
        size = sum(storage.nbytes() for storage in saved.values())
        loss.backward()
    return Costs(forward, flops.get_total_flops(), size)


def assert_close(counted, real):
    for name, value in vars(real).items():
        assert abs(getattr(counted, name) - value) <= 0.05 * value, (name, counted, real)


# What is counted are torch's operations, whichever method or model calls them. Among these pairs is every operation
# that any of these methods calls on any of these models, every method, and every model.
PAIRS = [
    *(("resnet", method) for method in ("lora", "ssf", "tsa", "svdiff", "bitfit", "full")),
    *(("vit", method) for method in ("lora", "ssf", "adaptformer", "svdiff", "bitfit", "full")),
    *(
        (name, "lora")
        for name in ("efficientnet", "convnext", "eva02", "swin", "hf_vit", "transformer_encoder")
    ),
    *(
        (name, "ssf")
        for name in ("efficientnet", "convnext", "eva02", "swin", "hf_vit", "transformer_encoder")
    ),
    ("convnext", "tsa"),
    ("eva02", "svdiff"),
    ("swin", "full"),
]


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_costs_are_those_of_a_real_step(name, method):
    x = example(name, torch.float32)
    model = medpeft.apply(make(name, torch.float32), method, head=None)
    assert_close(costs(model, x), measured(model, x))


@pytest.mark.parametrize("name", ["resnet", "vit", "transformer_encoder"])
def test_costs_of_full_fine_tuning_are_those_of_the_unadapted_model(name):
    x = example(name, torch.float32)
    plain = make(name, torch.float32).requires_grad_(True)
    adapted = medpeft.apply(make(name, torch.float32), "lora", head=None)
    assert full_costs(adapted, x) == costs(plain, x)
    assert_close(full_costs(adapted, x), measured(plain, x))


def test_counts_agree_with_counting_by_hand():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    found = costs(model, torch.randn(5, 8))
    forward = 2 * 5 * (8 * 16 + 16 * 4)
    # Backward: both weights' gradients, and the second layer's input's.
    assert found.forward_flops == forward
    assert found.training_flops == 2 * forward + 2 * 5 * 16 * 4
    # Kept: the input, and what ReLU returns.
    assert found.saved_bytes == 4 * 5 * (8 + 16)


def test_a_grouped_convolution_counts_the_products_within_its_groups():
    found = costs(nn.Conv2d(6, 12, 3, groups=3, padding=1), torch.randn(2, 6, 5, 5))
    forward = 2 * 2 * 25 * 12 * (6 // 3) * 9
    # Backward: as many for the gradient of the weight; that of the input is not asked for.
    assert (found.forward_flops, found.training_flops) == (forward, 2 * forward)


def test_a_transposed_convolution_counts_its_products_at_the_places_of_its_input():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2))
    found = costs(model, torch.randn(2, 3, 5, 5))
    first, second = 2 * 2 * 25 * 3 * 6, 2 * 2 * 25 * 6 * (4 // 2) * 4
    assert (found.forward_flops, found.training_flops) == (first + second, 2 * first + 3 * second)


def test_a_storage_that_several_operations_keep_counts_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            return self.a(x) + self.b(x.view(5, 8))

    assert costs(Twice(), torch.randn(5, 8)).saved_bytes == 4 * 5 * 8


def test_checkpointing_shows_in_the_bytes():
    class Deep(nn.Module):
        def __init__(self, recompute):
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
            self.recompute = recompute

        def forward(self, x):
            return checkpoint(self.layers, x, use_reentrant=False) if self.recompute else self.layers(x)

    x = torch.randn(5, 8)
    kept, recomputed = costs(Deep(recompute=False), x), costs(Deep(recompute=True), x)
    assert recomputed.saved_bytes < kept.saved_bytes / 2
    assert recomputed.forward_flops == kept.forward_flops
    assert recomputed.training_flops > kept.training_flops


def test_a_model_on_the_meta_device_costs_the_same():
    x = torch.empty(1, 3, 32, 32)
    build = {"num_classes": 3, "img_size": 32, "patch_size": 8}
    real = medpeft.apply(timm.create_model("vit_tiny_patch16_224", **build), "lora")
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", **build)
    assert costs(medpeft.apply(model, "lora"), x.to("meta")) == costs(real, x)


def test_counting_leaves_the_model_and_the_random_state_alone():
    model = medpeft.apply(make("resnet", torch.float32), "ssf").train()
    before = {name: t.clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    modes, drawn = [m.training for m in model.modules()], torch.get_rng_state()
    medpeft.report(model, example_input=example("resnet", torch.float32))
    assert all(
        torch.equal(t, before[name]) for name, t in (*model.named_parameters(), *model.named_buffers())
    )
    assert all(p.grad is None for p in model.parameters())
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(drawn, torch.get_rng_state())


def test_report_compares_with_full_fine_tuning_when_given_an_input():
    model = medpeft.apply(make("vit", torch.float32), "bitfit")
    x = example("vit", torch.float32)
    found = medpeft.report(model, example_input=x)
    assert found.costs == costs(model, x)
    assert found.full_costs == full_costs(model, x)
    assert found.costs.training_flops < 0.75 * found.full_costs.training_flops
    assert found.costs.saved_bytes < found.full_costs.saved_bytes
    assert "saved for backward" in str(found)
    assert "% of full fine-tuning's" in found.to_markdown()
    assert found.to_dict()["full_costs"]["forward_flops"] == found.full_costs.forward_flops


def test_report_without_an_input_has_no_costs():
    found = medpeft.report(medpeft.apply(make("vit", torch.float32), "bitfit"))
    assert found.costs is None
    assert found.to_dict()["costs"] is None
    assert "FLOPs" not in str(found)


def test_report_takes_tuples_and_mappings():
    model = medpeft.apply(make("hf_vit", torch.float32), "lora")
    x = example("hf_vit", torch.float32)
    assert (
        medpeft.report(model, example_input={"pixel_values": x}).costs
        == medpeft.report(model, example_input=(x,)).costs
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_gets_the_same_costs(mode):
    model = medpeft.apply(make("vit", torch.float32), "lora")
    found = medpeft.report(model, example_input=example("vit", torch.float32))
    with mode():
        assert medpeft.report(model, example_input=example("vit", torch.float32)) == found


def test_a_model_that_asks_for_values_is_refused_with_the_reason():
    class Asks(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if bool(x.sum() > 0) else x

    model = medpeft.apply(Asks(nn.Linear(4, 4), nn.Linear(4, 2)), "linear_probe", head="1")
    with pytest.raises(
        medpeft.MedpeftError, match="Asks does not run on fake tensors: DataDependentOutputException"
    ):
        medpeft.report(model, example_input=torch.ones(1, 4))
