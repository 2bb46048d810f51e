"""Models of several families with adapters in their last part, for tests of what comes before it."""

import torch
from models import make, randomise_adapters
from torch import nn

import medpeft

# By family: what trains, and where the features are taken then.
PLACES = {
    "vit": ("blocks.1.*", "blocks.1"),
    "beit": ("blocks.1.*", "blocks.1"),
    "swin": ("layers.1.blocks.*", "layers.1.blocks"),
    "resnet": ("layer4.*", "layer4"),
    "convnext": ("stages.3.*", "stages.3.downsample.1"),
    "densenet": ("features.denseblock3.*", "features.denseblock3"),
    "efficientnet": ("blocks.6.*", "blocks.6"),
    "torchvision_resnet": ("layer4.*", "layer4"),
    "torchvision_vit": ("encoder.layers.encoder_layer_1.*", "encoder.layers.encoder_layer_1"),
    "torchvision_swin": ("features.3.*", "features.3"),
    "hf_vit": ("vit.layers.1.*", "vit.layers.1"),
    "hf_swin": ("swin.encoder.layers.1.*", "swin.encoder.layers.1"),
    "hf_convnext": ("convnext.encoder.stages.1.*", "convnext.encoder.stages.1.downsampling_layer.1"),
    "monai_densenet": ("features.denseblock2.*", "features.denseblock2"),
    "clip_vision": ("transformer.resblocks.1.*", "transformer.resblocks.1"),
}


def without_drops(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return model


def adapted(name, method="lora", **options):
    options = {"head": None if name == "clip_vision" else "auto", "target": PLACES[name][0], **options}
    model = medpeft.apply(without_drops(make(name, torch.float32)), method, **options)
    return randomise_adapters(model)


def logits(returned):
    return getattr(returned, "logits", returned)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
