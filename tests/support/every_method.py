"""Every method on a tiny model that shows it at its most awkward: on outputs, inputs, weights, in two places."""

import torch
from models import FAMILIES, example, make

import medpeft

CASES = {
    "full": ("resnet", {"keep_base": True}),
    "linear_probe": ("vit", {}),
    "bn": ("resnet", {}),
    "ln": ("vit", {}),
    "norm": ("vit", {}),
    "attention": ("vit", {}),
    "bias": ("resnet", {}),
    "bitfit": ("beit", {}),
    "adaptformer": ("vit", {"bottleneck": 4, "dropout": 0.0}),
    "houlsby": ("vit", {"bottleneck": 4}),
    "pfeiffer": ("vit", {"bottleneck": 4}),
    "adapter_plus": ("vit", {"bottleneck": 4, "drop_path": 0.0}),
    "conv_adapter": ("resnet", {"reduction": 2}),
    "convpass": ("vit", {"bottleneck": 4, "dropout": 0.0}),
    "difffit": ("vit", {}),
    "dtl": ("vit", {}),
    "fact": ("hf_vit", {"rank": 3}),
    "ia3": ("vit", {}),
    "loha": ("beit", {"rank": 2}),
    "lokr": ("vit", {"rank": 2}),
    "lora": ("beit", {"rank": 2}),
    "lst": ("swin", {"reduction": 2}),
    "miss": ("vit", {"rank": 5}),
    "mona": ("swin", {"bottleneck": 4, "dropout": 0.0}),
    "oft": ("vit", {"block_size": 4}),
    "prefix": ("vit", {"tokens": 3}),
    "repadapter": ("hf_vit", {"bottleneck": 4}),
    "residual_adapter": ("resnet", {}),
    "shira": ("vit", {"rank": 1}),
    "ssf": ("vit", {}),
    "svdiff": ("vit", {"norms": True}),
    "tsa": ("resnet", {}),
    "vera": ("vit", {"rank": 6}),
    "vpt_deep": ("vit", {"tokens": 3}),
    "vpt_shallow": ("vit", {"tokens": 3}),
    # In the weight and beside it, in attentions that others read.
    "dora": ("swinv2", {"rank": 2, "dora": True}),
    "svdiff in an attention": ("multihead_attention", {}),
    "lora in an encoder": ("transformer_encoder", {"rank": 2, "target": "*"}),
    "prefix in an encoder": ("transformer_encoder", {"tokens": 2}),
    "ssf+lora+svdiff+bias": ("vit", {"rank": 2}),
}
_METHOD = {
    "dora": "lora",
    "svdiff in an attention": "svdiff",
    "lora in an encoder": "lora",
    "prefix in an encoder": "prefix",
}


def adapted(case, family=None, **more):
    """An adapted model in float64 and in eval mode, away from its start, and an input for it."""
    usual, options = CASES[case]
    family = family or usual
    model = medpeft.apply(
        make(family), _METHOD.get(case, case), head=FAMILIES[family].head, **{**options, **more}
    )
    return perturb(model).eval(), example(family)


@torch.no_grad()
def perturb(model, size=0.1):
    """Move everything that trains away from where it is."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def base(case):
    """The model before it was adapted."""
    return make(CASES[case][0])
