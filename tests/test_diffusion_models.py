"""Denoisers of diffusers take each of the paper's seven text-to-image strategies, and the counts are the paper's."""

import copy
import re
from collections import namedtuple
from functools import cache

import pytest
import torch
from models import randomise, randomise_adapters
from torch import nn

import medpeft

BLOCK = {"attention": {"scope": "block"}}
# Table 4 of Dutt et al. (arXiv 2305.08252); its "attention" is the whole `attentions` of the UNet.
STRATEGIES = {
    "full": "full",
    "attention": BLOCK,
    "bias": "bias",
    "norm": "norm",
    "bias+norm": "bias+norm",
    "bias+norm+attention": {"bias": {}, "norm": {}, **BLOCK},
    "lora": "lora",
    "svdiff": "svdiff",
}

MODELS = {}


def listed(build):
    """Decorator that lists a tiny model, built with its inputs."""
    MODELS[build.__name__] = build
    return build


_UNET = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}
_TRANSFORMER = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2, "patch_size": 2}


def latents(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@listed
def stable_diffusion():
    from diffusers import UNet2DConditionModel

    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    model = UNet2DConditionModel(**_UNET, **blocks, cross_attention_dim=6, attention_head_dim=4)
    return model, {"sample": latents(2, 4, 8, 8), "timestep": torch.tensor(7), "encoder_hidden_states": latents(2, 5, 6)}


@listed
def sdxl():
    from diffusers import UNet2DConditionModel

    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    model = UNet2DConditionModel(
        **_UNET, **blocks, cross_attention_dim=6, attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 10,
    )  # fmt: skip
    more = {"text_embeds": latents(2, 10), "time_ids": latents(2, 6)}
    inputs = {"sample": latents(2, 4, 8, 8), "timestep": torch.tensor(7), "encoder_hidden_states": latents(2, 5, 6)}
    return model, {**inputs, "added_cond_kwargs": more}


@listed
def unconditional():
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    model = UNet2DModel(**_UNET, **blocks, attention_head_dim=4)
    return model, {"sample": latents(2, 3, 8, 8), "timestep": torch.tensor(7)}


@listed
def dit():
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(**_TRANSFORMER, out_channels=4, sample_size=8, num_embeds_ada_norm=4, norm_num_groups=4)
    steps, classes = torch.tensor([7, 7]), torch.tensor([0, 1])
    return model, {"hidden_states": latents(2, 4, 8, 8), "timestep": steps, "class_labels": classes}


@listed
def sd3():
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        **_TRANSFORMER, sample_size=8, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10,
        out_channels=4, pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    text = {"encoder_hidden_states": latents(2, 5, 12), "pooled_projections": latents(2, 10)}
    return model, {"hidden_states": latents(2, 4, 8, 8), **text, "timestep": torch.tensor([7.0, 7.0])}


@listed
def flux():
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip
    text = {"encoder_hidden_states": latents(2, 5, 12), "pooled_projections": latents(2, 10), "txt_ids": torch.zeros(5, 3)}
    when = {"timestep": torch.tensor([0.5, 0.5]), "guidance": torch.ones(2)}
    return model, {"hidden_states": latents(2, 16, 8), **text, **when, "img_ids": latents(16, 3)}


@listed
def pixart():
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        **_TRANSFORMER, out_channels=8, sample_size=8, cross_attention_dim=16, caption_channels=12, norm_num_groups=4,
        use_additional_conditions=False,
    )  # fmt: skip
    text = {"encoder_hidden_states": latents(2, 5, 12), "encoder_attention_mask": torch.ones(2, 5)}
    extra = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return model, {"hidden_states": latents(2, 4, 8, 8), **text, **extra, "timestep": torch.tensor([7, 7])}


