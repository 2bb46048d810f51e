"""The text-to-image example trains, resumes, draws and scores, and what it saves gives the same images elsewhere."""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import randomise_adapters
from PIL import Image
from safetensors.torch import load_file

import medpeft

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import generate as generate_script
import text_to_image
from diffusion.flags import STRATEGIES, make_parser, parse
from diffusion.pipelines import generate, open_pipeline, quiet
from diffusion.tiny import build_tiny, make_tokenizer
from trainer.errors import TrainerError

SIDE = 16
TEXTS = {"light": "a light spot", "dark": "a dark spot"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sixteen noisy spots, light and dark, with their texts in a table."""
    root, rng = tmp_path_factory.mktemp("spots"), np.random.default_rng(0)
    lines = []
    for i in range(16):
        name = "light" if i % 2 else "dark"
        image = rng.normal(110, 10, (SIDE, SIDE))
        image[4:12, 4:12] += 90 if i % 2 else -90
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": TEXTS[name], "label": name}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny pipeline with a yet smaller UNet, both as they are drawn; no test changes it."""
    from diffusers import UNet2DConditionModel

    folder = tmp_path_factory.mktemp("pipeline")
    pipeline = build_tiny(TEXTS.values(), SIDE, seed=0)
    pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, block_out_channels=(16, 32))
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def pipeline(folder):
    return open_pipeline(str(folder))


def flags(data, folder, output, *more):
    small = ["--batch-size", "4", "--inference-steps", "2", "--sample-every", "100", "--save-every", "2"]
    return ["--data", data, "--pipeline", folder, "--output", output, *small, *more]


def run(*given):
    return text_to_image.run(parse(make_parser(""), [str(flag) for flag in given]))


def messages(capsys, *given):
    assert text_to_image.main([str(flag) for flag in given]) == 2
    return capsys.readouterr().err


def images_of(pipeline, **options):
    return generate(pipeline, list(TEXTS.values()), seed=0, size=SIDE, steps=2, **options)


# A whole run


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """From nothing: a tiny pipeline that is pretrained on dark spots for a moment, then LoRA on light ones."""
    output = tmp_path_factory.mktemp("runs") / "lora"
    steps = ["--tiny-steps", 4, "--tiny-autoencoder-steps", 4, "--steps", 6, "--lr", 0.02]
    small = ["--batch-size", 4, "--image-size", SIDE, "--sample-every", 4, "--inference-steps", 2]
    record = run("--data", data, "--output", output, *steps, *small, "--option", "parts=qkvo", "--score-samples", 2)
    return output, record


def test_training_lowers_the_loss(data, folder, tmp_path):
    record = run(*flags(data, folder, tmp_path, "--method", "full", "--steps", 40, "--lr", 2e-3, "--snr-gamma", 0))
    losses = record["losses"]
    assert len(losses) == 40
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:4])


def test_the_tiny_pipeline_is_pretrained_on_the_first_half_of_the_classes_and_adapted_to_the_second(finished):
    output, record = finished
    kept = next(output.parent.glob("tiny-pipeline-*"))
    assert json.loads((kept / "pretrained_on.json").read_text())["classes"] == ["dark"]
    assert record["classes"] == ["light"]
    assert sum(record["images"].values()) == list(TEXTS).index("dark") * 8


def test_what_a_run_writes(finished):
    output, record = finished
    written = {path.name for path in output.iterdir()}
    named = {"adapter.safetensors", "pytorch_lora_weights.safetensors", "metrics.json", "loss.png", "samples", "last.ckpt"}
    assert written == named
    assert [path.name for path in sorted((output / "samples").iterdir())] == ["step-000004.png", "step-000006.png"]
    assert json.loads((output / "metrics.json").read_text())["trainable"] == record["trainable"]
    assert medpeft.inspect(output / "adapter.safetensors").metadata["classes"] == ["light"]


def test_a_plain_diffusers_pipeline_loads_the_lora_file_and_generates_the_same(finished):
    output, _ = finished
    kept = str(next(output.parent.glob("tiny-pipeline-*")))
    ours, theirs = open_pipeline(kept), open_pipeline(kept)
    base = images_of(theirs)
    medpeft.load(ours.unet, output / "adapter.safetensors")

    theirs.load_lora_weights(str(output))

    assert torch.allclose(images_of(theirs), images_of(ours), atol=1e-5)
    assert not torch.allclose(images_of(theirs), base, atol=1e-3)


