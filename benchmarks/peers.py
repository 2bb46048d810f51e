"""Time the same work with medpeft, its peers, and the expression of an original implementation, interleaved.

    python benchmarks/peers.py
    python benchmarks/peers.py --task "LoRA, every linear layer" --repeats 9 --json peers.json

A peer that is not installed is left out and named. `pip install peft lycoris-lora loralib` brings three of
them. `adapters` pins an older transformers, so give it an environment of its own. minLoRA is on no package
index: "parametrize" is what it does. Every model has BatchNorm at its running statistics, a frozen base and
    no
head that trains.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from expressions import PlainLoRA, PlainSSF, PlainSVDiff, PlainTSA
from libraries import (
    Builder,
    floor,
    parametrized,
    plain,
    with_adapters,
    with_loralib,
    with_loralib_on_q_and_v,
    with_lycoris,
    with_medpeft,
    with_peft,
)
from networks import example
from step import loss_of, step
from tables import markdown, spread, write_json
from timing import add_arguments, bytes_kept, compiled, interleaved, ratios, where
from torch import nn

VIT, RESNET = "vit_small_patch16_224", "resnet50"


@dataclass(frozen=True)
class Task:
    """A model, and functions that adapt it, by name of the library; the floor comes first."""

    model: str
    builders: dict[str, Builder]


def main() -> None:
    """Measure what the command line asks for and print a table a task."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--task", action="append", choices=list(TASKS), help="repeatable (default: all)")
    add_arguments(parser, batch=4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    by_task = {}
    for task in args.task or TASKS:
        by_task[task] = measure(TASKS[task], args)
        print(f"\n{task}: {where(args)}, median of {args.repeats}\n")
        print(table(by_task[task]), flush=True)
    write_json(args.json, {"where": where(args), "tasks": by_task})


def measure(task: Task, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one row a library: ratio to the floor, seconds, bytes kept, parameters that train."""
    inputs = example(task.model, args.batch, args.image_size, args.device)
    models = build_all(task, args)
    steps: dict[str, Callable[[], None]] = {}
    kept = {}
    for library, model in models.items():
        loss = loss_of(compiled(model, args), inputs, library == "floor", args)
        kept[library] = 0 if args.compile else bytes_kept(model, loss)
        steps[library] = partial(step, loss)
    rows = []
    for library, figures in ratios(interleaved(steps, args.repeats, args.device)).items():
        memory = {"mib": kept[library] / 2**20, "mib_ratio": kept[library] / max(kept["floor"], 1)}
        trainable = sum(p.numel() for p in models[library].parameters() if p.requires_grad)
        rows.append({"library": library, **figures, **memory, "trainable": trainable})
    return rows


def build_all(task: Task, args: argparse.Namespace) -> dict[str, nn.Module]:
    """Build the models of a task, and name the libraries that are not installed."""
    models = {}
    for library, builder in task.builders.items():
        try:
            models[library] = ready(builder(args.image_size)).to(args.device)
        except ImportError as error:
            print(f"{library}: left out: {error}")
    return models


def ready(model: nn.Module) -> nn.Module:
    """Put a model in train mode, BatchNorm apart.

    Trainable values move away from zero, so that every gradient flows.
    """
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


def table(rows: list[dict[str, Any]]) -> str:
    """Lay out the rows of a task."""
    lines = []
    for row in rows:
        kept = [f"{row['mib']:.0f}", f"{row['mib_ratio']:.2f}"]
        lines.append([row["library"], f"{row['ratio']:.2f}", spread(row), *kept, f"{row['trainable']:,}"])
    return markdown(["", "step / floor", "range", "kept, MiB", "kept / floor", "trainable"], lines)


_LORA = {"r": 8, "lora_alpha": 8}

TASKS: dict[str, Task] = {
    "LoRA, every linear layer": Task(
        VIT,
        {
            "floor": floor(VIT),
            "medpeft": with_medpeft(VIT, "lora", target="linear", parts="qkvo"),
            "peft": with_peft(VIT, target_modules=r"blocks\..*\.(qkv|proj|fc1|fc2)|head", **_LORA),
            "LyCORIS": with_lycoris(VIT, (nn.Linear,)),
            "loralib": with_loralib(VIT),
            "parametrize": parametrized(VIT),
            "plain expression": plain(VIT, (nn.Linear,), PlainLoRA),
        },
    ),
    "LoRA, q and v": Task(
        VIT,
        {
            "floor": floor(VIT),
            "medpeft": with_medpeft(VIT, "lora"),
            "peft (one A for q, k and v)": with_peft(VIT, target_modules=r".*\.qkv", **_LORA),
            "loralib": with_loralib_on_q_and_v(VIT),
        },
    ),
    "LoRA, every convolution": Task(
        RESNET,
        {
            "floor": floor(RESNET),
            "medpeft": with_medpeft(RESNET, "lora"),
            "peft": with_peft(RESNET, target_modules=r".*conv\d|.*downsample\.0", **_LORA),
            "LyCORIS": with_lycoris(RESNET, (nn.Conv2d,)),
        },
    ),
    "SSF": Task(
        VIT,
        {
            "floor": floor(VIT),
            "medpeft": with_medpeft(VIT, "ssf"),
            "plain expression": plain(VIT, (nn.Linear, nn.Conv2d, nn.LayerNorm), PlainSSF),
        },
    ),
    "TSA": Task(
        RESNET,
        {
            "floor": floor(RESNET),
            "medpeft": with_medpeft(RESNET, "tsa", sites="all"),
            "plain expression": plain(RESNET, (nn.Conv2d,), PlainTSA),
        },
    ),
    "SV-Diff": Task(
        VIT,
        {
            "floor": floor(VIT),
            "medpeft": with_medpeft(VIT, "svdiff", target="linear"),
            "plain expression": plain(VIT, (nn.Linear,), PlainSVDiff),
        },
    ),
    "SV-Diff, a convolution of Stable Diffusion": Task(
        "sd_conv",
        {
            "floor": floor("sd_conv"),
            "medpeft": with_medpeft("sd_conv", "svdiff"),
            "plain expression": plain("sd_conv", (nn.Conv2d,), PlainSVDiff),
            "medpeft's LoRA, to compare": with_medpeft("sd_conv", "lora"),
        },
    ),
    "Houlsby": Task(
        "hf_vit",
        {
            "floor": floor("hf_vit"),
            "medpeft": with_medpeft("hf_vit", "houlsby", bottleneck=64),
            "adapters": with_adapters("double_seq_bn"),
        },
    ),
    "Pfeiffer": Task(
        "hf_vit",
        {
            "floor": floor("hf_vit"),
            "medpeft": with_medpeft("hf_vit", "pfeiffer", bottleneck=64),
            "adapters": with_adapters("seq_bn"),
        },
    ),
}


if __name__ == "__main__":
    main()
