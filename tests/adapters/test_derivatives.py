"""Second derivatives and forward-mode derivatives of adapted layers are those of the plain expression."""

import pytest
import torch
from models import randomise, randomise_adapters
from single_layers import LAYERS, OPTIONS, Block, Holder, drawn
from torch import nn
from torch.autograd import forward_ad

import medpeft

BLOCK_METHODS = "adapter_plus adaptformer convpass difffit houlsby mona pfeiffer prefix vpt_deep vpt_shallow"
KINDS = ("linear", "conv2d", "conv2d, grouped", "transposed 1d", "layer norm")
CASES = [(layer, method) for layer in KINDS for method in LAYERS[layer][2].split()]
CASES += [("block", method) for method in (*BLOCK_METHODS.split(), "lora+ssf+bias", "ia3+oft")]


def adapted(layer, method):
    """An adapted layer in training, away from its start, and an input for it."""
    if layer == "block":
        model, shape, places = nn.Sequential(Block(True)), (2, 9, 8), {}
    else:
        build, shape, _ = LAYERS[layer]
        model, places = Holder(build()), {"target": "*"}
    model = randomise(model.double())
    medpeft.apply(model, method, head=None, **places, **OPTIONS.get(method, {}))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "drop_path"):
            module.drop_path = 0.0
    return randomise_adapters(model, size=0.2), drawn((2, *shape[1:]))


def directions(model, x):
    """The names and values of what trains, and a direction for each and for x."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(7)

    def direction(like):
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    return trained, {name: direction(p) for name, p in trained.items()}, direction(x)


def moved(values, along, step):
    return {name: value + step * along[name] for name, value in values.items()}


@pytest.mark.parametrize(("layer", "method"), CASES)
def test_a_penalty_on_the_gradient_of_the_input_has_the_gradient_of_its_differences(layer, method):
    model, x = adapted(layer, method)
    trained, along, _ = directions(model, x)

    def penalty(parameters):
        image = x.clone().requires_grad_()
        y = torch.func.functional_call(model, parameters, (image,))
        weights = torch.arange(y.numel(), dtype=y.dtype).view(y.shape).sin()
        # A loss that is linear in the output, as the logit of a class in a saliency map.
        (saliency,) = torch.autograd.grad((y * weights).sum(), image, create_graph=True)
        return saliency.square().sum() + y.square().mean()

    parameters = {name: value.clone().requires_grad_() for name, value in trained.items()}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradients = torch.autograd.grad(
            penalty(parameters), list(parameters.values()), materialize_grads=True, allow_unused=True
        )
        difference = penalty(moved(trained, along, 1e-6)) - penalty(moved(trained, along, -1e-6))

    slope = sum((gradient * along[name]).sum() for name, gradient in zip(parameters, gradients, strict=True))
    torch.testing.assert_close(slope, difference / 2e-6, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # By torch's own forward mode.
@pytest.mark.parametrize(("layer", "method"), CASES)
def test_forward_mode_has_the_slope_of_differences(layer, method):
    model, x = adapted(layer, method)
    trained, along, x_along = directions(model, x)

    def run(parameters, image):
        return torch.func.functional_call(model, parameters, (image,))

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with torch.no_grad():
            after = run(moved(trained, along, 1e-6), x + 1e-6 * x_along)
            before = run(moved(trained, along, -1e-6), x - 1e-6 * x_along)
        _, by_func = torch.func.jvp(run, (trained, x), (along, x_along))
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(value, along[name]) for name, value in trained.items()}
            by_level = forward_ad.unpack_dual(run(duals, forward_ad.make_dual(x, x_along))).tangent

    torch.testing.assert_close(by_func, (after - before) / 2e-6, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(by_level, by_func, rtol=1e-10, atol=1e-12)
