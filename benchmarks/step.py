"""Time of a training step and bytes kept for backward, as ratios to the floor; or of inference, as ratios to the plain model.

The floor of a parameter-efficient step is the frozen forward plus the gradient of the activations: no weight gradients.

    python benchmarks/step.py --model vit_small_patch16_224 --method lora --method ssf
    python benchmarks/step.py --model resnet50 --repeats 9 --autocast bfloat16
    python benchmarks/step.py --inference --compile

On a CPU the times are the process's own seconds on one thread, which other processes disturb least.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from networks import NAMES, build, example, forward
from timing import add_arguments, bytes_kept, compiled, interleaved, precision, ratios, where
from torch import Tensor, nn

import medpeft

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "linear_probe": ("linear_probe", {}),
    "bias": ("bias", {}),
    "norm": ("norm", {}),
    "attention": ("attention", {}),
    "lora": ("lora", {}),
    "lora, every linear": ("lora", {"target": "linear", "parts": "qkvo"}),
    "lora, every linear, A frozen": ("lora", {"target": "linear", "parts": "qkvo", "freeze_a": True}),
    "ssf": ("ssf", {}),
    "adaptformer": ("adaptformer", {}),
    "svdiff": ("svdiff", {}),
    "tsa": ("tsa", {}),
    "tsa, 3x3": ("tsa", {"sites": "3x3"}),
}


def main() -> None:
    """Measure what the command line asks for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help=f"{', '.join(NAMES)}, or any of timm's")
    parser.add_argument("--method", action="append", choices=list(CASES), help="repeatable; all that fit by default")
    parser.add_argument("--inference", action="store_true", help="the forward alone, adapted and merged")
    add_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = inference(args) if args.inference else training(args)
    if args.json:
        Path(args.json).write_text(json.dumps({"model": args.model, "where": where(args), "rows": rows}, indent=2) + "\n")
    print(table(rows, args))


def training(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a case: ratio to the floor, seconds, MiB kept for backward."""
    inputs = example(args.model, args.batch, args.image_size, args.device)
    # Only the floor's input asks for a gradient, so that every activation of the frozen model does.
    models = {"floor": frozen(build(args.model, args.device))}
    models |= {case: model for case in args.method or CASES if (model := adapted(args, case)) is not None}
    losses = {case: loss_of(compiled(model, args), inputs, case == "floor", args) for case, model in models.items()}
    kept = {case: 0 if args.compile else bytes_kept(models[case], loss) for case, loss in losses.items()}
    steps = {case: (lambda loss=loss: loss().backward()) for case, loss in losses.items()}
    found = ratios(interleaved(steps, args.repeats, args.device))
    return [
        {"case": case, **found[case], "mib": kept[case] / 2**20, "mib_ratio": kept[case] / max(kept["floor"], 1)}
        for case in losses
    ]


def frozen(model: nn.Module) -> nn.Module:
    """The model without a trainable parameter, its BatchNorm at its running statistics, as in every adapted model."""
    for module in model.requires_grad_(False).modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def inference(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a case: the forward of the adapted and of the merged model, as a ratio to the plain one's."""
    inputs = example(args.model, args.batch, args.image_size, args.device)
    models = {"plain": build(args.model, args.device)}
    for case in args.method or ("lora", "lora, every linear", "ssf", "tsa", "adaptformer", "svdiff"):
        for form in ("adapted", "merged"):
            model = adapted(args, case)
            if model is None or (form == "merged" and not merge(model)):
                continue
            models[f"{case}, {form}"] = model
    calls = {case: compiled(model.eval(), args) for case, model in models.items()}

    def step(call: Callable[..., Any]) -> None:
        with torch.inference_mode(), precision(args):
            forward(call, inputs)

    found = ratios(interleaved({c: (lambda call=call: step(call)) for c, call in calls.items()}, args.repeats, args.device))
    return [{"case": case, **figures} for case, figures in found.items()]


def merge(model: nn.Module) -> bool:
    """Merge, where the method can."""
    try:
        medpeft.merge(model)
    except medpeft.MedpeftError:
        return False
    return True


def adapted(args: argparse.Namespace, case: str) -> nn.Module | None:
    """The adapted model, its adapters away from their initial values; None where the method does not fit."""
    method, options = CASES[case]
    head = None if args.model.endswith("unet") else "auto"
    try:
        model = medpeft.apply(build(args.model, args.device), method, head=head, **options)
    except medpeft.MedpeftError as reason:
        print(f"{case}: left out: {str(reason).partition(':')[0]}")
        return None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.add_(torch.randn_like(parameter) * 0.01)
    return model


def loss_of(call: Callable[..., Any], inputs: tuple[Tensor, ...], grad: bool, args: argparse.Namespace) -> Callable[[], Tensor]:
    """The forward up to a loss."""

    def loss() -> Tensor:
        with precision(args):
            return forward(call, inputs, grad).float().square().mean()

    return loss


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """The rows as a Markdown table, with what they were measured on."""
    kept = "mib" in rows[0] and not args.compile
    lines = [f"{args.model}, {where(args)}, median of {args.repeats}", ""]
    lines += [f"| | ratio to {rows[0]['case']} | range | s |" + (" kept, MiB | kept / floor |" if kept else "")]
    lines += ["|---|--:|--:|--:|" + ("--:|--:|" if kept else "")]
    for r in rows:
        low, high = r["ratio_range"]
        line = f"| {r['case']} | {r['ratio']:.2f} | {low:.2f}–{high:.2f} | {r['seconds']:.3f} |"
        lines.append(line + (f" {r['mib']:.0f} | {r['mib_ratio']:.2f} |" if kept else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
