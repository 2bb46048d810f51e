"""DoRA against its formula, written out in NumPy and float64."""

import numpy as np
import pytest
import torch
from layer_oracles import applied, assert_computes, drawn, numbers
from models import make, randomise_adapters
from torch import nn

import medpeft


def test_dora_learns_the_length_of_every_row_apart_from_its_direction():
    linear, x = nn.Linear(5, 7), drawn(2, 5)
    model, _, p = applied(linear, "lora", rank=2, dora=True, alpha=3.0)

    weight, bias = numbers(linear)
    changed = weight + 1.5 * p["up"] @ p["down"]
    changed *= (p["magnitude"] / np.linalg.norm(changed, axis=1))[:, None]
    assert p["magnitude"].shape == (7,)
    assert_computes(model, x, x.numpy() @ changed.T + bias)


def test_the_gradients_of_dora_are_the_papers_with_the_length_a_constant():
    linear, x = nn.Linear(5, 7), drawn(2, 5)
    model, adapter, p = applied(linear, "lora", rank=2, dora=True, alpha=3.0)
    upstream = drawn(2, 7, seed=9)
    (model(x) * upstream).sum().backward()

    changed = numbers(linear)[0] + 1.5 * p["up"] @ p["down"]
    length = np.linalg.norm(changed, axis=1, keepdims=True)
    wrt_weight = upstream.numpy().T @ x.numpy()
    # Eq. 11 of Liu et al. (2024), arXiv 2402.09353; with the length differentiated, Eq. 6, the projection would stay in.
    wrt_direction = p["magnitude"][:, None] / length * wrt_weight
    projected = wrt_direction - (wrt_direction * changed).sum(1, keepdims=True) * changed / length**2
    expected = {
        "magnitude": (wrt_weight * changed).sum(1) / length[:, 0],
        "up": 1.5 * wrt_direction @ p["down"].T,
        "down": 1.5 * p["up"].T @ wrt_direction,
    }
    for name, gradient in expected.items():
        assert np.allclose(getattr(adapter, name).grad.numpy(), gradient, rtol=1e-12), name
    assert not np.allclose(adapter.up.grad.numpy(), 1.5 * projected @ p["down"].T, rtol=0.1)


def test_the_gradients_of_dora_are_those_of_its_parts_in_a_fused_projection():
    model = randomise_adapters(medpeft.apply(make("vit"), "lora", rank=2, dora=True), size=0.3)
    qkv, x = model.blocks[0].attn.qkv, drawn(2, 16)
    adapter, upstream = qkv.adapters["lora"], drawn(2, 48, seed=9)
    (qkv(x) * upstream).sum().backward()

    for i, part in enumerate((0, 2)):
        rows, own = slice(16 * part, 16 * part + 16), slice(16 * i, 16 * i + 16)
        down = adapter.down[2 * i : 2 * i + 2].detach()
        changed = (qkv.weight[rows] + adapter.up[own] @ down).detach()
        wrt_weight, length = upstream[:, rows].T @ x, changed.norm(dim=1)
        assert torch.allclose(adapter.magnitude.grad[own], (wrt_weight * changed).sum(1) / length, rtol=1e-12)
        factor = adapter.magnitude[own].detach() / length
        assert torch.allclose(adapter.up.grad[own], factor[:, None] * wrt_weight @ down.T, rtol=1e-12)


@pytest.mark.parametrize(
    ("base", "adapters"),
    [
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float64),
    ],
)
def test_dora_starts_as_the_base_in_every_precision_and_merges_into_it(base, adapters):
    model, x = nn.Sequential(nn.Linear(64, 64)).to(base), drawn(4, 64).to(base)
    weight, y = model[0].weight.detach().clone(), model(x)
    medpeft.apply(model, "lora", head=None, target="*", dora=True, dtype=adapters)

    assert torch.equal(model(x), y)
    medpeft.merge(model)
    assert torch.equal(model[0].weight, weight)


def test_dora_learns_a_row_of_zeros_too():
    linear, x = nn.Linear(5, 7).double(), drawn(2, 5)
    with torch.no_grad():
        linear.weight[3] = 0
    y = linear(x)
    model = medpeft.apply(nn.Sequential(linear), "lora", rank=2, dora=True, head=None, target="*")
    assert torch.equal(model(x), y)

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - 1).square().sum().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.isclose(model(x)[:, 3], y[:, 3]).any()
