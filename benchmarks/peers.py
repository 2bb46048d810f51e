"""The same work with medpeft, its peers and the expression that an original implementation uses, in one interleaved run.

    python benchmarks/peers.py
    python benchmarks/peers.py --task "LoRA, every linear layer" --repeats 9 --json peers.json

A peer that is not installed is left out and named. `pip install peft lycoris-lora loralib` brings three of them; `adapters`
pins an older transformers, so give it an environment of its own. minLoRA is on no package index: "parametrize" is what it does.
Every model has BatchNorm at its running statistics, a frozen base and no head that trains.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from libraries import (
    Builder,
    PlainLoRA,
    PlainSSF,
    PlainSVDiff,
    PlainTSA,
    base,
    floor,
    parametrized,
    plain,
    with_adapters,
    with_loralib,
    with_lycoris,
    with_medpeft,
    with_peft,
)
from networks import example
from step import loss_of
from timing import add_arguments, bytes_kept, compiled, interleaved, ratios, where
from torch import nn

VIT, RESNET = "vit_small_patch16_224", "resnet50"


def main() -> None:
    """Measure what the command line asks for and print a table a task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=list(TASKS), help="repeatable (default: all)")
    add_arguments(parser, batch=4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = {}
    for task in args.task or TASKS:
        found[task] = measure(*TASKS[task], args)
        print(table(task, found[task], args), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"where": where(args), "tasks": found}, indent=2) + "\n")


def measure(name: str, builders: dict[str, Builder], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a library: ratio to the floor, seconds, bytes kept, parameters that train."""
    inputs = example(name, args.batch, args.image_size, args.device)
    models = {}
    for label, builder in builders.items():
        try:
            models[label] = ready(builder(args)).to(args.device)
        except ImportError as error:
            print(f"{label}: left out: {error}")
    losses = {label: loss_of(compiled(model, args), inputs, label == "floor", args) for label, model in models.items()}
    kept = {label: 0 if args.compile else bytes_kept(model, losses[label]) for label, model in models.items()}
    steps = {label: (lambda loss=loss: loss().backward()) for label, loss in losses.items()}
    figures = ratios(interleaved(steps, args.repeats, args.device))
    return [
        {
            "library": label,
            **figures[label],
            "mib": kept[label] / 2**20,
            "mib_ratio": kept[label] / max(kept["floor"], 1),
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
        for label, model in models.items()
    ]


def ready(model: nn.Module) -> nn.Module:
    """The model in train mode, BatchNorm apart, and what was added to it away from zero, so that every gradient flows."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.01)
    return model


def table(task: str, rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """The rows as a Markdown table, with what they were measured on."""
    lines = [f"\n{task}: {where(args)}, median of {args.repeats}", ""]
    lines += ["| | step / floor | range | kept, MiB | kept / floor | trainable |", "|---|--:|--:|--:|--:|--:|"]
    for r in rows:
        low, high = r["ratio_range"]
        kept = f"{r['mib']:.0f} | {r['mib_ratio']:.2f}"
        lines.append(f"| {r['library']} | {r['ratio']:.2f} | {low:.2f}–{high:.2f} | {kept} | {r['trainable']:,} |")
    return "\n".join(lines)


_LORA = {"r": 8, "lora_alpha": 8}

TASKS: dict[str, tuple[str, dict[str, Builder]]] = {
    "LoRA, every linear layer": (
        VIT,
        {
            "floor": floor(VIT),
            "medpeft": with_medpeft(VIT, "lora", target="linear", parts="qkvo"),
            "peft": with_peft(VIT, target_modules=r".*\.(qkv|proj|fc1|fc2)|head", **_LORA),
            "LyCORIS": with_lycoris(VIT, (nn.Linear,)),
            "loralib": with_loralib(VIT),
            "parametrize": parametrized(VIT),
            "plain expression": plain(VIT, nn.Linear, PlainLoRA),
        },
    ),
    "LoRA, q and v": (
        VIT,
        {
            "floor": floor(VIT),
            "medpeft": with_medpeft(VIT, "lora"),
            "peft (one A for q, k and v)": with_peft(VIT, target_modules=r".*\.qkv", **_LORA),
            "loralib": with_loralib(VIT, fused=True),
        },
    ),
    "LoRA, every convolution": (
        RESNET,
        {
            "floor": floor(RESNET),
            "medpeft": with_medpeft(RESNET, "lora"),
            "peft": with_peft(RESNET, target_modules=r".*conv\d|.*downsample\.0", **_LORA),
            "LyCORIS": with_lycoris(RESNET, (nn.Conv2d,)),
        },
    ),
    "SSF": (
        VIT,
        {
            "floor": floor(VIT),
            "medpeft": with_medpeft(VIT, "ssf"),
            "plain expression": plain(VIT, (nn.Linear, nn.Conv2d, nn.LayerNorm), PlainSSF),  # type: ignore[arg-type]  # a tuple
        },
    ),
    "TSA": (
        RESNET,
        {
            "floor": floor(RESNET),
            "medpeft": with_medpeft(RESNET, "tsa", sites="all"),
            "plain expression": plain(RESNET, nn.Conv2d, PlainTSA),
        },
    ),
    "SV-Diff": (
        VIT,
        {
            "floor": floor(VIT),
            "medpeft": with_medpeft(VIT, "svdiff", target="linear"),
            "plain expression": plain(VIT, nn.Linear, PlainSVDiff),
        },
    ),
    "SV-Diff, a convolution of Stable Diffusion": (
        "sd_conv",
        {
            "floor": floor("sd_conv"),
            "medpeft": with_medpeft("sd_conv", "svdiff"),
            "plain expression": plain("sd_conv", nn.Conv2d, PlainSVDiff),
            "medpeft's LoRA, to compare": with_medpeft("sd_conv", "lora"),
        },
    ),
    "Houlsby": (
        "hf_vit",
        {
            "floor": lambda args: base("hf_vit").requires_grad_(False),
            "medpeft": with_medpeft("hf_vit", "houlsby", bottleneck=64),
            "adapters": with_adapters("double_seq_bn"),
        },
    ),
    "Pfeiffer": (
        "hf_vit",
        {
            "floor": lambda args: base("hf_vit").requires_grad_(False),
            "medpeft": with_medpeft("hf_vit", "pfeiffer", bottleneck=64),
            "adapters": with_adapters("seq_bn"),
        },
    ),
}


if __name__ == "__main__":
    main()
