"""Prompts and prefixes work compiled, checkpointed, saved and in low precision."""

import pytest
import torch
from layer_oracles import drawn
from models import example, make, randomise_adapters
from prompted import vit

import medpeft


@pytest.mark.parametrize(
    ("family", "method"), [("vit", "vpt_shallow+vpt_deep+prefix"), ("torchvision_vit", "prefix")]
)
def test_compiled_prompts_and_prefixes_compute_the_same_without_a_break(family, method):
    model, x = make(family), example(family)
    randomise_adapters(medpeft.apply(model, method))
    torch._dynamo.reset()

    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)

    torch.testing.assert_close(y, model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["vpt_shallow", "vpt_deep", "prefix"])
def test_checkpointed_blocks_give_the_same_gradients(method):
    gradients = []
    for checkpointed in (False, True):
        model = vit()
        model.set_grad_checkpointing(checkpointed)
        randomise_adapters(medpeft.apply(model, method)).train()
        model(drawn(2, 3, 32, 32).requires_grad_()).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})

    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "method"),
    [("vit", "vpt_shallow+vpt_deep"), ("multihead_attention", "prefix"), ("vit", "prefix")],
)
def test_saved_prompts_and_prefixes_come_back(family, method, tmp_path):
    model, x = make(family), example(family)
    randomise_adapters(
        medpeft.apply(model, method, tokens=4) if "+" not in method else medpeft.apply(model, method)
    )
    medpeft.save(model, tmp_path / "prompts.safetensors")

    loaded = medpeft.load(make(family), tmp_path / "prompts.safetensors")

    assert torch.equal(loaded(x), model(x))


def test_the_lost_end_of_a_row_of_prompts_is_found():
    model = medpeft.apply(make("vit"), "vpt_shallow")
    del model.blocks[1].forward

    with pytest.raises(medpeft.MedpeftError, match=r"blocks\.1 has lost the forward of its adapters"):
        medpeft.check(model, example("vit"))


def test_autocast_and_low_precision_keep_the_dtype_of_the_stream():
    for method in ("vpt_shallow+vpt_deep", "prefix"):
        model, x = medpeft.apply(make("vit", torch.bfloat16), method), example("vit", torch.bfloat16)
        assert model(x).dtype == torch.bfloat16
        model, x = medpeft.apply(make("vit", torch.float32), method), example("vit", torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert (y - model(x)).abs().max() < 0.1 * model(x).abs().max()
