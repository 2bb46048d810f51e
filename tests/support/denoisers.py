"""Tiny denoisers of diffusers and their inputs, and the paper's seven strategies of text-to-image."""

import copy
from functools import cache

import torch
from models import randomise

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
_TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "num_layers": 2,
    "patch_size": 2,
}


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
    return model, {
        "sample": latents(2, 4, 8, 8),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": latents(2, 5, 6),
    }


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
    inputs = {
        "sample": latents(2, 4, 8, 8),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": latents(2, 5, 6),
    }
    return model, {**inputs, "added_cond_kwargs": more}


@listed
def unconditional():
    from diffusers import UNet2DModel

    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    model = UNet2DModel(**_UNET, **blocks, attention_head_dim=4)
    return model, {"sample": latents(2, 3, 8, 8), "timestep": torch.tensor(7)}


@listed
def dit():
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        **_TRANSFORMER, out_channels=4, sample_size=8, num_embeds_ada_norm=4, norm_num_groups=4
    )
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
    text = {
        "encoder_hidden_states": latents(2, 5, 12),
        "pooled_projections": latents(2, 10),
        "txt_ids": torch.zeros(5, 3),
    }
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

    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    model = CLIPTextModel(
        CLIPTextConfig(**sizes, max_position_embeddings=8, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    )
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
