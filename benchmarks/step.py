"""Time a training step against the floor, or with `--inference` a forward against the plain model's.

    python benchmarks/step.py --model vit_small_patch16_224 --method lora --method ssf
    python benchmarks/step.py --model resnet50 --repeats 9 --autocast bfloat16
    python benchmarks/step.py --below-the-floor --threads 2 --batch 1
    python benchmarks/step.py --inference --batch 1

The floor of a parameter-efficient step is the frozen forward plus the gradient of the activations: no weight
gradients. A training step's row also has the bytes kept for backward. Below it are methods that keep little
of the trunk and do not go back through all of it: --below-the-floor measures them beside LoRA on every layer,
medpeft's and peft's.

Inference measures models in eval mode without gradients, in one interleaved run: the plain one, adapted ones,
merged ones, and beside LoRA on every linear layer peft's LoRA on the same layers, if peft is installed. By
default these are small (a ViT-Ti at 64 and at 224 px), where the cost of Python shows most.

On one thread of a CPU the times are the process's own seconds, which other processes disturb least; on
several threads they are those of the clock.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from cases import BELOW, CASES, EVERY_LINEAR, PEFTS, adapted, left_out, pefts, prepared
from networks import NAMES, build, example, forward
from tables import markdown, spread, write_json
from timing import add_arguments, bytes_kept, compiled, interleaved, precision, ratios, where
from torch import Tensor, nn

import medpeft

Row = dict[str, Any]


def main() -> None:
    """Measure what the command line asks for and print a table."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    if args.inference:
        report_inference(args)
    else:
        report_training(args)


def _arguments() -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--model", help=f"{', '.join(NAMES)}, or any of timm's")
    methods = "repeatable; all that fit by default, for inference lora on every linear layer and ssf"
    parser.add_argument("--method", action="append", choices=[*CASES, PEFTS], help=methods)
    parser.add_argument("--below-the-floor", action="store_true", help="the methods that keep little")
    parser.add_argument("--inference", action="store_true", help="the forward alone, adapted and merged")
    add_arguments(parser, repeats=None, image_size=None)
    args = parser.parse_args()
    if args.inference:
        args.model = args.model or "vit_tiny_patch16_224"
        args.method = args.method or [EVERY_LINEAR, "ssf"]
        args.repeats = args.repeats or 31
        args.image_sizes = [args.image_size] if args.image_size else [64, 224]
    else:
        args.model = args.model or "vit_small_patch16_224"
        usual = BELOW if args.below_the_floor else list(CASES)
        args.method = args.method or usual
        args.repeats = args.repeats or 7
        args.image_size = args.image_size or 224
    return args


def report_training(args: argparse.Namespace) -> None:
    """Measure training steps, and print a table."""
    rows = training(args)
    write_json(args.json, {"model": args.model, "where": where(args), "rows": rows})
    print(f"{args.model}, {where(args)}, median of {args.repeats}\n")
    print(training_table(rows, with_memory=not args.compile))


def training(args: argparse.Namespace) -> list[Row]:
    """Measure one row a case: ratio to the floor, seconds, MiB kept for backward."""
    inputs = example(args.model, args.batch, args.image_size, args.device)
    steps: dict[str, Callable[[], None]] = {}
    kept = {}
    for case in ["floor", *args.method]:
        ready = prepared(args, case, inputs)
        if ready is None:
            continue
        # Only the floor's input asks for a gradient, so that every activation of the frozen model does.
        loss = loss_of(compiled(ready.network, args), ready.inputs, case == "floor", args)
        kept[case] = 0 if args.compile else bytes_kept(ready.model, loss)
        steps[case] = partial(step, loss)
    rows = []
    for case, figures in ratios(interleaved(steps, args.repeats, args.device)).items():
        memory = {"mib": kept[case] / 2**20, "mib_ratio": kept[case] / max(kept["floor"], 1)}
        rows.append({"case": case, **figures, **memory})
    return rows


def training_table(rows: list[Row], *, with_memory: bool) -> str:
    """Lay out the rows of training steps."""
    columns = ["", "ratio to floor", "range", "s"]
    if with_memory:
        columns += ["kept, MiB", "kept / floor"]
    lines = []
    for row in rows:
        line = [row["case"], f"{row['ratio']:.2f}", spread(row), f"{row['seconds']:.3f}"]
        if with_memory:
            line += [f"{row['mib']:.0f}", f"{row['mib_ratio']:.2f}"]
        lines.append(line)
    return markdown(columns, lines)


def report_inference(args: argparse.Namespace) -> None:
    """Measure forwards, and print a table for each size of the images."""
    rows = inference(args)
    sizes = " and ".join(map(str, args.image_sizes))
    write_json(args.json, {"model": args.model, "where": where(args, sizes), "rows": rows})
    for size in args.image_sizes:
        lines = []
        for row in rows:
            if row["image_size"] == size:
                milliseconds = f"{1e3 * row['seconds']:.2f}"
                lines.append([row["case"], f"{row['ratio']:.2f}", spread(row), milliseconds])
        print(f"{args.model}, {where(args, size)}, median of {args.repeats}\n")
        print(markdown(["", "ratio to plain", "range", "ms"], lines) + "\n")


def inference(args: argparse.Namespace) -> list[Row]:
    """Measure one row a case and size, all interleaved: ratio to the plain model of that size, seconds."""
    steps: dict[tuple[int, str], Callable[[], None]] = {}
    for size in args.image_sizes:
        inputs = example(args.model, args.batch, size, args.device)
        for case, model in inference_models(args, size).items():
            call = compiled(model.eval(), args)
            steps[size, case] = partial(run, call, inputs, args)
    seconds = interleaved(steps, args.repeats, args.device, warmup=3)
    rows = []
    for image_size in args.image_sizes:
        of_size = {case: times for (size, case), times in seconds.items() if size == image_size}
        for case, figures in ratios(of_size).items():
            rows.append({"case": case, "image_size": image_size, **figures})
    return rows


def inference_models(args: argparse.Namespace, size: int) -> dict[str, nn.Module]:
    """Build the plain model, the adapted and merged ones, and peft's, for images of one size."""
    models = {"plain": build(args.model, args.device, size)}
    for case in args.method:
        try:
            model = adapted(args, case, size)
        except medpeft.MedpeftError as reason:
            print(left_out(case, reason))
            continue
        models[f"{case}, adapted"] = model
        merged = copy.deepcopy(model)
        if merge(merged):
            models[f"{case}, merged"] = merged
    if EVERY_LINEAR in args.method and "vit" in args.model:
        try:
            models[PEFTS] = pefts(args, PEFTS, size)
        except ImportError as error:
            print(left_out(PEFTS, error))
    return models


@torch.no_grad()
def run(call: Callable[..., Any], inputs: tuple[Tensor, ...], args: argparse.Namespace) -> None:
    """Run a forward without gradients."""
    with precision(args):
        forward(call, inputs)


def step(loss: Callable[[], Tensor]) -> None:
    """Run a forward and a backward."""
    loss().backward()


def merge(model: nn.Module) -> bool:
    """Merge a model, and say whether its method can."""
    try:
        medpeft.merge(model)
    except medpeft.MedpeftError:
        return False
    return True


def loss_of(
    call: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    grad: bool,
    args: argparse.Namespace,
) -> Callable[[], Tensor]:
    """Return the forward up to a loss, as a function without arguments."""

    def loss() -> Tensor:
        with precision(args):
            return forward(call, inputs, grad).float().square().mean()

    return loss


if __name__ == "__main__":
    main()
