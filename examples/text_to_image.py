"""Fine-tune the UNet of a text-to-image diffusion pipeline with any medpeft method.

Offline, on a tiny pipeline that is pretrained on half of the classes and adapted to the others; then on
yours:

    python examples/text_to_image.py --method lora --score_samples 200
    python examples/text_to_image.py --method svdiff --pipeline path/to/stable-diffusion --data my/images

It writes adapter.safetensors (for LoRA also pytorch_lora_weights.safetensors, which diffusers loads),
metrics.json, settings.yaml, loss.png and pictures of a fixed grid of prompts to --output. The same command
goes on after an interruption.
"""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import mean
from typing import Any

try:
    import torch
    import yaml
    from datasets import Dataset
    from diffusion.data import hold_out, of_classes, pixels, read_captioned, to_pixels, within_tokens
    from diffusion.figures import draw_losses, draw_pictures
    from diffusion.latents import encode
    from diffusion.pipelines import generate, image_size, open_pipeline
    from diffusion.scores import find_extractor, score
    from diffusion.settings import Settings, listed, read_command
    from diffusion.svd_cache import caching
    from diffusion.tiny import TINY_SIZE, tiny_pipeline, tiny_unet
    from diffusion.training import Training, fit, restore_training, save_training, start_training
    from lightning.fabric import Fabric
    from trainer.errors import TrainerError
except ModuleNotFoundError as error:
    sys.exit(f"text_to_image.py: {error.name} is not installed. Run: pip install -e '.[diffusion]'")

import medpeft
from medpeft.interchange import to_diffusers

PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; give its exit status."""
    try:
        run(read_command(Settings, __doc__, given))
    except (TrainerError, medpeft.MedpeftError) as error:
        print(f"text_to_image.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on after the last checkpoint.", file=sys.stderr)
        return 130
    return 0


@dataclass
class Task:
    """What a run works on: images to train on and to compare with, their size in pixels, prompts to draw."""

    settings: Settings
    fabric: Fabric
    pipeline: Any
    data: Dataset
    held: Dataset
    size: int
    classes: list[str] | None
    prompts: list[str]


def run(settings: Settings) -> dict[str, Any]:
    """Train, draw and score; give what metrics.json holds, at once where it is there already.

    Raises:
        TrainerError, medpeft.MedpeftError: data, pipeline, method or settings do not fit.
    """
    start = time.perf_counter()
    finished = finished_run(settings)
    if finished:
        print(f"{settings.folder} holds this run already")
        return finished
    fabric = Fabric(accelerator="auto", devices=settings.devices, precision=PRECISIONS[settings.precision])
    fabric.launch()
    task = prepare(settings, fabric)
    before = sample_scores(task, "unadapted")
    report = medpeft.report(adapt(settings, task.pipeline.unet))
    images = {"train": len(task.data), "held_out": len(task.held)}
    fabric.print(f"\n{report}\n\nImages: {images}\n", flush=True)
    training = train_unet(task)
    with training.averaged():
        scores = {"before": before, "after": sample_scores(task, "adapted")}
        record: dict[str, Any] = {"settings": settings.plain, "classes": task.classes, "images": images}
        record |= {"scores": scores, "trainable": report.trainable, "losses": training.losses}
        record["seconds"] = time.perf_counter() - start
        if fabric.is_global_zero:
            write_results(task, record)
    fabric.barrier()
    return record


def finished_run(settings: Settings) -> dict[str, Any] | None:
    """Give the metrics of the run in the settings' folder, if it is finished.

    Raises:
        TrainerError: the folder is that of another run.
    """
    folder = settings.folder
    if not (folder / "last.ckpt").exists():
        return None
    before = yaml.safe_load((folder / "settings.yaml").read_text())
    for name, value in settings.determining.items():
        if before.get(name) != value:
            raise TrainerError(
                f"{folder} is from a run with other settings: --{name} was {before.get(name)!r} and is "
                f"{value!r}. Give the same ones, or choose another --output."
            )
    metrics = folder / "metrics.json"
    found: dict[str, Any] = {}
    if metrics.exists():
        found = json.loads(metrics.read_text())
    return found if found.get("settings") == settings.plain else None


def prepare(settings: Settings, fabric: Fabric) -> Task:
    """Read the data and open the pipeline; without one, make the tiny one of the classes that are not new.

    Raises:
        TrainerError: data or pipeline do not fit.
    """
    pipeline, size = None, settings.image_size or TINY_SIZE
    with torch.device("meta"):
        unet = tiny_unet()
    if settings.pipeline:
        pipeline = open_pipeline(settings.pipeline)
        size, unet = settings.image_size or image_size(pipeline), pipeline.unet
    # A wrong method is refused before images are read and a pipeline is pretrained.
    medpeft.plan(unet, settings.methods, target=settings.target, head=None)
    everything = read_captioned(settings.data, settings.caption, settings.patient_column)
    texts = dict(zip(everything["label"], everything["text"], strict=True))
    names, classes = list(texts), listed(settings.new_class)
    if pipeline is None:
        classes = classes or names[(len(names) + 1) // 2 :]
    old = [name for name in names if name not in (classes or ())]
    if classes and len(old) + len(classes) != len(names):
        raise TrainerError(
            f"--new_class {', '.join(classes)}: the data have the classes {', '.join(names[:8])}."
        )
    if pipeline is None and not (old and classes):
        raise TrainerError("The tiny pipeline needs a class to be pretrained on and a --new_class.")
    train, held = hold_out(everything, settings.held_out, settings.seed)
    data, held = of_classes(train, classes or names), of_classes(held, classes or names)
    if pipeline is None:
        with fabric.rank_zero_first():
            pipeline = tiny_pipeline(settings, size, train, old)
    if settings.tokens:
        data, held = (within_tokens(part, pipeline.tokenizer, *settings.tokens) for part in (data, held))
    prompts = listed(settings.prompt) or list(dict.fromkeys(texts.values()))[:4]
    return Task(settings, fabric, pipeline.to(fabric.device), data, held, size, classes, prompts)


def adapt(settings: Settings, unet: Any) -> Any:
    """Apply the method to the UNet, which has no head, where it lies: decompositions are computed there."""
    with caching(settings.svd_cache) if settings.svd_cache else nullcontext():
        medpeft.apply(unet, settings.methods, target=settings.target, head=None, seed=settings.seed)
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def train_unet(task: Task) -> Training:
    """Train the adapted UNet, from the start or from the last checkpoint."""
    settings, fabric, pipeline, folder = task.settings, task.fabric, task.pipeline, task.settings.folder
    with fabric.rank_zero_first():
        latents = encode(pipeline.vae, task.data, task.size, settings.latents)
    training = start_training(fabric, pipeline.unet, settings)
    if fabric.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.yaml").write_text(yaml.safe_dump(settings.plain, sort_keys=False))
    checkpoint = folder / "last.ckpt"
    if checkpoint.exists():
        restore_training(fabric, training, checkpoint)
        fabric.print(f"Going on after step {len(training.losses)}")

    def after_step(training: Training, step: int) -> None:
        last = step == settings.steps
        if last or step % settings.save_every == 0:
            save_training(fabric, training, checkpoint)
            recent = mean(training.losses[-settings.save_every :])
            fabric.print(f"step {step:>6}  loss {recent:.4f}", flush=True)
        if (last or step % settings.sample_every == 0) and fabric.is_global_zero:
            with training.averaged():
                rows = {prompt: pictures(task, [prompt] * 4) for prompt in task.prompts}
            title = f"{settings.method}, step {step}"
            draw_pictures(rows, title, folder / "samples" / f"step-{step:06}.png")

    fit(fabric, training, pipeline, latents, settings, after_step)
    return training


def pictures(task: Task, texts: list[str]) -> torch.Tensor:
    """Generate one image (3, size, size), uint8, for each text."""
    steps, guidance, seed = task.settings.inference_steps, task.settings.guidance, task.settings.seed
    with task.fabric.autocast():
        images = generate(task.pipeline, texts, seed=seed, size=task.size, steps=steps, guidance=guidance)
    return to_pixels(images)


def sample_scores(task: Task, name: str) -> dict[str, Any] | None:
    """Score images generated from held-out texts against those held out; None if that was not asked for."""
    count = min(task.settings.score_samples, len(task.held))
    if not count or not task.fabric.is_global_zero:
        return None
    # Spread over the data, whose order may be that of the classes.
    some = task.held.select([i * len(task.held) // count for i in range(count)])
    real, generated = pixels(some["image"], task.size), pictures(task, list(some["text"]))
    found = score(real, generated, find_extractor(task.settings.inception_weights))
    print(f"{name}: FID {found['fid']:.2f}, KID {found['kid']:.4f} ± {found['kid_std']:.4f}, {count} images")
    print(f"{found['extractor']}. {found['warning']}", flush=True)
    return found


def write_results(task: Task, record: dict[str, Any]) -> None:
    """Write the adapter, for diffusers too where that has a format, metrics and the curve of the loss."""
    settings, unet, folder = task.settings, task.pipeline.unet, task.settings.folder
    metadata = {"pipeline": settings.pipeline or "tiny", "image_size": task.size, "classes": task.classes}
    metadata |= {"steps": settings.steps, "scores": record["scores"]["after"]}
    medpeft.save(unet, folder / "adapter.safetensors", metadata=metadata)
    methods = settings.methods
    if list(methods) == ["lora"] and not methods["lora"].get("dora"):
        to_diffusers(unet, folder / "pytorch_lora_weights.safetensors")
    title = f"{settings.method}: {record['trainable']:,} parameters"
    draw_losses(record["losses"], title, folder / "loss.png")
    # Last: it says that the run is finished.
    (folder / "metrics.json").write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    print(f"Saved to {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")


if __name__ == "__main__":
    sys.exit(main())
