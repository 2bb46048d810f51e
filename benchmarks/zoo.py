"""Every method on every architecture of timm and torchvision, and on a few of other libraries.

    python benchmarks/zoo.py           # one architecture of each kind; the others are planned
    python benchmarks/zoo.py --all     # every architecture in full
    python benchmarks/zoo.py --family swin_transformer --method lora --alone

Models are built on the meta device, so nothing is downloaded and nothing computed. A method *works* on an
architecture if each of its trainable tensors reaches the output in train and in eval mode, is *refused* if a
`MedpeftError` says why, is *silent* if a tensor reaches nothing, and *crashed* on any other error. Two
architectures are of one kind if their modules have the same classes and the same switches. Results go line by
line into a JSON file, from which a stopped run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zoo_models import Candidate, other_models, timm_models, torchvision_models
from zoo_table import FAILURES, markdown, summary
from zoo_verdicts import last_lines, planned, verdicts

import medpeft

_SOURCES = {"timm": timm_models, "torchvision": torchvision_models, "others": other_models}

# Switches of a module that do not decide how methods fit.
_MODES = ("training", "inplace", "scale_by_keep")


def main(arguments: list[str] | None = None) -> int:
    """Run the zoo; 1 if anything is silent or crashed."""
    options = _options(arguments)
    warnings.filterwarnings("ignore")
    skip_initialisation()
    results = Path(options.results)
    if not options.table:
        methods = options.method or list(medpeft.methods())
        run(list(_candidates(options)), methods, results, everything=options.all, alone=options.alone)
    summed_up = summary(_read(results))
    if options.json:
        text = json.dumps(summed_up, separators=(",", ":"))
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    if options.markdown:
        Path(options.markdown).write_text(markdown(summed_up), encoding="utf-8")
    for row in summed_up["failures"]:
        print(*(cell[:200] for cell in row), sep="\t")
    print(summed_up["totals"])
    return int(bool(summed_up["failures"]))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    family = "a file of timm.models, such as swin_transformer, or a library"
    name = "an architecture, such as vit_base_patch16_224; default: all"
    parser.add_argument("--all", action="store_true", help="connect every architecture, not one of each kind")
    parser.add_argument(
        "--alone", action="store_true", help="connect each method by itself, not all together"
    )
    parser.add_argument("--library", action="append", choices=list(_SOURCES), help="default: all three")
    parser.add_argument("--family", action="append", help=family)
    parser.add_argument("--name", action="append", help=name)
    parser.add_argument("--method", action="append", choices=list(medpeft.methods()))
    parser.add_argument(
        "--results", default="zoo.jsonl", help="file of results; a stopped run goes on from it"
    )
    parser.add_argument("--table", action="store_true", help="run nothing: make the tables from the results")
    parser.add_argument("--markdown", help="file for the table as Markdown")
    parser.add_argument("--json", help="file for the table as JSON")
    return parser.parse_args(arguments)


def _candidates(options: argparse.Namespace) -> Iterator[Candidate]:
    """List the architectures that the flags ask for."""
    for library in options.library or _SOURCES:
        for candidate in _SOURCES[library]():
            if options.family and candidate.family not in options.family:
                continue
            if options.name and candidate.name not in options.name:
                continue
            yield candidate


def run(
    candidates: list[Candidate],
    methods: list[str],
    results: Path,
    *,
    everything: bool,
    alone: bool,
) -> None:
    """Try every candidate that has no result yet, the representatives first, and write one line each."""
    done = {row["name"] for row in _read(results)}
    by_name = {candidate.name: candidate for candidate in candidates}
    rows = _surveyed(candidates)
    if everything:
        for row in rows:
            row["like"] = ""
    waiting = [row for row in sorted(rows, key=lambda row: bool(row["like"])) if row["name"] not in done]
    with results.open("a", encoding="utf-8") as file:
        for count, row in enumerate(waiting, 1):
            started = time.perf_counter()
            candidate = by_name[row["name"]]
            apart = alone or candidate.library == "others"
            row |= examine(candidate, methods, like=bool(row["like"]), alone=apart)
            row["seconds"] = round(time.perf_counter() - started, 2)
            file.write(json.dumps(row) + "\n")
            file.flush()
            statuses = {status for status, _ in row["verdicts"].values()}
            failed = " ".join(sorted(statuses.intersection(FAILURES)))
            print(f"{count}/{len(waiting)} {candidate.name} {row['seconds']} s {failed}", file=sys.stderr)


def _surveyed(candidates: Iterable[Candidate]) -> list[dict[str, Any]]:
    """Describe every candidate, by size; "like" names the smallest one of its kind, "" for that itself."""
    rows = sorted(map(_survey, candidates), key=lambda row: row["modules"])
    smallest: dict[str, str] = {}
    for row in rows:
        first = smallest.setdefault(row["kind"], row["name"])
        row["like"] = "" if first == row["name"] else first
    return rows


def _survey(candidate: Candidate) -> dict[str, Any]:
    """Describe an architecture: where it comes from, its kind and its size.

    One that cannot be built is of a kind of its own.
    """
    row = {"name": candidate.name, "library": candidate.library, "family": candidate.family}
    try:
        model, _ = candidate.build()
    except Exception:
        return {**row, "kind": candidate.name, "modules": 0}
    return {**row, "kind": kind_of(model), "modules": len(list(model.modules()))}


def _read(results: Path) -> list[dict[str, Any]]:
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def examine(candidate: Candidate, methods: list[str], *, like: bool, alone: bool) -> dict[str, Any]:
    """Judge every method; only plan it if the architecture is like another one that is run."""
    try:
        model, example = candidate.build()
    except Exception:
        return {"connected": False, "unbuilt": last_lines(), "verdicts": {}}
    if like:
        return {"connected": False, "verdicts": {method: planned(model, method) for method in methods}}
    by_method, unused = verdicts(model, example, methods, alone=alone)
    return {"connected": True, "verdicts": by_method, "unused": unused}


def kind_of(model: nn.Module) -> str:
    """Digest the facts that decide how methods fit: the modules' classes, switches and parameters."""
    kinds = set()
    for module in model.modules():
        switches = []
        for key, value in sorted(vars(module).items()):
            if isinstance(value, bool) and key not in _MODES:
                switches.append((key, value))
        parameters = [(name, parameter is not None) for name, parameter in module._parameters.items()]
        kinds.add(f"{type(module).__module__}.{type(module).__qualname__} {switches} {parameters}")
    return hashlib.sha256("\n".join(sorted(kinds)).encode()).hexdigest()[:16]


def skip_initialisation() -> None:
    """Leave out the initialisation of weights: most of the time of building a model on the meta device."""
    import timm.layers.weight_init as timm_init

    def untouched(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor

    for module in (torch.nn.init, timm_init):
        for name, function in list(vars(module).items()):
            if name.endswith("_") and not name.endswith("__") and callable(function):
                setattr(module, name, untouched)


if __name__ == "__main__":
    sys.exit(main())
