"""`lst` and `dtl` beside the trunk: the formulas written out in float64, no backward through the trunk, and refusals."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from models import FAMILIES, example, make, output, randomise, randomise_adapters
from tiny_places import BasicBlock, Transformer
from torch import nn
from torch.utils.checkpoint import checkpoint
from traces import same, tensors, trace

import medpeft
from medpeft.adapters.handover import Handover


def tokens(*shape, seed=4):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapted(model, method, **options):
    model = randomise(model.double())
    plain = copy.deepcopy(model)
    medpeft.apply(model, method, head=None, **options)
    return randomise_adapters(model, size=0.5), plain


def numbers(block, method):
    return dict(block.adapters[method].named_parameters())


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def normed(p, name, g):
    centred = g - g.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]


def side_transformer(p, g, heads=1):
    q, k, v = linear(p, "side.qkv", normed(p, "side.norm1", g)).chunk(3, -1)
    mixed = []
    for part in range(heads):
        width = g.shape[-1] // heads
        mine = slice(part * width, (part + 1) * width)
        scores = q[..., mine] @ k[..., mine].mT * width**-0.5
        mixed.append(scores.softmax(-1) @ v[..., mine])
    g = g + linear(p, "side.proj", torch.cat(mixed, -1))
    return g + linear(p, "side.fc2", F.gelu(linear(p, "side.fc1", normed(p, "side.norm2", g))))


@pytest.mark.parametrize(("reduction", "heads"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("join", ["add", "replace"])
def test_lst_of_a_transformer_written_out_by_hand(join, reduction, heads):
    model, plain = adapted(Transformer(depth=3), "lst", reduction=reduction, join=join)
    x = tokens(2, 4, 8)
    with torch.no_grad():
        g = linear(numbers(model.blocks[0], "lst"), "first", x)
        y = x
        for block, adapted_block in zip(plain.blocks, model.blocks, strict=True):
            y = block(y)
            p = numbers(adapted_block, "lst")
            share = torch.sigmoid(p["gate"] / 0.1)
            g = side_transformer(p, share * g + (1 - share) * linear(p, "down", y), heads)
        change = linear(p, "up", normed(p, "norm", g))
        expected = y + change if join == "add" else change
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_lst_of_convolutions_written_out_by_hand():
    model, plain = adapted(nn.Sequential(nn.Sequential(BasicBlock(), BasicBlock())), "lst", reduction=2)
    model.eval(), plain.eval()
    x = tokens(2, 4, 6, 6)
    with torch.no_grad():
        g = linear(numbers(model[0][0], "lst"), "first", x.movedim(1, -1))
        y = x
        for block, adapted_block in zip(plain[0], model[0], strict=True):
            y = block(y)
            p = numbers(adapted_block, "lst")
            share = torch.sigmoid(p["gate"] / 0.1)
            g = share * g + (1 - share) * linear(p, "down", y.movedim(1, -1))
            image = normed(p, "side.norm", g).movedim(-1, 1)
            image = F.conv2d(image, p["side.weights.0"], p["side.biases.0"], padding=1).relu()
            g = g + F.conv2d(image, p["side.weights.1"], p["side.biases.1"], padding=1).movedim(1, -1)
        expected = y + linear(p, "up", normed(p, "norm", g)).movedim(-1, 1)
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("start", "first_join"), [(0.5, 2), (0.0, 0), (0.75, 3), (1.0, 3)])
def test_dtl_written_out_by_hand(start, first_join):
    model, plain = adapted(Transformer(depth=4), "dtl", start=start, rank=3, beta=7.0)
    x = tokens(2, 4, 8)
    with torch.no_grad():
        h, y = torch.zeros_like(x), x
        for i, (block, adapted_block) in enumerate(zip(plain.blocks, model.blocks, strict=True)):
            p = numbers(adapted_block, "dtl")
            h = h + y @ p["down"].T @ p["up"].T
            y = block(y)
            if i >= first_join:
                y = y + h * torch.sigmoid(7.0 * h)
        torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)


def test_dtl_plus_convolves_the_patches_and_passes_by_the_class_token():
    model = make("vit")
    plain = copy.deepcopy(model)
    randomise_adapters(medpeft.apply(model, "dtl", convolve=True, start=1.0), size=0.5)
    kernel = model.adapters.shared["dtl_kernel_0"].kernel
    assert kernel.shape == (16, 1, 3, 3)
    blocks = model.blocks
    with torch.no_grad():
        y = plain.norm_pre(plain.patch_drop(plain._pos_embed(plain.patch_embed(example("vit")))))
        h = torch.zeros_like(y)
        for i, block in enumerate(plain.blocks):
            p = numbers(blocks[i], "dtl")
            h = h + y @ p["down"].T @ p["up"].T
            y = block(y)
        change = h * torch.sigmoid(100 * h)
        image = change[:, 1:].mT.reshape(2, 16, 4, 4)
        convolved = F.conv2d(image, kernel, padding=1, groups=16).flatten(2).mT
        y = y + torch.cat([change[:, :1], convolved], 1)
        expected = plain.forward_head(plain.norm(y))
        torch.testing.assert_close(model(example("vit")), expected, rtol=1e-12, atol=1e-12)


def test_where_the_trunk_gets_wider_new_channels_of_dtl_are_zero_and_its_grid_is_averaged():
    model = make("resnet")
    plain = copy.deepcopy(model)
    randomise_adapters(medpeft.apply(model, "dtl", start=1.0), size=0.5)
    x, entered = example("resnet"), {}
    names = ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]
    for name in names:
        block = plain.get_submodule(name)
        block.register_forward_hook(lambda m, args, y, name=name: entered.update({name: (args[0], y)}))
    output(plain, x)
    h = 0
    for name in names:
        p = numbers(model.get_submodule(name), "dtl")
        into, y = entered[name]
        h = h + torch.einsum("cr,rd,bdhw->bchw", p["up"], p["down"], into)
        h = F.adaptive_avg_pool2d(h, y.shape[2:])
        wider = max(y.shape[1] - h.shape[1], 0)  # The stem is wider than the first stage, and is cut off.
        h = torch.cat([h[:, : y.shape[1]], h.new_zeros(len(h), wider, *h.shape[2:])], 1)
    joined = []
    model.layer4[0].register_forward_hook(lambda m, args, y: joined.append(y))
    output(model, x)
    torch.testing.assert_close(joined[0], y + h * torch.sigmoid(100 * h), rtol=1e-12, atol=1e-12)


def test_windows_of_the_ladder_attend_within_themselves_and_a_grid_that_they_do_not_fill_is_padded():
    model = medpeft.apply(make("swin"), "lst", reduction=2)
    side = randomise(model.layers[0].blocks[0].adapters["lst"].side)
    grid = tokens(2, 6, 5, 4)
    with torch.no_grad():
        got = side._attended(grid)
        padded = F.pad(grid, (0, 0, 0, 3, 0, 2))
        for row in (0, 4):
            for column in (0, 4):
                window = padded[:, row : row + 4, column : column + 4].flatten(1, 2)
                expected = side._among(window).unflatten(1, (4, 4))
                inside = got[:, row : row + 4, column : column + 4]
                torch.testing.assert_close(inside, expected[:, : inside.shape[1], : inside.shape[2]])


FITTING = ["vit", "swin", "convnext", "resnet", "hf_vit", "torchvision_swin", "monai_vit", "clip_vision"]


@pytest.mark.parametrize(("method", "options"), [("lst", {"reduction": 2}), ("dtl", {"start": 1.0})])
@pytest.mark.parametrize("family", FITTING)
def test_nothing_of_the_trunk_has_a_backward(family, method, options):
    model = make(family)
    medpeft.apply(model, method, head=FAMILIES[family].head, **options)
    sites = [model.get_submodule(name) for _, name, _ in model._medpeft.sites]
    asked = []
    for block in sites:
        block.register_forward_hook(
            lambda m, args, y: asked.append((y if torch.is_tensor(y) else y[0]).requires_grad)
        )
    output(model.train(), example(family))
    assert asked == [False] * (len(sites) - 1) + [True]


def test_dtl_has_a_backward_from_its_first_join_on():
    model, _ = adapted(Transformer(depth=4), "dtl")
    asked = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, args, y: asked.append(y.requires_grad))
    model(tokens(2, 4, 8))
    assert asked == [False, False, True, True]


@pytest.mark.parametrize("method", ["lst", "dtl"])
def test_a_part_of_the_model_alone_is_refused_and_nothing_is_left_behind(method):
    model = medpeft.apply(make("vit"), method)
    with pytest.raises(medpeft.MedpeftError, match=r"handed nothing .* call the model as a whole"):
        model.forward_features(example("vit"))
    model.blocks[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(example("vit"))
    handovers = [
        module.handover
        for module in model.modules()
        if isinstance(getattr(module, "handover", None), Handover)
    ]
    assert len(set(map(id, handovers))) == 1
    assert not handovers[0]._frames


@pytest.mark.parametrize("method", ["lst", "dtl"])
def test_checkpointed_blocks_are_refused_where_they_run_again(method):
    class Checkpointed(Transformer):
        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    model, _ = adapted(Checkpointed(depth=3), method)
    y = model(tokens(2, 4, 8))
    with pytest.raises(medpeft.MedpeftError, match="without activation checkpointing"):
        y.sum().backward()


@pytest.mark.parametrize("method", ["lst", "dtl"])
def test_threads_and_copies_keep_their_streams_apart(method):
    model, _ = adapted(Transformer(depth=3), method)
    inputs = [tokens(2, n, 8, seed=n) for n in (3, 5, 7)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
        got = {}

        def run(i):
            with torch.no_grad():
                got[i] = [copies[i % 2](inputs[i]) for _ in range(10)]

        copies = [model, copy.deepcopy(model)]
        threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, y in enumerate(expected):
        assert all(torch.equal(y, other) for other in got[i])


@pytest.mark.parametrize("method", ["lst", "dtl"])
def test_a_target_leaves_blocks_out_of_the_stream(method, tmp_path):
    model, plain = make("vit"), make("vit")
    before, about = tensors(model), trace(model)
    medpeft.apply(model, method, exclude="blocks.0")
    assert [name for _, name, _ in model._medpeft.sites] == ["blocks.1"]
    randomise_adapters(model, size=0.5)
    assert medpeft.check(model, example("vit"))
    medpeft.save(model, tmp_path / "one.safetensors")
    loaded = medpeft.load(plain, tmp_path / "one.safetensors")
    assert torch.equal(output(loaded.eval(), example("vit")), output(model.eval(), example("vit")))
    medpeft.remove(model)
    assert same(tensors(model), before)
    assert trace(model) == about


@pytest.mark.parametrize("method", ["lst", "dtl"])
def test_a_block_that_gives_other_channels_than_its_convolutions_is_refused(method):
    class DoublingBasicBlock(BasicBlock):
        def forward(self, x):
            return torch.cat([x, super().forward(x)], 1)

    model = medpeft.apply(
        nn.Sequential(nn.Sequential(DoublingBasicBlock())).double().eval(), method, head=None
    )
    with pytest.raises(medpeft.MedpeftError, match="8 channels and not 4, as its layers say"):
        model(tokens(2, 4, 6, 6))


@pytest.mark.parametrize("method", ["lst", "dtl"])
def test_models_without_a_row_of_blocks_are_refused(method):
    with pytest.raises(
        medpeft.MedpeftError, match=r"nor a chain of convolutions, .* beside transformer blocks"
    ):
        medpeft.apply(make("densenet"), method)