def test_the_averaged_weights_are_what_is_saved(finished):
    output, _ = finished
    content = torch.load(output / "last.ckpt", weights_only=True)
    saved = load_file(output / "adapter.safetensors")
    assert set(saved) == set(content["average"])
    assert all(torch.equal(saved[name], value) for name, value in content["average"].items())
    assert any(not torch.equal(content["trained"][name], value) for name, value in content["average"].items())


# Resuming


def test_a_resumed_run_repeats_the_uninterrupted_one(data, folder, tmp_path, monkeypatch):
    whole = run(*flags(data, folder, tmp_path / "whole", "--method", "norm", "--steps", 4))
    save = text_to_image.save_training

    def save_and_stop(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(text_to_image, "save_training", save_and_stop)
    stopped = flags(data, folder, tmp_path / "parts", "--method", "norm", "--steps", 4, "--cache", tmp_path / "latents")
    assert text_to_image.main([str(flag) for flag in stopped]) == 130
    monkeypatch.setattr(text_to_image, "save_training", save)
    parts = run(*stopped, "--resume")

    assert parts["losses"] == whole["losses"]
    one, two = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_resuming_with_other_settings_is_refused(data, folder, tmp_path, capsys):
    run(*flags(data, folder, tmp_path, "--method", "norm", "--steps", 1))

    said = messages(capsys, *flags(data, folder, tmp_path, "--method", "norm", "--steps", 1, "--ema", 0.5, "--resume"))

    assert "--ema was 0.99 and is 0.5" in said


# Every strategy


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_merged_pipeline_generates_the_same_images_as_the_adapted_one(strategy, pipeline, folder, tmp_path):
    args = parse(make_parser(""), ["--pipeline", str(folder), "--method", strategy])
    base = images_of(pipeline)
    text_to_image.adapt(args, pipeline.unet)
    unet = randomise_adapters(pipeline.unet, size=0.3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if p.requires_grad and ".adapters." not in name:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    adapted = images_of(pipeline)
    assert not torch.allclose(adapted, base, atol=1e-2)

    medpeft.save(unet, tmp_path / "adapter.safetensors")
    pipeline.unet = medpeft.load(open_pipeline(str(folder)).unet, tmp_path / "adapter.safetensors")
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
        parts.vae, parts.text_encoder, second, parts.tokenizer, parts.tokenizer, unet, EulerDiscreteScheduler()
    ).save_pretrained(folder)
    return folder


def test_sdxl_trains_and_its_lora_file_generates_the_same_in_diffusers(data, sdxl, tmp_path):
    given = flags(data, sdxl, tmp_path, "--steps", 3, "--lr", 0.05, "--image-size", SIDE, "--cache", tmp_path / "latents")
    assert np.isfinite(run(*given)["losses"]).all()
    ours, theirs = open_pipeline(str(sdxl)), open_pipeline(str(sdxl))
    base = images_of(ours)
    medpeft.load(ours.unet, tmp_path / "adapter.safetensors")
    theirs.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")

    assert torch.allclose(images_of(theirs), images_of(ours), atol=1e-5)
    assert not torch.allclose(images_of(ours), base, atol=1e-4)


# Options of training


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


def test_half_precision_and_checkpointing_train(data, folder, tmp_path):
    options = ["--precision", "bf16", "--gradient-checkpointing", "--method", "svdiff", "--svd-cache", tmp_path / "svd"]
    record = run(*flags(data, folder, tmp_path / "run", "--steps", 2, *options))
    assert np.isfinite(record["losses"]).all()
    assert not (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()


# The tiny pipeline


def test_a_tokenizer_has_one_token_for_each_word_and_spells_others():
    tokenizer = make_tokenizer(["Breast ultrasound, benign", "normal"])
    assert tokenizer.tokenize("ultrasound, benign normal") == ["ultrasound</w>", ",</w>", "benign</w>", "normal</w>"]
    assert tokenizer.unk_token not in tokenizer.tokenize("malignant (2.5-3%)")
    assert make_tokenizer(["normal", "breast ultrasound benign"]).get_vocab() == tokenizer.get_vocab()


def test_the_tiny_pipeline_is_the_same_each_time():
    one, two = (quiet(build_tiny(TEXTS.values(), SIDE, seed=3)) for _ in range(2))
    assert torch.equal(images_of(one), images_of(two))


def test_a_size_that_the_tiny_pipeline_cannot_take_is_refused():
    with pytest.raises(TrainerError, match="Use 16, 32, 64 or 128"):
        build_tiny([], 48, seed=0)


def test_a_tiny_pipeline_pretrained_otherwise_is_not_taken(finished, data, capsys):
    output, _ = finished
    said = messages(capsys, "--data", data, "--output", output.parent / "other", "--image-size", SIDE)
    assert "was pretrained with steps [4, 4], and [600, 1500] is asked for" in said


# Generating


def test_images_do_not_depend_on_the_batch_size(pipeline):
    assert torch.allclose(images_of(pipeline, batch_size=1), images_of(pipeline, batch_size=2), atol=1e-5)


def test_adapters_are_compared_from_the_same_noise(finished, tmp_path):
    output, _ = finished
    adapter = output / "adapter.safetensors"
    given = ["--pipeline", next(output.parent.glob("tiny-pipeline-*")), "--adapter", adapter, adapter, "--images", 2]
    given += ["--prompt", "a light spot", "--inference-steps", 2, "--output", tmp_path]
    images = generate_script.run(generate_script.parse([str(flag) for flag in given]))
    merged = generate_script.run(generate_script.parse([str(flag) for flag in (*given, "--merge")]))

    assert list(images) == ["no adapter", "lora lora 1", "lora lora 2"]
    assert torch.equal(images["lora lora 1"], images["lora lora 2"])
    assert not torch.equal(images["no adapter"], images["lora lora 1"])
    assert torch.equal(merged["no adapter"], images["no adapter"])
    assert (merged["lora lora 1"].int() - images["lora lora 1"].int()).abs().max() <= 1
    assert (tmp_path / "comparison.png").exists()
    with Image.open(tmp_path / "lora-lora-1" / "prompt-01-002.png") as image:
        assert np.array_equal(np.asarray(image), images["lora lora 1"][1].permute(1, 2, 0))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--pipeline", "nowhere", "--prompt", "x"], "--pipeline nowhere could not be opened"),
        (["--pipeline", "p", "--prompt", "x", "--no-base"], "leaves nothing to generate with"),
        (["--pipeline", "p", "--prompt", "x", "--images", "0"], "--images is 0"),
    ],
)
def test_wrong_flags_of_generate_are_answered_with_what_to_do(given, said, capsys):
    assert generate_script.main(given) == 2
    assert said in capsys.readouterr().err


