"""Integer parameter counts of the paper's models, on the meta device."""

import pytest
import timm
import torch
from torch import nn

import medpeft

RESNET50 = [
    ("full", {}, 23_508_032),
    ("tsa", {}, 10_616_832),
    ("tsa", {"sites": "3x3"}, 1_257_472),
    ("bn", {}, 53_120),
    ("bias", {}, 26_560),
    ("ssf", {}, 53_120),
    ("lora", {"rank": 4}, 317_772),
    ("lora", {"rank": 8}, 635_544),
    ("lora", {"rank": 16}, 1_271_088),
    ("svdiff", {}, 13_248),
]

VIT = [
    ("full", {}, (85_798_656, 303_301_632, 630_764_800)),
    ("attention", {}, (28_348_416, 100_761_600, 209_879_040)),
    ("bitfit", {}, (102_912, 272_384, 453_120)),
    ("ln", {}, (38_400, 100_352, 166_400)),
    ("bias+norm", {}, (122_112, 322_560, 536_320)),
    ("bias+norm+attention", {}, (28_433_664, 100_985_856, 210_251_520)),
    ("lora", {}, (294_912, 786_432, 1_310_720)),
    ("lora", {"parts": "qkv"}, (442_368, 1_179_648, 1_966_080)),
    ("lora", {"target": "blocks.*"}, (1_179_648, 3_145_728, 5_242_880)),
    ("lora", {"dora": True}, (313_344, 835_584, 1_392_640)),
    ("ssf", {}, (205_824, 544_768, 906_240)),
    ("adaptformer", {}, (1_189_632, 3_171_840, 5_285_888)),
    ("svdiff", {}, (37_632, 99_072, 164_428)),
]


def trainable(model):
    head = set(_head_names(model))
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and name not in head)


def _head_names(model):
    classifier = {id(p) for p in model.get_classifier().parameters()}
    return [name for name, p in model.named_parameters() if id(p) in classifier]


@pytest.fixture(scope="module")
def meta_models():
    with torch.device("meta"):
        names = ("resnet50", "vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224")
        return {name: timm.create_model(name, num_classes=3) for name in names}


@pytest.mark.parametrize(("method", "options", "count"), RESNET50, ids=lambda value: str(value))
def test_resnet50_trains_as_many_parameters_as_the_definitions_say(meta_models, method, options, count):
    model = meta_models["resnet50"]
    planned = medpeft.plan(model, method, **options).trainable
    medpeft.apply(model, method, keep_base=True, **options)
    try:
        assert trainable(model) == count
        assert planned == count + 6_147
        assert medpeft.report(model).trainable == planned
    finally:
        medpeft.remove(model)


@pytest.mark.parametrize(
    ("size", "index"), [("vit_base_patch16_224", 0), ("vit_large_patch16_224", 1), ("vit_huge_patch14_224", 2)]
)
@pytest.mark.parametrize(("method", "options", "counts"), VIT, ids=lambda value: str(value))
def test_vits_train_as_many_parameters_as_the_definitions_say(meta_models, size, index, method, options, counts):
    model = meta_models[size]
    medpeft.apply(model, method, keep_base=True, **options)
    try:
        assert trainable(model) == counts[index]
    finally:
        medpeft.remove(model)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_the_head_is_counted_apart(classes):
    with torch.device("meta"):
        model = timm.create_model("resnet50", num_classes=classes)
    medpeft.apply(model, "bias")
    found = medpeft.report(model)
    assert found.head == 2049 * classes
    assert found.trainable == 26_560 + 2049 * classes


def test_stable_diffusion_1_trains_what_the_paper_counts():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
    assert medpeft.plan(unet, "full").trainable == 859_520_964
    assert medpeft.plan(unet, "attention").trainable == 93_536_640
    blocks = sum(p.numel() for name, p in unet.named_parameters() if ".attentions." in name)
    assert medpeft.plan(unet, "attention", scope="block").trainable == blocks


def test_lora_on_a_fused_projection_leaves_the_keys_alone():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3)
    medpeft.apply(model, "lora", rank=4)
    for name, module in model.named_modules():
        if not name.endswith("attn.qkv"):
            continue
        nn.init.normal_(module.adapters["lora"].up)
        before = module.weight.detach().clone()
        with medpeft.merged(model):
            q, k, v = (module.weight.detach() - before).chunk(3)
        assert torch.count_nonzero(k) == 0
        assert torch.count_nonzero(q) == q.numel()
        assert torch.count_nonzero(v) == v.numel()
