"""Time of a training step and bytes kept for backward, as ratios to the floor, in one interleaved run.

The floor of a parameter-efficient step is the frozen forward plus the gradient of the activations: no weight gradients.

    python benchmarks/step.py --model vit_small_patch16_224 --method lora --method ssf
    python benchmarks/step.py --model resnet50 --repeats 9

On a CPU the times are the process's own seconds on one thread, which other processes disturb least.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
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
    parser.add_argument("--model", default="vit_small_patch16_224", help="a timm architecture")
    parser.add_argument("--method", action="append", choices=list(CASES), help="repeatable; all that fit by default")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = measure(args)
    print(json.dumps(rows, indent=2) if args.json else table(rows, args))


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a case: median and range of the ratio to the floor, seconds, MiB kept for backward."""
    images = torch.randn(args.batch, 3, args.image_size, args.image_size, device=args.device)
    labels = torch.randint(0, 3, (args.batch,), device=args.device)
    steps = {"floor": floor_step(args, images, labels)}
    for case in args.method or CASES:
        step = case_step(args, case, images, labels)
        if step is not None:
            steps[case] = step
    kept = {case: bytes_kept(step) for case, step in steps.items()}
    seconds: dict[str, list[float]] = {case: [] for case in steps}
    for _ in range(args.repeats):
        for case, step in steps.items():
            seconds[case].append(timed(step, args.device))
    return [row(case, seconds, kept) for case in steps]


def row(case: str, seconds: dict[str, list[float]], kept: dict[str, int]) -> dict[str, Any]:
    """The figures of one case; every repeat is compared with the floor of the same round."""
    ratios = sorted(own / floor for own, floor in zip(seconds[case], seconds["floor"], strict=True))
    return {
        "case": case,
        "ratio": statistics.median(ratios),
        "ratio_range": [ratios[0], ratios[-1]],
        "seconds": statistics.median(seconds[case]),
        "mib": kept[case] / 2**20,
        "mib_ratio": kept[case] / kept["floor"],
    }


def fresh_model(args: argparse.Namespace) -> nn.Module:
    """The architecture in train mode, with random weights."""
    torch.manual_seed(0)
    return timm.create_model(args.model, num_classes=3).to(args.device).train()


@dataclass
class Step:
    """A model and its forward to the loss."""

    model: nn.Module
    loss: Callable[[], Tensor]


def floor_step(args: argparse.Namespace, images: Tensor, labels: Tensor) -> Step:
    """A step of the frozen model whose input needs a gradient, so that every activation does."""
    model = medpeft.apply(fresh_model(args), "linear_probe")
    return Step(model, lambda: F.cross_entropy(model(images.detach().requires_grad_()), labels))


def case_step(args: argparse.Namespace, case: str, images: Tensor, labels: Tensor) -> Step | None:
    """A step of the adapted model, or None where the method does not fit."""
    method, options = CASES[case]
    try:
        model = medpeft.apply(fresh_model(args), method, **options)
    except medpeft.MedpeftError as reason:
        print(f"{case}: left out: {str(reason).partition(':')[0]}")
        return None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.add_(torch.randn_like(parameter) * 0.01)
    return Step(model, lambda: F.cross_entropy(model(images), labels))


def timed(step: Step, device: str) -> float:
    """Seconds of one forward and backward."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    start = clock()
    step.loss().backward()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def bytes_kept(step: Step) -> int:
    """Bytes of distinct storages that autograd keeps for backward, the model's own tensors left out."""
    own = {t.untyped_storage().data_ptr() for t in (*step.model.parameters(), *step.model.buffers())}
    storages: dict[int, int] = {}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            held.append(tensor.detach())  # So that no address is given out twice.
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step.loss()
    total = sum(storages.values())
    loss.backward()
    return total


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """The rows as a Markdown table, with what they were measured on."""
    where = f"{args.model}, batch {args.batch}, {args.image_size} px, {args.device}, {args.threads} threads"
    lines = [f"{where}, torch {torch.__version__}, {platform.machine()}, median of {args.repeats}", ""]
    lines += ["| | step / floor | range | s | kept, MiB | kept / floor |", "|---|---:|---:|---:|---:|---:|"]
    for r in rows:
        low, high = r["ratio_range"]
        figures = f"{r['ratio']:.2f} | {low:.2f}–{high:.2f} | {r['seconds']:.3f} | {r['mib']:.0f} | {r['mib_ratio']:.2f}"
        lines.append(f"| {r['case']} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
