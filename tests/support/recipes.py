"""The recipes of the contract: every method in its variants, what each needs, and the families it is tested on."""

RECIPES = {
    "full": ("full", {"keep_base": True}),
    "linear_probe": ("linear_probe", {}),
    "bn": ("bn", {}),
    "bias": ("bias", {}),
    "bitfit+tables": ("bitfit", {"tables": True}),
    "ln": ("ln", {}),
    "norm": ("norm", {}),
    "attention": ("attention", {}),
    "attention blocks": ("attention", {"scope": "block"}),
    "tsa": ("tsa", {}),
    "tsa series": ("tsa", {"form": "series"}),
    "ssf": ("ssf", {}),
    "lora": ("lora", {"rank": 2}),
    "lora everywhere": ("lora", {"rank": 2, "target": "*", "parts": "qkvo", "rslora": True, "alpha": 3.0}),
    "dora": ("lora", {"rank": 2, "dora": True}),
    "pissa": ("lora", {"rank": 2, "init": "pissa"}),
    "olora": ("lora", {"rank": 2, "init": "olora"}),
    "adaptformer": ("adaptformer", {"bottleneck": 8}),
    "adaptformer on the norm": ("adaptformer", {"bottleneck": 8, "input": "norm", "scale": "learnable"}),
    "svdiff": ("svdiff", {"norms": True}),
    "houlsby": ("houlsby", {"bottleneck": 4}),
    "pfeiffer": ("pfeiffer", {"bottleneck": 4}),
    "adapter_plus": ("adapter_plus", {"bottleneck": 4}),
    "convpass": ("convpass", {"bottleneck": 4}),
    "conv_adapter": ("conv_adapter", {"reduction": 2}),
    "residual_adapter": ("residual_adapter", {}),
    "residual_adapter series": ("residual_adapter", {"form": "series"}),
    "vpt_shallow": ("vpt_shallow", {"tokens": 3}),
    "vpt_deep": ("vpt_deep", {"tokens": 3}),
    "prefix": ("prefix", {"tokens": 3}),
    "prompted": (
        {"vpt_deep": {}, "vpt_shallow": {}, "prefix": {}, "adaptformer": {}, "lora": {"rank": 2}},
        {},
    ),
    "repadapter": ("repadapter", {"bottleneck": 4}),
    "vera": ("vera", {"rank": 6}),
    "ia3": ("ia3", {}),
    "fact": ("fact", {"rank": 3}),
    "fact tucker": ("fact", {"rank": 3, "form": "tucker", "scale": 0.5}),
    "difffit": ("difffit", {}),
    "oft": ("oft", {"block_size": 4}),
    "loha": ("loha", {"rank": 2}),
    "loha tucker": ("loha", {"rank": 2, "tucker": True, "alpha": 3.0}),
    "lokr": ("lokr", {"rank": 2}),
    "lokr both": ("lokr", {"rank": 1, "factor": 4, "tucker": True, "both": True, "alpha": 3.0}),
    "shira": ("shira", {"rank": 1}),
    "shira each output": ("shira", {"rank": 1, "mask": "magnitude", "each_output": True}),
    "miss": ("miss", {"rank": 5}),
    "mona": ("mona", {"bottleneck": 4}),
    "mona of convolutions": ("mona", {"bottleneck": 4}),
    "lst": ("lst", {"reduction": 2}),
    "lst of convolutions": ("lst", {"reduction": 2}),
    "dtl": ("dtl", {}),
    "dtl of convolutions": ("dtl", {"start": 1.0, "convolve": True}),
    "two kinds": ({"lora": {"rank": 2}, "adaptformer": {"bottleneck": 8}}, {}),
    "on the input": (
        {"repadapter": {}, "lora": {"rank": 2, "parts": "qkv"}, "oft": {"block_size": 4}, "ssf": {}},
        {},
    ),
    "union": ("ssf+lora+svdiff+bias", {"rank": 2}),
}

NEEDS = {
    "linear_probe": "head",
    "bn": "batchnorm",
    "ln": "layernorm",
    "norm": "norm",
    "attention": "attention",
    "attention blocks": "attention blocks",
    "tsa": "conv blocks",
    "tsa series": "conv blocks",
    "adaptformer": "transformer blocks",
    "adaptformer on the norm": "transformer blocks",
    **dict.fromkeys(("houlsby", "pfeiffer", "adapter_plus", "convpass"), "transformer blocks"),
    **dict.fromkeys(("vpt_shallow", "vpt_deep", "prompted"), "transformer blocks"),
    **dict.fromkeys(("conv_adapter", "residual_adapter", "residual_adapter series"), "conv blocks"),
    "prefix": "attention",
    "repadapter": "attention",
    "ia3": "attention",
    "fact": "attention",
    "fact tucker": "attention",
    "difffit": "attention",
    "miss": "attention",
    **dict.fromkeys(("lst", "dtl", "mona"), "transformer blocks"),
    **dict.fromkeys(("lst of convolutions", "dtl of convolutions", "mona of convolutions"), "conv blocks"),
    "two kinds": "transformer blocks",
    "on the input": "attention",
}

