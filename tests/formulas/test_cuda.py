"""On a GPU every method computes what it computes on a CPU, merges, trains in bfloat16, and goes on from features."""

import copy

import pytest
import timm
import torch
from recipes import NEEDS, RECIPES

import medpeft

HAS = {
    "test_vit2": {"head", "layernorm", "norm", "attention", "attention blocks", "transformer blocks"},
    "resnet10t": {"head", "batchnorm", "norm", "conv blocks"},
}
PAIRS = [(name, one) for name, has in HAS.items() for one in RECIPES if NEEDS.get(one, "head") in has]
IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def device(monkeypatch):
    """Convolutions in whole float32, so that they may be compared."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return "cuda"


def adapted(name, recipe):
    """Adapt a model and move everything that trains away from where it is."""
    torch.manual_seed(0)
    method, options = RECIPES[recipe]
    model = medpeft.apply(timm.create_model(name, num_classes=2), method, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def gradients(model, images):
    """Output, and the gradients of everything that trains, on the CPU."""
    y = model(images)
    y.square().sum().backward()
    found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return y.detach().cpu(), found


def require_close(first, second):
    scale = float(second.abs().max()) + 1e-6
    assert float((first - second).abs().max()) <= 2e-3 * scale


@pytest.mark.cuda
@pytest.mark.parametrize(("name", "recipe"), PAIRS)
def test_a_gpu_computes_what_a_cpu_does(name, recipe, device):
    model = adapted(name, recipe)
    there = copy.deepcopy(model).to(device)
    y, expected = gradients(model, IMAGES)
    y_there, found = gradients(there, IMAGES.to(device))
    require_close(y_there, y)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        require_close(found[key], gradient)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:merge created")
@pytest.mark.parametrize(("name", "recipe"), PAIRS)
def test_what_merges_on_a_gpu_computes_the_same(name, recipe, device):
    model = adapted(name, recipe).to(device)
    with torch.no_grad():
        y = model(IMAGES.to(device))
        try:
            medpeft.merge(model)
        except medpeft.MedpeftError:
            pytest.skip(f"{recipe} does not merge")
        require_close(model(IMAGES.to(device)), y)


@pytest.mark.cuda
@pytest.mark.parametrize(("name", "recipe"), PAIRS)
def test_a_step_in_bfloat16_gives_every_gradient(name, recipe, device):
    model = adapted(name, recipe).to(device)
    with torch.autocast(device, torch.bfloat16):
        y = model(IMAGES.to(device))
    y.float().square().sum().backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert torch.isfinite(parameter.grad).all(), key


@pytest.mark.cuda
@pytest.mark.parametrize("name", HAS)
def test_a_model_goes_on_from_features_on_a_gpu(name, device):
    torch.manual_seed(0)
    model = medpeft.apply(timm.create_model(name, num_classes=2), "lora", depth=0.25).to(device)
    split = medpeft.prefix(model, IMAGES.to(device))
    features = split.features(IMAGES.to(device))
    assert features.device.type == device
    split.rest(features).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.cuda
@pytest.mark.parametrize("recipe", ["lora", "ssf", "lst"])
def test_a_compiled_model_computes_the_same_on_a_gpu(recipe, device):
    model = adapted("test_vit2", recipe).to(device)
    with torch.no_grad():
        require_close(torch.compile(model)(IMAGES.to(device)), model(IMAGES.to(device)))
