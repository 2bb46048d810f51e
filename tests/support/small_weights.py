"""A small ViT of timm and its weights, as they are published."""

import torch
from timm.models.vision_transformer import VisionTransformer

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2}


def vit(seed=0, **more):
    """A ViT of timm, every tensor at random."""
    torch.manual_seed(seed)
    model = VisionTransformer(**{**TINY, "num_classes": 2, **more})
    for parameter in model.parameters():
        parameter.data.normal_()
    return model


def trunk(model):
    """The state dict without a head, as an encoder is published."""
    return {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def same_trunk(model, state):
    values = model.state_dict()
    return all(torch.equal(values[name], value) for name, value in state.items())


def saved(content, folder, name="w.pth"):
    torch.save(content, folder / name)
    return folder / name
