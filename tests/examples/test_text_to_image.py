"""The text-to-image example trains, resumes, draws, and what it saves gives the same images elsewhere."""

import json

import generate as generate_script
import numpy as np
import pytest
import text_to_image
import torch
from diffusion.pipelines import open_pipeline
from PIL import Image
from safetensors.torch import load_file
from small_diffusion import SIDE, TEXTS, flags, images_of, messages, run

import medpeft

# A whole run


@pytest.fixture(scope="module")
def finished(spots, tmp_path_factory):
    """From nothing: a tiny pipeline that is pretrained on dark spots for a moment, then LoRA on light ones."""
    output = tmp_path_factory.mktemp("runs") / "lora"
    steps = ["--tiny_steps", 10, "--steps", 6, "--lr", 0.02, "--ema", 0.5]
    small = ["--batch_size", 4, "--image_size", SIDE, "--sample_every", 4, "--inference_steps", 2]
    scored = ["--option.parts=qkvo", "--score_samples", 2]
    record = run("--data", spots, "--output", output, *steps, *small, *scored)
    return output, record


def test_training_lowers_the_loss(spots, tiny_pipeline, tmp_path):
    plain = ["--method", "full", "--steps", 40, "--lr", 2e-3, "--snr_gamma", 0]
    record = run(*flags(spots, tiny_pipeline, tmp_path, *plain))
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
    named = {
        "adapter.safetensors",
        "pytorch_lora_weights.safetensors",
        "metrics.json",
        "settings.yaml",
        "loss.png",
        "samples",
        "last.ckpt",
    }
    assert written == named
    assert [path.name for path in sorted((output / "samples").iterdir())] == [
        "step-000004.png",
        "step-000006.png",
    ]
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
    assert set(saved) == set(content["unet"]), "a checkpoint holds nothing frozen"
    averages = content["average"]["shadow_params"]
    for average, name in zip(averages, content["unet"], strict=True):
        assert torch.equal(saved[name], average)
    assert any(not torch.equal(saved[name], last) for name, last in content["unet"].items())


def test_a_tiny_pipeline_pretrained_otherwise_is_not_taken(finished, spots, capsys):
    output, _ = finished
    said = messages(capsys, "--data", spots, "--output", output.parent / "other", "--image_size", SIDE)
    assert "'steps': 10}, and {" in said
    assert "'steps': 1500} is asked for" in said


# Going on


def test_an_interrupted_run_repeats_the_uninterrupted_one(spots, tiny_pipeline, tmp_path, monkeypatch):
    given = ["--method", "norm", "--steps", 4, "--ema", 0.5, "--weight_decay", 0.1]
    whole = run(*flags(spots, tiny_pipeline, tmp_path / "whole", *given))
    save = text_to_image.save_training

    def save_and_stop(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(text_to_image, "save_training", save_and_stop)
    more = [*given, "--cache", tmp_path / "latents"]
    given = flags(spots, tiny_pipeline, tmp_path / "parts", *more)
    assert text_to_image.main([str(flag) for flag in given]) == 130
    monkeypatch.setattr(text_to_image, "save_training", save)
    parts = run(*given)

    assert parts["losses"] == whole["losses"]
    one, two = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_finished_run_is_not_repeated_and_only_scored_where_that_is_new(
    spots, tiny_pipeline, tmp_path, monkeypatch
):
    given = flags(spots, tiny_pipeline, tmp_path, "--method", "norm", "--steps", 1)
    first = run(*given)
    monkeypatch.setattr("diffusion.training.take_step", lambda *_: pytest.fail("trained again"))

    assert run(*given) == json.loads(json.dumps(first))
    scored = run(*given, "--score_samples", 2)
    assert scored["losses"] == first["losses"]
    assert scored["scores"]["after"]["generated"] == 2


def test_other_settings_in_the_same_folder_are_refused(spots, tiny_pipeline, tmp_path, capsys):
    run(*flags(spots, tiny_pipeline, tmp_path, "--method", "norm", "--steps", 1))

    said = messages(
        capsys, *flags(spots, tiny_pipeline, tmp_path, "--method", "norm", "--steps", 1, "--ema", 0.5)
    )

    assert "--ema was 0.99 and is 0.5" in said


# Options of training


def test_half_precision_and_checkpointing_train(spots, tiny_pipeline, tmp_path):
    options = ["--precision", "bf16", "--gradient_checkpointing", "true"]
    options += ["--method", "svdiff", "--svd_cache", tmp_path / "svd", "--steps", 2]
    record = run(*flags(spots, tiny_pipeline, tmp_path / "run", *options))
    assert np.isfinite(record["losses"]).all()
    assert any((tmp_path / "svd").iterdir())
    assert not (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()


def test_without_classes_every_image_trains_and_no_list_of_texts_is_saved(spots, tiny_pipeline, tmp_path):
    reports = tmp_path / "reports"
    reports.mkdir()
    lines = []
    for i in range(6):
        (reports / f"{i}.png").write_bytes((spots / f"{i}.png").read_bytes())
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a report of {i}"}))
    (reports / "metadata.jsonl").write_text("\n".join(lines))
    more = ["--method", "norm", "--steps", 1, "--tokens=[2,77]"]
    record = run(*flags(reports, tiny_pipeline, tmp_path / "run", *more))
    assert sum(record["images"].values()) == 6
    assert medpeft.inspect(tmp_path / "run" / "adapter.safetensors").classes is None


# Generating


def test_adapters_are_compared_from_the_same_noise(finished, tmp_path, capsys):
    output, _ = finished
    adapter, other = output / "adapter.safetensors", tmp_path / "other.safetensors"
    small = medpeft.apply(torch.nn.Sequential(torch.nn.Linear(2, 2)), "ssf", head=None)
    medpeft.save(small, other)
    given = ["--pipeline", next(output.parent.glob("tiny-pipeline-*")), "--adapter", adapter, adapter, other]
    given += ["--images", 2, "--prompt", "a light spot", "--inference_steps", 2, "--output", tmp_path]

    def images_with(*more):
        return generate_script.run(generate_script.read_settings([str(flag) for flag in (*given, *more)]))

    images, merged = images_with(), images_with("--merge", "true")

    assert list(images) == ["no adapter", "lora lora 1", "lora lora 2"]
    assert f"{other} is left out: " in capsys.readouterr().err
    assert torch.equal(images["lora lora 1"], images["lora lora 2"])
    assert not torch.equal(images["no adapter"], images["lora lora 1"])
    assert torch.equal(merged["no adapter"], images["no adapter"])
    assert (merged["lora lora 1"].int() - images["lora lora 1"].int()).abs().max() <= 1
    assert (tmp_path / "comparison.png").exists()
    with Image.open(tmp_path / "lora-lora-1" / "prompt-01-002.png") as image:
        assert np.array_equal(np.asarray(image), images["lora lora 1"][1].permute(1, 2, 0))


def test_no_adapter_that_fits_leaves_nothing_to_generate(tiny_pipeline, tmp_path, capsys):
    given = ["--pipeline", str(tiny_pipeline), "--base", "false", "--prompt", "x", "--output", str(tmp_path)]
    assert generate_script.main(given) == 2
    assert "nothing was generated" in capsys.readouterr().err
