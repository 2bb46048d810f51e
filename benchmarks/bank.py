"""A bank of adapters: memory, adding, switching, and a batch in which each image has its own adapter.

python benchmarks/bank.py
python benchmarks/bank.py --model vit_base_patch16_224 --method lora --adapters 3 --batch 2
"""

import argparse
import gc
import itertools
import statistics
from typing import Any

import timm
import torch
from resident import give_back, resident
from tables import markdown, spread, write_json
from timing import Step, add_arguments, interleaved, precision, ratios, timed, where
from torch import Tensor, nn

import medpeft

METHODS = ("ssf", "lora", "bias")
COLUMNS = ("adapters, MiB", "process, MiB", "add, ms", "use, ms", "one, s", "mixed / one", "range")
SWITCHES = 50


def main() -> None:
    """Measure what the command line asks for and print a table."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--model", default="vit_small_patch16_224", help="a timm architecture")
    parser.add_argument("--method", action="append", help="repeatable (default: ssf, lora, bias)")
    parser.add_argument("--adapters", type=int, default=100, metavar="N", help="adapters of each method")
    add_arguments(parser, batch=32, repeats=5)
    args = parser.parse_args()
    if args.compile:
        parser.error("a mixed batch is not compiled")
    torch.set_num_threads(args.threads)
    methods = args.method or METHODS
    rows = {method: measure(args, [method]) for method in methods}
    if len(methods) > 1:
        rows["all of these"] = measure(args, methods)
    place = where(args)
    write_json(args.json, {"model": args.model, "where": place, "rows": rows})
    print(f"{args.model}, {args.adapters} adapters of each method, {place}\n")
    print(table(rows))


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Lay out the figures by method."""
    lines = []
    for method, row in rows.items():
        figures = [
            f"{row['adapters']:.1f}",
            f"{row['process']:.1f}",
            f"{row['add']:.0f}",
            f"{row['use']:.2f}",
        ]
        lines.append([method, *figures, f"{row['one']:.2f}", f"{row['ratio']:.2f}", spread(row)])
    return markdown(["", *COLUMNS], lines)


def measure(args: argparse.Namespace, methods: list[str]) -> dict[str, Any]:
    """Measure a bank of adapters of some methods."""
    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=5).to(args.device).eval()
    bank = medpeft.Bank(model)
    give_back()
    before = resident()
    added = [filled(bank, model, method, args) for method in methods]
    gc.collect()
    give_back()
    row: dict[str, Any] = {
        "process": (resident() - before) / 2**20,
        "adapters": bank.bytes / 2**20,
        "add": statistics.median(itertools.chain(*added)),
        "use": statistics.median(switches(bank, f"{methods[0]} ", args)),
    }
    x = torch.randn(args.batch, 3, args.image_size, args.image_size, device=args.device)
    steps = {"one": one(model, x), "mixed": mixed(bank, x, methods, args)}
    with precision(args):
        figures = ratios(interleaved(steps, args.repeats, args.device))
    return {**row, **figures["mixed"], "one": figures["one"]["seconds"]}


@torch.no_grad()
def filled(bank: medpeft.Bank, model: nn.Module, method: str, args: argparse.Namespace) -> list[float]:
    """Add adapters of one method, each with values of its own, and measure the milliseconds of each."""
    medpeft.apply(model, method)
    model.eval()
    times = []
    for number in range(args.adapters):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
        times.append(1e3 * timed(lambda number=number: bank.add(f"{method} {number}"), args.device))
    bank.use(None)
    return times


def switches(bank: medpeft.Bank, prefix: str, args: argparse.Namespace) -> list[float]:
    """Measure the milliseconds of switches between adapters of one method, of which one is then in use."""
    bank.use(f"{prefix}0")
    times = []
    for number in range(SWITCHES):
        name = f"{prefix}{number % 2}"
        times.append(1e3 * timed(lambda name=name: bank.use(name), args.device))
    return times


def one(model: nn.Module, x: Tensor) -> Step:
    """Run the batch with the adapter in use."""

    @torch.no_grad()
    def step() -> Any:
        return model(x)

    return step


def mixed(bank: medpeft.Bank, x: Tensor, methods: list[str], args: argparse.Namespace) -> Step:
    """Run the batch with another adapter for each image, as far as there are so many."""
    names = []
    for number in range(len(x)):
        method = methods[number % len(methods)]
        names.append(f"{method} {number // len(methods) % args.adapters}")
    return lambda: bank(x, names)


if __name__ == "__main__":
    main()
