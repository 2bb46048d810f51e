"""Every method against its formula, written out in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import medpeft

D = torch.float64


def layer_in(layer, method, *, x, **options):
    """The adapted layer in a model of its own, with random adapter values, and the plain layer's output."""
    torch.manual_seed(0)
    model = nn.Sequential(layer.to(D)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
        plain = model(x)
    medpeft.apply(model, method, head=None, **options)
    adapter = next(iter(layer.adapters.values()))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p))
    return model, adapter, plain


def agrees(found, expected):
    np.testing.assert_allclose(np.asarray(found.detach()), np.asarray(expected), rtol=1e-12, atol=1e-12)


def randn(*shape):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(3))


def numpy_conv(x, w, b, stride, padding, dilation, groups):
    """A 2-d convolution as a loop over its taps."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    n, _, height, width = x.shape
    out_channels, per_group, k, _ = w.shape
    h = (height - dilation * (k - 1) - 1) // stride + 1
    v = (width - dilation * (k - 1) - 1) // stride + 1
    y = np.zeros((n, out_channels, h, v)) + (0 if b is None else b[None, :, None, None])
    outs = out_channels // groups
    for g in range(groups):
        own_in, own_out = slice(g * per_group, (g + 1) * per_group), slice(g * outs, (g + 1) * outs)
        for i in range(k):
            for j in range(k):
                patch = x[:, own_in, i * dilation :, j * dilation :][:, :, ::stride, ::stride][:, :, :h, :v]
                y[:, own_out] += np.einsum("oi,nihw->nohw", w[own_out, :, i, j], patch)
    return y


@pytest.mark.parametrize(("stride", "dilation", "groups"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 1, 2), (1, 1, 4)])
def test_tsa_adds_a_strided_1x1_convolution(stride, dilation, groups):
    x = randn(2, 4, 9, 9)
    conv = nn.Conv2d(4, 8, 3, stride, dilation, dilation, groups)
    model, adapter, _ = layer_in(conv, "tsa", x=x, target="*")
    w, b = conv.weight.detach().numpy(), conv.bias.detach().numpy()
    expected = numpy_conv(x.numpy(), w, b, stride, dilation, dilation, groups)
    alpha, per_group = adapter.alpha.detach().numpy(), 4 // groups
    for o in range(8):
        g = o // (8 // groups)
        inputs = x.numpy()[:, g * per_group : (g + 1) * per_group, ::stride, ::stride]
        expected[:, o] += np.einsum("i,nihw->nhw", alpha[o], inputs)
    agrees(model(x), expected)


def test_tsa_as_a_vector_scales_every_channel_of_the_input():
    x = randn(2, 6, 7, 7)
    model, adapter, plain = layer_in(nn.Conv2d(6, 6, 3, 2, 1), "tsa", x=x, target="*", form="vector")
    agrees(model(x), plain + adapter.alpha.detach()[:, None, None] * x[:, :, ::2, ::2])


def test_tsa_in_series_mixes_the_output():
    x = randn(2, 3, 5, 5)
    model, adapter, plain = layer_in(nn.Conv2d(3, 4, 3), "tsa", x=x, target="*", form="series")
    mixed = torch.einsum("oi,nihw->nohw", torch.eye(4, dtype=D) + adapter.alpha.detach(), plain)
    agrees(model(x), mixed + adapter.bias.detach()[:, None, None])


def test_tsa_starts_from_the_official_identity_when_asked():
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1))
    medpeft.apply(model, "tsa", head=None, target="*", init="eye")
    assert torch.equal(model[0].adapters["tsa"].alpha, 1e-4 * torch.eye(5, 3))


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        (nn.Linear(6, 5), (2, 3, 6), -1),
        (nn.Conv1d(4, 6, 3), (2, 4, 8), 1),
        (nn.Conv2d(4, 8, 3, padding=1), (2, 4, 8, 8), 1),  # Width and channels of the same size.
        (nn.Conv3d(2, 4, 3), (1, 2, 5, 5, 4), 1),
        (nn.ConvTranspose2d(4, 6, 2, 2, groups=2), (2, 4, 3, 3), 1),
        (nn.LayerNorm(7), (2, 7, 7), -1),
        (nn.BatchNorm2d(5), (3, 5, 4, 5), 1),
        (nn.GroupNorm(2, 6), (2, 6, 6, 6), 1),
        (nn.InstanceNorm2d(4, affine=True), (2, 4, 4, 4), 1),
        (nn.InstanceNorm2d(4), (2, 4, 4, 4), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_ssf_scales_and_shifts_the_channels_of_the_output(layer, shape, axis):
    x = randn(*shape)
    model, adapter, plain = layer_in(layer, "ssf", x=x)
    broadcast = [1] * plain.ndim
    broadcast[axis] = -1
    agrees(model(x), plain * adapter.scale.detach().view(broadcast) + adapter.shift.detach().view(broadcast))


def test_ssf_inside_a_fused_norm_comes_before_the_activation():
    from timm.layers import BatchNormAct2d

    x = randn(2, 5, 4, 4)
    norm = BatchNormAct2d(5)
    model, adapter, _ = layer_in(norm, "ssf", x=x)
    plain = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    expected = (plain * adapter.scale[:, None, None] + adapter.shift[:, None, None]).relu()
    agrees(model(x), expected.detach())


def test_ssf_keeps_its_gradients_right_where_a_scale_is_near_zero():
    x = randn(4, 6).requires_grad_()
    for smallest in (1.0, 0.0, 1e-9):
        model, adapter, _ = layer_in(nn.Linear(6, 5), "ssf", x=x)
        with torch.no_grad():
            adapter.scale[0] = smallest
        y = F.linear(x, model[0].weight, model[0].bias).detach()
        weights = randn(4, 5)
        adapter.scale.grad = adapter.shift.grad = None
        (model(x) * weights).sum().backward()
        agrees(adapter.scale.grad, (weights * y).sum(0))
        agrees(adapter.shift.grad, weights.sum(0))


@pytest.mark.parametrize("options", [{}, {"alpha": 3.0}, {"rslora": True}, {"alpha": 4.0, "rslora": True}])
def test_lora_adds_a_scaled_low_rank_product(options):
    x = randn(2, 3, 6)
    linear = nn.Linear(6, 5)
    model, adapter, plain = layer_in(linear, "lora", x=x, target="*", rank=2, **options)
    scale = options.get("alpha", 2) / (2**0.5 if options.get("rslora") else 2)
    agrees(model(x), plain + scale * x @ adapter.down.detach().T @ adapter.up.detach().T)


@pytest.mark.parametrize("parts", ["q", "qv", "qkv", "kv"])
def test_lora_on_a_fused_projection_has_its_own_matrices_for_every_part(parts):
    from timm.layers import Attention

    x = randn(2, 4, 6)
    attention = Attention(6, num_heads=2, qkv_bias=True)
    torch.manual_seed(0)
    model = nn.Sequential(attention.to(D)).eval()
    medpeft.apply(model, "lora", head=None, rank=2, parts=parts)
    adapter = attention.qkv.adapters["lora"]
    nn.init.normal_(adapter.up)
    change = torch.zeros(18, 6, dtype=D)
    for i, part in enumerate(parts):
        row = "qkv".index(part) * 6
        change[row : row + 6] = adapter.up.detach()[6 * i : 6 * i + 6] @ adapter.down.detach()[2 * i : 2 * i + 2]
    expected = F.linear(x, attention.qkv.weight + change, attention.qkv.bias)
    agrees(attention.qkv(x), expected.detach())
    before = attention.qkv.weight.detach().clone()
    with medpeft.merged(model):
        agrees(attention.qkv.weight - before, change)


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (1, 2), (2, 1), (4, 2)])
def test_lora_on_a_convolution_equals_one_convolution_with_the_summed_weight(groups, stride):
    x = randn(2, 4, 7, 7)
    conv = nn.Conv2d(4, 8, 3, stride, 1, groups=groups)
    model, adapter, _ = layer_in(conv, "lora", x=x, rank=3)
    weight = conv.weight + (adapter.up @ adapter.down).view_as(conv.weight)
    expected = numpy_conv(x.numpy(), weight.detach().numpy(), conv.bias.detach().numpy(), stride, 1, 1, groups)
    agrees(model(x), expected)


def test_lora_on_an_embedding_moves_its_rows():
    index = torch.tensor([[1, 4], [0, 2]])
    table = nn.Embedding(6, 5)
    torch.manual_seed(0)
    model = nn.Sequential(table.to(D))
    medpeft.apply(model, "lora", head=None, target="embedding", rank=2)
    adapter = table.adapters["lora"]
    nn.init.normal_(adapter.up)
    agrees(model(index), (table.weight + adapter.up @ adapter.down)[index].detach())


def test_dora_learns_the_norm_of_every_row():
    x = randn(3, 6)
    linear = nn.Linear(6, 5)
    model, adapter, _ = layer_in(linear, "lora", x=x, target="*", rank=2, dora=True)
    direction = linear.weight.detach() + adapter.up.detach() @ adapter.down.detach()
    weight = adapter.magnitude.detach()[:, None] * direction / direction.norm(dim=1, keepdim=True)
    agrees(model(x), x @ weight.T + linear.bias.detach())


def test_doras_norm_is_a_constant_in_backward():
    x = randn(3, 6)
    linear = nn.Linear(6, 5)
    model, adapter, _ = layer_in(linear, "lora", x=x, target="*", rank=2, dora=True)
    model(x).square().sum().backward()
    up = adapter.up.detach().clone().requires_grad_()
    direction = linear.weight.detach() + up @ adapter.down.detach()
    norm = direction.detach().norm(dim=1)
    weight = (adapter.magnitude.detach() / norm)[:, None] * direction
    F.linear(x, weight, linear.bias.detach()).square().sum().backward()
    agrees(adapter.up.grad, up.grad)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_lora_from_the_weight_trains_its_leading_part_and_keeps_its_bits(init):
    torch.manual_seed(0)
    linear = nn.Linear(8, 6).to(D)
    model, weight = nn.Sequential(linear), linear.weight.detach().clone()
    x = randn(4, 8)
    plain = model(x).detach()
    medpeft.apply(model, "lora", head=None, target="*", rank=2, init=init)
    adapter = linear.adapters["lora"]
    assert torch.equal(linear.weight, weight)
    assert torch.equal(model(x), plain)
    product = (adapter.scale * adapter.up @ adapter.down).detach()
    if init == "pissa":
        left, values, right = np.linalg.svd(weight.numpy())
        agrees(product, (left[:, :2] * values[:2]) @ right[:2])
    else:
        q, r = np.linalg.qr(weight.numpy())
        agrees(product, q[:, :2] @ r[:2])
    start = product.clone()
    with torch.no_grad():
        adapter.up.add_(randn(6, 2))
    agrees(model(x), x @ (weight - start + adapter.scale * (adapter.up @ adapter.down)).detach().T + linear.bias.detach())


def test_lora_with_a_frozen_trains_b_alone():
    model = nn.Sequential(nn.Linear(6, 5))
    medpeft.apply(model, "lora", head=None, target="*", freeze_a=True)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.adapters.lora.up"]


def test_lora_drops_out_elements_of_its_input_in_training_alone():
    x = randn(64, 6)
    model, _, _ = layer_in(nn.Linear(6, 5), "lora", x=x, target="*", rank=2, dropout=0.5)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(6, 5), (3, 6)), (nn.Conv2d(4, 6, 3), (2, 4, 5, 5)), (nn.Conv1d(4, 4, 3, groups=2), (2, 4, 5))],
)
def test_svdiff_shifts_the_singular_values(layer, shape, scale):
    x = randn(*shape)
    model, adapter, _ = layer_in(layer, "svdiff", x=x, scale=scale)
    weight = layer.weight.detach().numpy()
    left, values, right = np.linalg.svd(weight.reshape(len(weight), -1), full_matrices=False)
    shifted = np.maximum(values + scale * adapter.delta.detach().numpy(), 0)
    new = torch.from_numpy((left * shifted) @ right).view_as(layer.weight)
    found = model(x)
    medpeft.remove(model)
    with torch.no_grad():
        layer.weight.copy_(new)
    agrees(found, model(x).detach())


def test_svdiff_counts_a_norm_as_one_singular_value():
    x = randn(3, 6)
    model, adapter, _ = layer_in(nn.LayerNorm(6), "svdiff", x=x, norms=True)
    assert adapter.delta.shape == (1,)
    norm = model[0]
    size = norm.weight.detach().norm()
    new = norm.weight.detach() * (size + adapter.delta.detach()).clamp(min=0) / size
    agrees(model(x), F.layer_norm(x, (6,), new, norm.bias.detach()))


def vit_block(x, block, change, where):
    """A timm ViT block from its pieces, with `change` added for the residual stream or the normed input of the MLP."""
    x = x + block.ls1(block.attn(block.norm1(x)))
    normed = block.norm2(x)
    return x + block.ls2(block.mlp(normed)) + change(x if where == "residual" else normed)


@pytest.mark.parametrize("where", ["residual", "norm"])
@pytest.mark.parametrize("scale", [0.1, "learnable"])
def test_adaptformer_adds_a_bottleneck_outside_layer_scale(where, scale):
    from timm.models.vision_transformer import Block

    torch.manual_seed(0)
    block = Block(12, 2, init_values=1e-5).to(D)
    model = nn.Sequential(block).eval()
    x = randn(2, 5, 12)
    medpeft.apply(model, "adaptformer", head=None, bottleneck=4, input=where, scale=scale)
    adapter = block.adapters["adaptformer"]
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p))
    found = model(x).detach()
    own = {name: p.detach() for name, p in adapter.named_parameters()}
    size = own.get("scale", 0.1)

    def change(z):
        return size * ((z @ own["down"].T + own["down_bias"]).relu() @ own["up"].T + own["up_bias"])

    medpeft.remove(model)
    agrees(found, vit_block(x, block, change, where).detach())
