"""A tiny ViT, and how prompts are put into its tokens by hand."""

import timm
import torch
from models import randomise

SIZES = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 16, "num_heads": 2, "num_classes": 3}


def vit(**options):
    return randomise(timm.create_model("vit_tiny_patch16_224", **SIZES, **options).double()).eval()


def prompts_of(model):
    return [
        block.adapters[name].prompts.tokens.detach()
        for block in model.blocks
        for name in ("vpt_deep", "vpt_shallow")
        if "adapters" in block._modules and name in block.adapters
    ]


def put_in(x, prompts, at):
    return torch.cat([x[:, :at], prompts.expand(len(x), -1, -1), x[:, at:]], 1)


def taken_off(x, prompts, at):
    return torch.cat([x[:, :at], x[:, at + len(prompts) :]], 1)


def embedded(model, images):
    """What enters the first block of timm's plain ViT."""
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
