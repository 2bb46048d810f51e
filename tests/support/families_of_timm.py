"""Families of timm, each as a tiny model."""

from family import CLASSES, CNN, CONVNEXT, IMAGE, POSITIONS, TRANSFORMER, family


def _timm(name, **options):
    import timm

    return timm.create_model(name, num_classes=CLASSES, **options)


@family(CNN, IMAGE)
def resnet():
    return _timm("resnet26", layers=(1, 1, 1, 1), channels=(4, 8, 8, 8), stem_width=8)


@family(CNN, IMAGE)
def efficientnet():
    from timm.models.efficientnet import _gen_efficientnet_lite

    return _gen_efficientnet_lite("tf_efficientnet_lite0", 0.25, 0.1, num_classes=CLASSES)


@family(CNN, IMAGE)
def mobilenetv3():
    return _timm("mobilenetv3_small_050")


@family(CNN, IMAGE)
def regnet():
    from timm.models.regnet import RegNet, RegNetCfg

    return RegNet(RegNetCfg(depth=6, w0=8, wa=8.0, wm=2.0, group_size=4, se_ratio=0.25), num_classes=CLASSES)


@family(CNN, IMAGE)
def densenet():
    return _timm("densenet121", growth_rate=4, block_config=(1, 2, 1))


@family(CONVNEXT, IMAGE)
def convnext():
    return _timm("convnext_atto", depths=(1, 1, 1, 1), dims=(4, 8, 8, 12), use_grn=False, ls_init_value=1e-6)


@family(TRANSFORMER, IMAGE)
def vit():
    return _timm("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=16, num_heads=2)


@family(TRANSFORMER, IMAGE)
def deit_distilled():
    return _timm(
        "deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=16, num_heads=2
    )


@family(TRANSFORMER, (2, 3, 28, 28))
def dinov2():
    return _timm("vit_small_patch14_dinov2", img_size=28, depth=2, embed_dim=16, num_heads=2)


@family(TRANSFORMER, IMAGE)
def siglip():
    return _timm("vit_base_patch16_siglip_224", img_size=32, patch_size=8, depth=2, embed_dim=16, num_heads=2)


@family(TRANSFORMER, IMAGE)
def beit():
    return _timm(
        "beit_base_patch16_224",
        img_size=32,
        patch_size=8,
        depth=2,
        embed_dim=16,
        num_heads=2,
        init_values=0.1,
    )


@family(TRANSFORMER, (2, 3, 28, 28))
def eva02():
    return _timm("eva02_tiny_patch14_224", img_size=28, depth=2, embed_dim=16, num_heads=2)


@family(TRANSFORMER, IMAGE)
def swin():
    return _timm(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        depths=(1, 2),
        embed_dim=8,
        num_heads=(2, 2),
    )


@family(TRANSFORMER, IMAGE)
def swinv2():
    return _timm(
        "swinv2_tiny_window8_256", img_size=32, window_size=4, depths=(1, 2), embed_dim=8, num_heads=(2, 2)
    )


@family(TRANSFORMER | CNN, (2, 3, 64, 64), dead=POSITIONS)
def maxvit():
    return _timm(
        "maxvit_rmlp_pico_rw_256",
        img_size=64,
        embed_dim=(32, 32),
        depths=(1, 1),
        block_type=("M", "M"),
        stem_width=8,
    )


@family(TRANSFORMER | CNN, (2, 3, 64, 64))
def coatnet():
    return _timm(
        "coatnet_pico_rw_224", img_size=64, embed_dim=(8, 32, 32, 32), depths=(1, 1, 1, 1), stem_width=(8, 8)
    )


@family({"norm", "batchnorm", "attention", "attention blocks", "head"}, (2, 3, 64, 64))
def levit():
    return _timm("levit_128s", img_size=64, embed_dim=(16, 16), depth=(1, 1), num_heads=(2, 2), key_dim=4)
