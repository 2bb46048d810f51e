"""LoRA to and from the files of diffusers."""

import pytest
import torch
from lora_files import PEFT_WARNINGS, close, denoised, refused, text_encoder, unet
from models import example, randomise_adapters
from safetensors.torch import load_file, save_file
from torch import nn

import medpeft
from medpeft.interchange import from_diffusers, to_diffusers

pytestmark = PEFT_WARNINGS

peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize(
    "options",
    [{"rank": 4, "alpha": 6, "parts": "qkvo"}, {"rank": 2, "target": "*", "parts": "qkvo", "rslora": True}],
)
def test_diffusers_loads_what_medpeft_wrote_and_computes_the_same(options, tmp_path):
    model = randomise_adapters(medpeft.apply(unet(), "lora", head=None, **options), size=0.3).eval()
    x, path = example("diffusion_unet"), tmp_path / "lora.safetensors"
    to_diffusers(model, path)

    theirs = unet()
    theirs.load_lora_adapter(str(tmp_path), weight_name="lora.safetensors", prefix="unet")
    with torch.no_grad():
        assert close(denoised(theirs.eval(), x), denoised(model, x))
        assert not close(denoised(unet(), x), denoised(model, x))
        assert close(denoised(from_diffusers(unet(), path).eval(), x), denoised(model, x))


def test_medpeft_loads_what_diffusers_wrote_and_computes_the_same(tmp_path):
    theirs = unet()
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_v", "conv1"], rank_pattern={"mid_block.*to_q": 2}
    )
    theirs.add_adapter(config)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.normal_(0, 0.2, generator=torch.Generator().manual_seed(p.numel()))
    theirs.save_lora_adapter(tmp_path)
    x, path = example("diffusion_unet"), tmp_path / "pytorch_lora_weights.safetensors"
    assert close(denoised(from_diffusers(unet(), path).eval(), x), denoised(theirs.eval(), x))

    # The same with the keys of older releases and of a pipeline.
    scale = {name: 6 / t.shape[0] for name, t in load_file(path).items() if "lora_A" in name}
    old = {f"text_encoder.{name}": t for name, t in load_file(path).items()}
    for name, t in load_file(path).items():
        old["unet." + name.replace("lora_A", "lora.down").replace("lora_B", "lora.up")] = t.clone()
        if name in scale:
            old["unet." + name.replace("lora_A.weight", "alpha")] = torch.tensor(6.0)
    save_file(old, tmp_path / "old.safetensors")
    assert close(
        denoised(from_diffusers(unet(), tmp_path / "old.safetensors").eval(), x), denoised(theirs.eval(), x)
    )
    refused(from_diffusers, unet(), tmp_path / "old.safetensors", "component='prior'", component="prior")


def test_what_a_diffusers_file_cannot_hold_is_named(tmp_path):
    with pytest.raises(medpeft.CheckpointError, match=r"the head conv_out: apply with head=None"):
        to_diffusers(medpeft.apply(unet(), "lora", head="conv_out"), tmp_path / "a.safetensors")
    with pytest.raises(medpeft.MedpeftError, match="not adapted"):
        to_diffusers(nn.Linear(2, 2), tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def encoded(model):
    with torch.no_grad():
        return model(torch.tensor([[0, 3, 4, 1]])).last_hidden_state


def spelled(tensors, spelling):
    """A file of a text encoder, by the keys of an older release."""
    old = {}
    for key, tensor in tensors.items():
        layer, factor = key.removeprefix("text_encoder.").rsplit(".lora_", 1)
        direction = {"A.weight": "down", "B.weight": "up"}[factor]
        layer = f"text_encoder.text_model.{layer}"
        if spelling == "projections" and layer.endswith("_proj"):
            attention, _, projection = layer.removesuffix("_proj").rpartition(".")
            old[f"{attention}.to_{projection}_lora.{direction}.weight"] = tensor
        else:
            old[f"{layer}.lora_linear_layer.{direction}.weight"] = tensor
    return old


@pytest.mark.parametrize("spelling", ["today's", "lora_linear_layer", "projections"])
def test_each_spelling_of_a_text_encoder_is_read_as_diffusers_reads_it(spelling, tmp_path):
    model = medpeft.apply(
        text_encoder(), "lora", head=None, rank=2, parts="qkvo", target=["attention", "mlp"], alpha=3
    )
    path = tmp_path / "lora.safetensors"
    randomise_adapters(model, size=0.3)
    to_diffusers(model, path, component="text_encoder")
    tensors = load_file(path)
    if spelling != "today's":
        tensors = spelled(tensors, spelling)
        save_file(tensors, path)
    theirs = text_encoder()
    diffusers.StableDiffusionPipeline.load_lora_into_text_encoder(tensors, None, theirs)
    ours = from_diffusers(text_encoder(), path, component="text_encoder")
    assert close(encoded(ours), encoded(model))
    assert close(encoded(theirs), encoded(model))
    assert not close(encoded(text_encoder()), encoded(model))
    refused(from_diffusers, unet(), path, "Pass component='text_encoder' together with that model")


def test_the_attention_processors_of_old_unets_are_read(tmp_path):
    model = randomise_adapters(
        medpeft.apply(unet(), "lora", head=None, rank=2, parts="qkvo"), size=0.3
    ).eval()
    x, path = example("diffusion_unet"), tmp_path / "lora.safetensors"
    to_diffusers(model, path)
    old = {}
    for key, tensor in load_file(path).items():
        layer, factor = key.removeprefix("unet.").rsplit(".lora_", 1)
        attention, _, projection = layer.removesuffix(".0").rpartition(".")
        direction = {"A.weight": "down", "B.weight": "up"}[factor]
        old[f"{attention}.processor.{projection}_lora.{direction}.weight"] = tensor
    save_file(old, path)
    with torch.no_grad():
        assert close(denoised(from_diffusers(unet(), path).eval(), x), denoised(model, x))
    first = next(iter(old))
    save_file(old | {first.replace(".processor", ""): old[first].clone()}, path)
    refused(from_diffusers, unet(), path, "twice, by two spellings")


def test_dora_goes_to_diffusers_and_back(tmp_path):
    model = medpeft.apply(
        unet(), "lora", head=None, rank=2, dora=True, parts="qkvo", target=["*.attn1", "*.conv1"]
    )
    randomise_adapters(model, size=0.3).eval()
    x = example("diffusion_unet")
    to_diffusers(model, tmp_path / "lora.safetensors")
    theirs = unet()
    theirs.load_lora_adapter(str(tmp_path), weight_name="lora.safetensors", prefix="unet")
    with torch.no_grad():
        assert close(denoised(theirs.eval(), x), denoised(model, x))
        ours = from_diffusers(unet(), tmp_path / "lora.safetensors").eval()
        assert close(denoised(ours, x), denoised(model, x))


def test_a_file_of_kohyas_is_named(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({"lora_unet_conv_in.alpha": torch.ones(())}, path)
    refused(from_diffusers, unet(), path, "read it by from_kohya")
