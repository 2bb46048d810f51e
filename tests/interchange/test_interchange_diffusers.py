"""LoRA to and from the files of diffusers."""

import pytest
import torch
from lora_files import PEFT_WARNINGS, close, refused
from models import example, make, randomise_adapters
from safetensors.torch import load_file, save_file
from torch import nn

import medpeft
from medpeft.interchange import from_diffusers, to_diffusers

pytestmark = PEFT_WARNINGS

peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")


def denoised(unet, x):
    return unet(x, torch.tensor(7), x.flatten(2)[:, :2, :6]).sample


def unet():
    return make("diffusion_unet").unet


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
