"""Pipelines of Stable Diffusion and SDXL, adapted in every way, generate the same images merged and in diffusers."""

import numpy as np
import pytest
import text_to_image
import torch
from denoisers import STRATEGIES
from diffusion.pipelines import open_pipeline
from diffusion.tiny import build_tiny
from models import randomise_adapters
from small_diffusion import SIDE, TEXTS, flags, images_of, run, settings

import medpeft


@pytest.fixture
def pipeline(tiny_pipeline):
    return open_pipeline(str(tiny_pipeline))


def test_gradient_checkpointing_changes_no_gradient(pipeline):
    unet = randomise_adapters(medpeft.apply(pipeline.unet, "lora", head=None)).train()
    inputs = torch.randn(1, 4, 16, 16), torch.tensor([7]), torch.randn(1, 77, 48)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.zero_grad()
        unet(*inputs).sample.square().mean().backward()
        found.append([p.grad.clone() for p in unet.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*found, strict=True))
    assert any(gradient.any() for gradient in found[0])


def test_images_do_not_depend_on_the_batch_size(pipeline, monkeypatch):
    together = images_of(pipeline)
    monkeypatch.setattr("diffusion.pipelines.BATCH", 1)
    assert torch.allclose(images_of(pipeline), together, atol=1e-5)


# Every strategy


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_merged_pipeline_generates_the_same_images_as_the_adapted_one(
    strategy, pipeline, tiny_pipeline, tmp_path
):
    base = images_of(pipeline)
    text_to_image.adapt(settings("--pipeline", tiny_pipeline, "--method", strategy), pipeline.unet)
    unet = randomise_adapters(pipeline.unet, size=0.3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if p.requires_grad and ".adapters." not in name:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    adapted = images_of(pipeline)
    assert not torch.allclose(adapted, base, atol=1e-2)

    medpeft.save(unet, tmp_path / "adapter.safetensors")
    pipeline.unet = medpeft.load(open_pipeline(str(tiny_pipeline)).unet, tmp_path / "adapter.safetensors")
    assert torch.allclose(images_of(pipeline), adapted, atol=1e-5)

    medpeft.merge(pipeline.unet)
    assert torch.allclose(images_of(pipeline), adapted, atol=1e-4)


# SDXL


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """A tiny pipeline of the kind of SDXL: two text encoders, and a UNet that is told the image's size."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModelWithProjection

    folder, parts = tmp_path_factory.mktemp("sdxl"), build_tiny(TEXTS.values(), SIDE, seed=0)
    second = CLIPTextModelWithProjection(parts.text_encoder.config)
    width = second.config.projection_dim
    pooled = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    unet = UNet2DConditionModel.from_config(
        parts.unet.config, **pooled, block_out_channels=(16, 32), cross_attention_dim=2 * 48,
        projection_class_embeddings_input_dim=6 * 4 + width,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        parts.vae,
        parts.text_encoder,
        second,
        parts.tokenizer,
        parts.tokenizer,
        unet,
        EulerDiscreteScheduler(),
    ).save_pretrained(folder)
    return folder


def test_sdxl_trains_and_its_lora_file_generates_the_same_in_diffusers(spots, sdxl, tmp_path):
    plain = ["--steps", 3, "--lr", 0.05, "--image_size", SIDE, "--cache", tmp_path / "latents"]
    given = flags(spots, sdxl, tmp_path, *plain)
    assert np.isfinite(run(*given)["losses"]).all()
    ours, theirs = open_pipeline(str(sdxl)), open_pipeline(str(sdxl))
    base = images_of(ours)
    medpeft.load(ours.unet, tmp_path / "adapter.safetensors")
    theirs.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")

    assert torch.allclose(images_of(theirs), images_of(ours), atol=1e-5)
    assert not torch.allclose(images_of(ours), base, atol=1e-4)