@listed
def clip_text():
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = CLIPTextModel(CLIPTextConfig(**sizes, max_position_embeddings=8, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    return model, {"input_ids": torch.tensor([[1, 5, 9, 2, 2, 2, 2, 2], [1, 7, 8, 6, 2, 2, 2, 2]])}


@cache
def _made(name):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    return randomise(model.double()).eval(), torch.utils._pytree.tree_map(_wide, inputs)


def _wide(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def make(name):
    model, inputs = _made(name)
    return copy.deepcopy(model), inputs


@torch.no_grad()
def output(model, inputs):
    return model(**inputs)[0]


def close(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-12 * float(b.abs().max()))


# SD3 computes the text stream's queries in its last block too, and throws away what they give.
DISCARDED = re.compile(r"transformer_blocks\.1\.attn\.(add_q_proj|norm_added_q)$")
WITHOUT_NORMS = ("dit", "pixart")
CASES = [(name, s) for name in MODELS for s in STRATEGIES if not ("norm" in s and name in WITHOUT_NORMS)]
# Every strategy on the paper's kind of UNet, and on the others those that touch a kind of layer of their own.
ELSEWHERE = ("lora", "svdiff", "bias+norm+attention")
WHOLE = [(n, s) for n, s in CASES if n == "stable_diffusion" or s in ELSEWHERE or (s == "attention" and n in WITHOUT_NORMS)]


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_a_plan_counts_what_apply_trains(name, strategy):
    model, _ = make(name)
    planned = medpeft.plan(model, STRATEGIES[strategy], head=None).trainable

    medpeft.apply(model, STRATEGIES[strategy], head=None)

    assert planned == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0


@pytest.mark.parametrize(("name", "strategy"), WHOLE)
def test_a_strategy_passes_check_save_load_and_merge(name, strategy, tmp_path):
    base, inputs = make(name)
    model = copy.deepcopy(base)
    exclude = DISCARDED if name == "sd3" else None
    medpeft.apply(model, STRATEGIES[strategy], head=None, exclude=exclude)
    before = output(base, inputs)
    assert close(output(model, inputs), before)

    assert medpeft.check(model, inputs).tensors > 0
    _move(model)
    adapted = output(model, inputs)
    assert not torch.allclose(adapted, before, rtol=1e-3)

    medpeft.save(model, tmp_path / "adapter.safetensors")
    loaded = medpeft.load(copy.deepcopy(base), tmp_path / "adapter.safetensors").eval()
    assert close(output(loaded, inputs), adapted)

    medpeft.merge(model)
    assert close(output(model, inputs), adapted)
    assert model.state_dict().keys() == base.state_dict().keys()


@torch.no_grad()
def _move(model):
    """Change everything that trains, the layers' own parameters a little less than randomise_adapters does its own."""
    randomise_adapters(model)
    generator = torch.Generator().manual_seed(4)
    for name, p in model.named_parameters():
        if p.requires_grad and ".adapters." not in name:
            p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


@pytest.mark.parametrize("strategy", ["lora", "svdiff", "full"])
def test_the_discarded_queries_of_sd3_are_found(strategy):
    model, inputs = make("sd3")
    medpeft.apply(model, strategy, head=None)

    with pytest.raises(medpeft.MedpeftError, match=r"transformer_blocks\.1\.attn\.add_q_proj"):
        medpeft.check(model, inputs)


@pytest.mark.parametrize("name", WITHOUT_NORMS)
def test_a_transformer_whose_norms_have_no_parameters_says_so(name):
    model, _ = make(name)

    with pytest.raises(medpeft.MedpeftError, match="normalisation layers that have parameters"):
        medpeft.apply(model, "norm", head=None)


# Counts of Stable Diffusion 1.x, from its published configuration by hand

Weight = namedtuple("Weight", "role outputs fan_in bias block")


def resnet(inputs, outputs):
    yield Weight("norm", inputs, 1, True, False)
    yield Weight("conv", outputs, 9 * inputs, True, False)
    yield Weight("linear", outputs, 1280, True, False)  # the time embedding
    yield Weight("norm", outputs, 1, True, False)
    yield Weight("conv", outputs, 9 * outputs, True, False)
    if inputs != outputs:
        yield Weight("conv", outputs, inputs, True, False)


def attentions(width):
    yield Weight("norm", width, 1, True, True)
    yield Weight("conv", width, width, True, True)
    for text in (width, 768):  # self-attention, then attention to the text
        yield Weight("norm", width, 1, True, True)
        yield Weight("q", width, width, False, True)
        yield Weight("k", width, text, False, True)
        yield Weight("v", width, text, False, True)
        yield Weight("o", width, width, True, True)
    yield Weight("norm", width, 1, True, True)
    yield Weight("linear", 8 * width, width, True, True)  # GEGLU
    yield Weight("linear", width, 4 * width, True, True)
    yield Weight("conv", width, width, True, True)


def weights_of_stable_diffusion():
    """Every weight of the UNet: 4 latent channels, widths 320 to 1280, two residual blocks at each of four resolutions."""
    widths, now, skips = (320, 640, 1280, 1280), 320, [320]
    yield Weight("conv", 320, 9 * 4, True, False)
    yield Weight("linear", 1280, 320, True, False)
    yield Weight("linear", 1280, 1280, True, False)
    for i, width in enumerate(widths):
        for _ in range(2):
            yield from resnet(now, width)
            if i < 3:
                yield from attentions(width)
            now = width
            skips.append(now)
        if i < 3:
            yield Weight("conv", width, 9 * width, True, False)
            skips.append(width)
    yield from (*resnet(1280, 1280), *attentions(1280), *resnet(1280, 1280))
    for i, width in enumerate(reversed(widths)):
        for _ in range(3):
            yield from resnet(now + skips.pop(), width)
            if i > 0:
                yield from attentions(width)
            now = width
        if i < 3:
            yield Weight("conv", width, 9 * width, True, False)
    assert not skips
    yield Weight("norm", 320, 1, True, False)
    yield Weight("conv", 4, 9 * 320, True, False)


def total(chosen=lambda w: True, size=lambda w: w.outputs * w.fan_in + w.outputs * w.bias):
    return sum(size(w) for w in weights_of_stable_diffusion() if chosen(w))


def is_norm(w):
    return w.role == "norm"


def biases(w):
    return w.outputs * w.bias


def rest(w):
    """Of a layer outside the attention blocks: its bias, and all of a norm."""
    return w.outputs * (w.bias + is_norm(w))


COUNTS = [
    ("full", "full", {}, 859_520_964, total()),
    ("attention", BLOCK, {}, 267_239_360, total(lambda w: w.block)),
    ("attention layers alone", "attention", {}, 93_536_640, total(lambda w: w.role in "qkvo")),
    ("bias", "bias", {}, 343_684, total(size=biases)),
    ("norm", "norm", {}, 200_320, total(is_norm)),
    ("bias+norm", "bias+norm", {}, 443_844, total(size=rest)),
    (
        "bias+norm+attention",
        STRATEGIES["bias+norm+attention"],
        {},
        267_421_124,
        total(lambda w: w.block) + total(lambda w: not w.block, rest),
    ),
    ("lora", "lora", {}, 797_184, total(lambda w: w.role in "qv", lambda w: 8 * (w.outputs + w.fan_in))),
    (
        "lora as in diffusers",
        "lora",
        {"rank": 4, "parts": "qkvo"},
        797_184,
        total(lambda w: w.role in "qkvo", lambda w: 4 * (w.outputs + w.fan_in)),
    ),
    ("svdiff", "svdiff", {}, 222_696, total(lambda w: not is_norm(w), lambda w: min(w.outputs, w.fan_in))),
    ("svdiff with norms", "svdiff", {"norms": True}, 222_805, total(size=lambda w: min(w.outputs, w.fan_in))),
]


@cache
def _stable_diffusion_on_meta():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768)


@pytest.mark.parametrize(("method", "options", "count", "by_hand"), [row[1:] for row in COUNTS], ids=[row[0] for row in COUNTS])
def test_counts_of_stable_diffusion(method, options, count, by_hand):
    planned = medpeft.plan(_stable_diffusion_on_meta(), method, head=None, **options)

    assert planned.trainable == count == by_hand


def test_the_weights_written_by_hand_are_those_of_the_model():
    layers = (m for m in _stable_diffusion_on_meta().modules() if isinstance(getattr(m, "weight", None), nn.Parameter))
    found = sorted((len(m.weight), m.weight[0].numel(), m.bias is not None) for m in layers)

    assert found == sorted((w.outputs, w.fan_in, w.bias) for w in weights_of_stable_diffusion())


@pytest.mark.parametrize("method", ["lora", "svdiff"])
def test_applying_on_the_meta_device_trains_what_was_planned(method):
    model = copy.deepcopy(_stable_diffusion_on_meta())
    medpeft.apply(model, method, head=None)

    assert medpeft.report(model).trainable == {"lora": 797_184, "svdiff": 222_696}[method]