# Wrong flags


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--new-class", "grey"], "--new-class grey is no class of the data, which have dark, light"),
        (["--new-class", "light", "--new-class", "dark"], "the tiny pipeline needs one to be pretrained on"),
        (["--new-class", "dark", "--held-out", "0.04"], "dark has no image in one part of the split"),
        (["--method", "lra"], "Did you mean 'lora'?"),
        (["--pipeline", "nowhere"], "--pipeline nowhere could not be opened"),
        (["--steps", "0"], "--steps is 0"),
        (["--held-out", "1"], "--held-out is 1.0"),
        (["--lr", "-1"], "--lr is -1.0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--data", "nowhere.csv"], "nowhere.csv does not exist"),
    ],
)
def test_wrong_flags_are_answered_with_what_to_do(more, said, data, folder, tmp_path, capsys):
    pipeline = [] if "--new-class" in more else ["--pipeline", folder]
    assert said in messages(capsys, "--data", data, "--image-size", SIDE, "--output", tmp_path, *pipeline, *more)


def test_without_classes_every_image_trains_and_no_list_of_texts_is_saved(data, folder, tmp_path):
    table = tmp_path / "reports.csv"
    rows = [f"{data / str(i)}.png,report {i}" for i in range(6)]
    table.write_text("\n".join(["file,text", *rows]))
    record = run(*flags(table, folder, tmp_path / "run", "--method", "norm", "--steps", 1))
    assert sum(record["images"].values()) == 6
    assert medpeft.inspect(tmp_path / "run" / "adapter.safetensors").classes is None


def test_another_kind_of_pipeline_is_refused_by_name(tmp_path, capsys):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)

    assert "is a DDPMPipeline; this example trains those of Stable Diffusion" in messages(capsys, "--pipeline", tmp_path)


def test_attention_means_the_study_s_blocks_unless_said_otherwise():
    assert parse(make_parser(""), ["--method", "bias+attention"]).option == {"bias": {}, "attention": {"scope": "block"}}
    given = ["--method", "attention", "--option", "scope=layer"]
    assert copy.deepcopy(parse(make_parser(""), given).option) == {"attention": {"scope": "layer"}}