# Slow ones are tested with the recipes that treat them in a way of their own.
SLOW = {
    "mobilenetv3": {"bn", "tsa", "ssf", "lora", "svdiff"},
    "torchvision_resnet": {"bias", "tsa", "ssf", "lora"},
    "monai_swin_unetr": {"norm", "tsa", "ssf", "lora everywhere", "adaptformer"},
    # Deep and random: rounding grows to where a sum in another order shows.
    "densenet": {"full", "linear_probe", "bn", "bias", "norm", "tsa", "ssf", "lora", "svdiff"},
    "maxvit": {"attention", "tsa", "ssf", "lora", "adaptformer", "union"},
}


# Variants that differ inside the adapter alone are tested on one family of each kind of layer.
_KINDS = (
    "resnet",
    "efficientnet",
    "vit",
    "beit",
    "swinv2",
    "levit",
    "hf_vit",
    "multihead_attention",
    "transformer_encoder",
)
SOLE = dict.fromkeys(("pissa", "olora", "dora"), _KINDS)
# Fused, fused and read by the parent, separate, `in_proj_weight`, and convolutions; a CNN that has none of these.
_PROJECTIONS = ("vit", "beit", "hf_vit", "multihead_attention", "coatnet")
SOLE |= dict.fromkeys(
    ("repadapter", "ia3", "fact", "difffit"), (*_PROJECTIONS, "transformer_encoder", "resnet")
)
SOLE |= dict.fromkeys(("vera", "oft"), (*_PROJECTIONS, "resnet"))
SOLE |= dict.fromkeys(("loha", "lokr", "shira"), (*_PROJECTIONS, "resnet"))
SOLE |= {"miss": ("vit", "beit", "hf_vit", "multihead_attention", "resnet")}
SOLE |= dict.fromkeys(("loha tucker", "lokr both", "shira each output"), ("vit", "resnet", "monai_unet3d"))
SOLE |= {
    "houlsby": ("vit", "swinv2", "torchvision_vit", "hf_vit", "coatnet", "resnet"),
    "pfeiffer": ("beit", "hf_swin", "coatnet"),
    "adapter_plus": ("vit", "swinv2", "clip_vision"),
    "convpass": ("vit", "swin", "hf_dinov2", "torchvision_vit", "monai_vit", "resnet"),
    "conv_adapter": ("resnet", "efficientnet", "convnext", "monai_unet3d", "vit"),
    "residual_adapter": ("resnet", "regnet", "monai_unet2d", "vit"),
    "residual_adapter series": ("resnet", "regnet"),
    "vpt_shallow": ("deit_distilled", "hf_vit", "clip_vision", "resnet"),
    "vpt_deep": ("vit", "hf_dinov2", "torchvision_vit", "monai_vit", "resnet"),
    "prefix": ("vit", "hf_vit", "multihead_attention", "transformer_encoder", "siglip", "resnet"),
    "prompted": ("vit", "torchvision_vit"),
}
# Fused, in windows on a grid and in a row, without a class token, as containers and as layers.
_TRUNKS = ("vit", "swin", "swinv2", "hf_vit", "hf_swin", "torchvision_vit", "torchvision_swin", "clip_vision")
_CNNS = ("resnet", "torchvision_resnet", "regnet", "efficientnet", "convnext", "hf_convnext")
SOLE |= dict.fromkeys(("lst", "dtl"), (*_TRUNKS, "multihead_attention"))
SOLE |= dict.fromkeys(("lst of convolutions", "dtl of convolutions"), (*_CNNS, "multihead_attention"))
SOLE |= {
    # The last convolutions act where the patches are read, and not the class token alone.
    "mona": ("siglip", "swin", "swinv2", "hf_swin", "torchvision_swin", "coatnet", "multihead_attention"),
    "mona of convolutions": ("resnet", "convnext", "hf_convnext", "multihead_attention"),
    "fact tucker": ("vit", "hf_vit"),
    "two kinds": ("vit", "swinv2"),
    "on the input": ("vit", "beit", "hf_vit"),
}
