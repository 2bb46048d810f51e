"""Fine-tune the UNet of a text-to-image diffusion pipeline with any medpeft method.

Offline, on a tiny pipeline that is pretrained on half of the classes and adapted to the others; then on your own images:

    python examples/text_to_image.py --method lora --score-samples 200
    python examples/text_to_image.py --method svdiff --pipeline path/to/stable-diffusion --data my/metadata.jsonl

It writes adapter.safetensors (for LoRA also pytorch_lora_weights.safetensors, which diffusers loads), metrics.json, loss.png
and pictures of a fixed grid of prompts to --output.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusion.cache import Encoded, encode
from diffusion.captions import Captioned, halves, hold_out, read_captioned, to_pixels, within_tokens
from diffusion.figures import draw_losses, draw_pictures
from diffusion.flags import PRECISIONS, changed, make_parser, parse
from diffusion.loop import (
    Recipe,
    Training,
    fit,
    load_training,
    restore_training,
    save_training,
    start_training,
)
from diffusion.pipelines import generate, image_size, noise_schedule, open_pipeline
from diffusion.pretrain import tiny_pipeline
from diffusion.scores import find_extractor, score
from diffusion.svd_cache import caching
from diffusion.tiny import TINY_SIZE
from lightning.fabric import Fabric
from trainer.errors import TrainerError
from trainer.flags import settings_of
from trainer.metrics import without_nan

import medpeft
from medpeft.interchange import to_diffusers


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; give its exit status."""
    try:
        run(parse(make_parser(__doc__), given))
    except (TrainerError, medpeft.MedpeftError) as error:
        print(f"text_to_image.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. Go on after the last checkpoint with --resume.", file=sys.stderr)
        return 130
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train, draw and score; give what metrics.json holds.

    Raises:
        TrainerError, medpeft.MedpeftError: data, pipeline, method or flags do not fit.
    """
    start = time.perf_counter()
    fabric = Fabric(accelerator="auto", devices=args.devices, precision=PRECISIONS[args.precision])  # type: ignore[arg-type]
    fabric.launch()
    data, held, pipeline = prepare(fabric, args)
    before = sample_scores(fabric, args, pipeline, held, "unadapted")

    adapt(args, pipeline.unet, fabric.device)
    report = medpeft.report(pipeline.unet)
    fabric.print(f"\n{report}\n\n{len(data)} images to train on, {len(held)} held out\n", flush=True)
    with fabric.rank_zero_first():
        encoded = encode(pipeline, data, args.cache, fabric.device)
    training = train_unet(fabric, args, pipeline, encoded)

    training.average.put(training.unet)
    after = sample_scores(fabric, args, pipeline, held, "adapted")
    record = {
        "settings": settings_of(args),
        "classes": args.new_class,
        "images": {"train": len(data), "held_out": len(held)},
        "trainable": report.trainable,
        "losses": training.losses,
        "scores": {"before": before, "after": after},
        "seconds": time.perf_counter() - start,
    }
    if fabric.is_global_zero:
        write_results(args, pipeline, record)
    fabric.barrier()
    return record


def prepare(fabric: Fabric, args: argparse.Namespace) -> tuple[Captioned, Captioned, Any]:
    """Read the data and open the pipeline; give the images to train on, those held out, and the pipeline.

    Fills in `--image-size`, `--prompt`, and for the tiny pipeline `--new-class`, where they were left out.
    """
    pipeline = open_pipeline(args.pipeline) if args.pipeline else None
    args.image_size = args.image_size or (image_size(pipeline) if pipeline else TINY_SIZE)
    everything = read_captioned(args.data, args.image_size, args.caption, args.patient_column)
    classes = sorted(set(everything.classes))
    for name in args.new_class or ():
        if name not in classes:
            raise TrainerError(
                f"--new-class {name} is no class of the data, which have {', '.join(classes[:8])}."
            )
    args.prompt = args.prompt or everything.prompts(4)
    if pipeline is None:
        args.new_class = args.new_class or halves(everything)[1]
    train, held = hold_out(everything, args.held_out, args.seed)
    data, held = chosen(train, args.new_class), chosen(held, args.new_class)
    if pipeline is None:
        with fabric.rank_zero_first():
            pipeline = open_tiny(args, train, [name for name in classes if name not in args.new_class])
    if args.tokens:
        data, held = (within_tokens(part, pipeline.tokenizer, *args.tokens) for part in (data, held))
    return data, held, pipeline


def chosen(data: Captioned, classes: list[str] | None) -> Captioned:
    """Take the images of some classes, all if none is named.

    Raises:
        TrainerError: there is none in this part of the split.
    """
    found = data.of(classes) if classes else data
    if not len(found):
        raise TrainerError(
            f"{', '.join(classes or [])} has no image in one part of the split. Try another --seed, or add images."
        )
    return found


def open_tiny(args: argparse.Namespace, data: Captioned, classes: list[str]) -> Any:
    """Open the tiny pipeline, pretrained on some classes."""
    if not classes:
        raise TrainerError(
            "--new-class names every class of the data; the tiny pipeline needs one to be pretrained on."
        )
    return tiny_pipeline(
        data,
        classes,
        args.tiny_folder,
        cache=args.cache,
        steps=(args.tiny_autoencoder_steps, args.tiny_steps),
        seed=args.seed,
    )


def adapt(args: argparse.Namespace, unet: Any, device: torch.device | str = "cpu") -> None:
    """Apply the method to the UNet, which has no head, on the device, where decompositions are computed."""
    unet.to(device)
    with caching(args.svd_cache) if args.svd_cache else nullcontext():
        medpeft.apply(unet, args.option, target=args.target, head=None, seed=args.seed)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()


def train_unet(fabric: Fabric, args: argparse.Namespace, pipeline: Any, encoded: Encoded) -> Training:
    """Train the adapted UNet, from the start or from the last checkpoint."""
    recipe = Recipe(args.steps, args.batch_size, args.snr_gamma, args.drop_text, args.ema, args.seed)
    training = start_training(fabric, pipeline.unet, recipe, lr=args.lr, weight_decay=args.weight_decay)
    checkpoint = args.output / "last.ckpt"
    args.output.mkdir(parents=True, exist_ok=True)
    if args.resume:
        resume(fabric, args, training, checkpoint)

    def after_step(training: Training) -> None:
        last = training.step == args.steps
        if (last or training.step % args.save_every == 0) and fabric.is_global_zero:
            save_training(training, settings_of(args), checkpoint)
            recent = training.losses[-args.save_every :]
            print(f"step {training.step:>6}  loss {sum(recent) / len(recent):.4f}", flush=True)
        if last or training.step % args.sample_every == 0:
            draw_progress(fabric, args, pipeline, training)

    fit(fabric, training, noise_schedule(pipeline), encoded, recipe, after_step)
    return training


def resume(fabric: Fabric, args: argparse.Namespace, training: Training, checkpoint: Path) -> None:
    """Go on from a checkpoint of a run with the same settings, if there is one."""
    if not checkpoint.exists():
        fabric.print(f"{args.output} has no last.ckpt: beginning with step 1")
        return
    content = load_training(checkpoint)
    differing = changed(content["settings"], settings_of(args))
    if differing:
        raise TrainerError(
            f"{checkpoint} is from a run with other settings: {'; '.join(differing)}. Resume with the same ones, or choose "
            "another --output."
        )
    restore_training(training, content)
    fabric.print(f"Resumed after step {training.step}")


def draw_progress(fabric: Fabric, args: argparse.Namespace, pipeline: Any, training: Training) -> None:
    """Draw the prompts, four times each, with the averaged weights; one device does it."""
    if fabric.is_global_zero:
        with training.average.used(training.unet):
            images = pictures(fabric, args, pipeline, [prompt for prompt in args.prompt for _ in range(4)])
        rows = {prompt: images[4 * i : 4 * i + 4] for i, prompt in enumerate(args.prompt)}
        title = f"{args.method}, step {training.step}"
        draw_pictures(rows, title, args.output / "samples" / f"step-{training.step:06}.png")
    fabric.barrier()


def pictures(fabric: Fabric, args: argparse.Namespace, pipeline: Any, prompts: list[str]) -> torch.Tensor:
    """Generate one image (3, size, size), uint8, for each prompt."""
    with fabric.autocast():
        images = generate(
            pipeline,
            prompts,
            seed=args.seed,
            size=args.image_size,
            steps=args.inference_steps,
            guidance=args.guidance,
            device=fabric.device,
        )
    return to_pixels(images)


def sample_scores(
    fabric: Fabric, args: argparse.Namespace, pipeline: Any, held: Captioned, name: str
) -> dict[str, Any] | None:
    """Score images generated from the held-out texts against the held-out images; None where that was not asked for."""
    count = min(args.score_samples, len(held))
    if not count or not fabric.is_global_zero:
        return None
    # Spread over the data, whose order may be that of the classes.
    rows = [i * len(held) // count for i in range(count)]
    found = score(
        held.pixels(rows),
        pictures(fabric, args, pipeline, [held.texts[i] for i in rows]),
        find_extractor(args.inception_weights),
    )
    print(f"{name}: {found}", flush=True)
    if found.warning and name == "adapted":
        print(f"Warning: {found.warning}", flush=True)
    return found.as_dict()


def write_results(args: argparse.Namespace, pipeline: Any, record: dict[str, Any]) -> None:
    """Write the adapter, for diffusers too where that has a format for it, the metrics and the curve of the loss."""
    metadata = {
        "pipeline": args.pipeline or "tiny",
        "image_size": args.image_size,
        "classes": record["classes"],
        "steps": args.steps,
        "scores": record["scores"]["after"],
    }
    medpeft.save(pipeline.unet, args.output / "adapter.safetensors", metadata=metadata)
    files = ["adapter.safetensors", "metrics.json", "loss.png", "samples"]
    if list(args.option) == ["lora"] and not args.option["lora"].get("dora"):
        to_diffusers(pipeline.unet, args.output / "pytorch_lora_weights.safetensors")
        files.insert(1, "pytorch_lora_weights.safetensors")
    (args.output / "metrics.json").write_text(
        json.dumps(without_nan(record), indent=2, allow_nan=False) + "\n"
    )
    draw_losses(
        record["losses"], f"{args.method}: {record['trainable']:,} parameters", args.output / "loss.png"
    )
    print(f"Saved {', '.join(files)} to {args.output}")


if __name__ == "__main__":
    sys.exit(main())
