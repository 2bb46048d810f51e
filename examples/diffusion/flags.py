"""The flags of `text_to_image.py`, and the defaults that depend on other flags."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.errors import TrainerError
from trainer.flags import read_options

# The seven of the study's Table 4, by their flags here.
STRATEGIES = ("full", "attention", "bias", "norm", "bias+norm", "bias+norm+attention", "lora", "svdiff")

# Peak learning rates of AdamW for a UNet of Stable Diffusion's size; a union takes the lowest of its parts.
RATES = {"full": 1e-5, "attention": 1e-5, "bias": 1e-3, "bitfit": 1e-3, "norm": 1e-3, "svdiff": 1e-3}
RATE = 1e-4
# The tiny UNet is thirty times narrower, and trained for minutes.
TINY_RATES = {"full": 1e-3, "attention": 1e-3, "bias": 2e-2, "bitfit": 2e-2, "norm": 2e-2, "svdiff": 5e-2}
TINY_RATE = 1e-2

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}

# What may change between a run and its continuation.
FREE = {
    "output", "resume", "cache", "svd_cache", "save_every", "sample_every", "prompt", "inference_steps", "guidance",
    "score_samples", "inception_weights",
}  # fmt: skip


def make_parser(description: str) -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_data_flags(parser)
    _add_method_flags(parser)
    _add_training_flags(parser)
    _add_sampling_flags(parser)
    return parser


def parse(parser: argparse.ArgumentParser, given: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags.

    Raises:
        TrainerError: a flag has a value that cannot be meant.
    """
    args = parser.parse_args(given)
    for name in ("steps", "batch_size", "devices", "save_every", "sample_every", "inference_steps"):
        if getattr(args, name) < 1:
            raise TrainerError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1.")
    if not 0 < args.held_out < 1:
        raise TrainerError(f"--held-out is {args.held_out}; it must lie between 0 and 1.")
    if not 0 <= args.seed < 1_000_000:
        raise TrainerError(f"--seed is {args.seed}; it must be from 0 to 999999.")
    args.option = read_options(args.method, args.option)
    if "attention" in args.option:
        # The study's "attention" is the whole of the UNet's `attentions`.
        args.option["attention"].setdefault("scope", "block")
    if args.lr is None:
        known, other = (RATES, RATE) if args.pipeline else (TINY_RATES, TINY_RATE)
        args.lr = min(known.get(name, other) for name in args.option)
    if args.lr <= 0:
        raise TrainerError(f"--lr is {args.lr}; it must be above 0.")
    _fill_paths(args)
    return args


def _fill_paths(args: argparse.Namespace) -> None:
    data = args.data.stem if args.data else "tissue"
    model = Path(args.pipeline).name if args.pipeline else "tiny"
    if args.output is None:
        args.output = Path("runs") / f"{data}-{model}-{args.method}-{args.seed}"
    if args.cache is None:
        args.cache = args.output.parent / "latents"
    if args.tiny_folder is None:
        args.tiny_folder = args.output.parent / f"tiny-pipeline-{data}-{args.image_size or 32}"


def changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Describe the settings that differ, but for those that a continued run is free to change."""
    return [
        f"--{name.replace('_', '-')} was {before.get(name)!r} and is {value!r}"
        for name, value in now.items()
        if name not in FREE and before.get(name) != value
    ]


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add(
        "--data",
        type=Path,
        help="a .csv or .jsonl with a column of image files and a column text, and perhaps label and patient; a folder with "
        "metadata.csv or metadata.jsonl; or a folder with one subfolder a class (default: patches of stained tissue)",
    )
    add(
        "--caption",
        default="a medical image, {}",
        metavar="TEXT",
        help="text of a class, whose name takes the place of {}",
    )
    add(
        "--patient-column",
        default="patient",
        metavar="NAME",
        help="column whose images stay in one part (default: patient)",
    )
    add(
        "--tokens",
        type=int,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="keep the images whose text has so many tokens; the study keeps 7 to 77",
    )
    add(
        "--image-size",
        type=int,
        metavar="PX",
        help="side in pixels (default: the pipeline's; 32 for the tiny one)",
    )
    add(
        "--held-out",
        type=float,
        default=0.25,
        metavar="F",
        help="share of images that scores compare with (default: 0.25)",
    )
    add(
        "--new-class",
        action="append",
        metavar="NAME",
        help="adapt to this class; may be repeated (default: the second half of the classes with the tiny pipeline, which is "
        "pretrained on the others; all of them with a pipeline of your own)",
    )


def _add_method_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("pipeline and method").add_argument
    add(
        "--pipeline",
        help="a folder of diffusers with Stable Diffusion or SDXL, or its name on the Hub (default: a tiny one)",
    )
    add(
        "--tiny-folder",
        type=Path,
        metavar="DIR",
        help="where the tiny pipeline is kept (default: beside --output)",
    )
    add(
        "--tiny-steps",
        type=int,
        default=1500,
        metavar="N",
        help="steps that pretrain its UNet (default: 1500)",
    )
    add(
        "--tiny-autoencoder-steps",
        type=int,
        default=600,
        metavar="N",
        help="and its autoencoder (default: 600)",
    )
    add("--method", default="lora", help=f"{', '.join(STRATEGIES)}; or any other of medpeft (default: lora)")
    add(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the method, such as rank=4 (in a union: lora.rank=4); may be repeated",
    )
    add("--target", action="append", metavar="LAYERS", help="layers to adapt; may be repeated")
    add(
        "--svd-cache",
        type=Path,
        metavar="DIR",
        help="keep the decompositions of svdiff here, for the next start",
    )


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, default=500, metavar="N", help="optimizer steps (default: 500)")
    add("--batch-size", type=int, default=16, metavar="N", help="images on each device (default: 16)")
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in RATES.items())
    add(
        "--lr",
        type=float,
        help=f"peak rate of AdamW (default: {rates}, {RATE:g} for others; the tiny pipeline takes larger)",
    )
    add("--weight-decay", type=float, default=0.01, metavar="W", help="(default: 0.01)")
    add(
        "--snr-gamma",
        type=float,
        default=5.0,
        metavar="G",
        help="bound of min-SNR weighting, 0 for none (default: 5)",
    )
    add(
        "--drop-text",
        type=float,
        default=0.1,
        metavar="F",
        help="share of images without their text (default: 0.1)",
    )
    add(
        "--ema",
        type=float,
        default=0.99,
        metavar="D",
        help="decay of the average of the trainable weights (default: 0.99)",
    )
    add(
        "--precision",
        choices=sorted(PRECISIONS),
        default="32",
        help="16 and bf16 compute in half precision (default: 32)",
    )
    add(
        "--gradient-checkpointing",
        action="store_true",
        help="compute activations anew in backward: less memory, slower",
    )
    add("--devices", type=int, default=1, metavar="N", help="GPUs, or processes on a CPU (default: 1)")
    add("--seed", type=int, default=0, help="of split, adapters, batches and pictures (default: 0)")
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="where the results go (default: runs/DATA-PIPELINE-METHOD-SEED)",
    )
    add(
        "--cache",
        type=Path,
        metavar="DIR",
        help="where latents and text embeddings go (default: latents beside --output)",
    )
    add("--save-every", type=int, default=250, metavar="N", help="steps between checkpoints (default: 250)")
    add(
        "--resume",
        action="store_true",
        help="continue after the last checkpoint in --output, or begin if there is none",
    )


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("pictures and scores").add_argument
    add(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="of the pictures; may be repeated (default: a text of each class)",
    )
    add("--sample-every", type=int, default=250, metavar="N", help="steps between pictures (default: 250)")
    add("--inference-steps", type=int, default=25, metavar="N", help="of DDIM (default: 25)")
    add("--guidance", type=float, default=2.0, metavar="W", help="of the text, 1 for none (default: 2)")
    add(
        "--score-samples",
        type=int,
        default=0,
        metavar="N",
        help="compare so many generated images, at most as many as are held out, with real ones by FID and KID (default: 0)",
    )
    add(
        "--inception-weights",
        type=Path,
        metavar="FILE",
        help="torch-fidelity's weights of Inception-v3 for FID",
    )
