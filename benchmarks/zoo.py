"""Every method on every architecture of timm and torchvision, and on a few of other libraries: works, or refused with a reason.

    python benchmarks/zoo.py                      # one representative of each kind of architecture; the others are planned
    python benchmarks/zoo.py --all                # every architecture in full
    python benchmarks/zoo.py --family swin_transformer --method lora --alone

Models are built on the meta device, so nothing is downloaded and nothing computed. A method *works* on an architecture if each
of its trainable tensors reaches the output in train and in eval mode (`medpeft.connected`), is *refused* if a `MedpeftError`
says why, is *silent* if a tensor reaches nothing, and *crashed* on any other error. Two architectures are of one kind if their
modules have the same classes and the same switches. Results go line by line into a JSON file, from which a stopped run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zoo_models import Candidate, other_models, timm_models, torchvision_models
from zoo_table import markdown, summary

import medpeft
from medpeft.adapters.registry import find
from medpeft.checks.connections import connected
from medpeft.surgery.apply import forget

_MODES = ("training", "inplace", "scale_by_keep")

Verdict = tuple[str, str]
"""A status and what there is to say about it."""


class Refusal(str):
    """Why a method does not run on the input at hand: what it says of a mask or a number of tokens that it first sees there."""


def main(arguments: list[str] | None = None) -> int:
    """Run the zoo; 1 if anything is silent or crashed."""
    options = _options(arguments)
    warnings.filterwarnings("ignore")
    skip_initialisation()
    results = Path(options.results)
    candidates = [c for c in _candidates(options.library) if not options.family or c.family in options.family]
    candidates = [c for c in candidates if not options.name or c.name in options.name]
    methods = options.method or list(medpeft.methods())
    if not options.table:
        run(candidates, methods, results, everything=options.all, alone=options.alone)
    found = summary(_read(results))
    if options.json:
        Path(options.json).write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")
    if options.markdown:
        Path(options.markdown).write_text(markdown(found), encoding="utf-8")
    for row in found["failures"]:
        print(*(cell[:200] for cell in row), sep="\t")
    print(found["totals"])
    return 1 if found["failures"] else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="connect every architecture, not one of each kind")
    parser.add_argument("--alone", action="store_true", help="connect every method by itself, not all that fit at once")
    parser.add_argument("--library", choices=["timm", "torchvision", "others"], action="append", help="default: all three")
    parser.add_argument("--family", action="append", help="a file of timm.models, such as swin_transformer, or a library")
    parser.add_argument("--name", action="append", help="an architecture, such as vit_base_patch16_224; default: all")
    parser.add_argument("--method", action="append", choices=list(medpeft.methods()))
    parser.add_argument("--results", default="zoo.jsonl", help="file of results; a run goes on where it stopped")
    parser.add_argument("--table", action="store_true", help="run nothing: make the tables from the results")
    parser.add_argument("--markdown", help="file for the table as Markdown")
    parser.add_argument("--json", help="file for the table as JSON")
    return parser.parse_args(arguments)


def _candidates(libraries: Iterable[str] | None) -> Iterator[Candidate]:
    sources = {"timm": timm_models, "torchvision": torchvision_models, "others": other_models}
    for library in libraries or sources:
        yield from sources[library]()


def run(candidates: list[Candidate], methods: list[str], results: Path, *, everything: bool, alone: bool) -> None:
    """Try every candidate that has no result yet, the representatives first, and write one line each."""
    done = {row["name"] for row in _read(results)}
    surveyed = [_survey(candidate) for candidate in candidates]
    surveyed.sort(key=lambda row: row["modules"])
    smallest = {row["kind"]: row["name"] for row in reversed(surveyed)}
    by_name = {candidate.name: candidate for candidate in candidates}
    for row in surveyed:
        row["like"] = "" if everything or smallest[row["kind"]] == row["name"] else smallest[row["kind"]]
    waiting = [row for row in sorted(surveyed, key=lambda row: bool(row["like"])) if row["name"] not in done]
    with results.open("a", encoding="utf-8") as file:
        for count, row in enumerate(waiting):
            started = time.perf_counter()
            candidate = by_name[row["name"]]
            row |= examine(candidate, methods, like=bool(row["like"]), alone=alone or candidate.library == "others")
            row["seconds"] = round(time.perf_counter() - started, 2)
            file.write(json.dumps(row) + "\n")
            file.flush()
            failed = sorted({v[0] for v in row["verdicts"].values()} & {"silent", "crashed"})
            print(f"{count + 1}/{len(waiting)} {candidate.name} {row['seconds']} s {' '.join(failed)}", file=sys.stderr)


def _survey(candidate: Candidate) -> dict[str, Any]:
    """Where an architecture comes from, its kind and its size; a kind of its own if it cannot be built."""
    row = {"name": candidate.name, "library": candidate.library, "family": candidate.family}
    try:
        model, _ = candidate.build()
    except Exception:
        return {**row, "kind": candidate.name, "modules": 0}
    return {**row, "kind": kind_of(model), "modules": sum(1 for _ in model.modules())}


def _read(results: Path) -> list[dict[str, Any]]:
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def examine(candidate: Candidate, methods: list[str], *, like: bool, alone: bool) -> dict[str, Any]:
    """A verdict per method; only planned if the architecture is like another one that is run."""
    try:
        model, example = candidate.build()
    except Exception:
        return {"connected": False, "unbuilt": _last_lines(), "verdicts": {}}
    if like:
        return {"connected": False, "verdicts": {m: _planned(model, m) for m in methods}}
    found, unused = verdicts(model, example, methods, alone=alone)
    return {"connected": True, "verdicts": found, "unused": unused}


def kind_of(model: nn.Module) -> str:
    """A digest of what decides how methods fit: the modules' classes, their switches, and which parameters they have."""
    found = set()
    for module in model.modules():
        switches = sorted((k, v) for k, v in vars(module).items() if isinstance(v, bool) and k not in _MODES)
        owned = [(name, p is not None) for name, p in module._parameters.items()]
        found.add(f"{type(module).__module__}.{type(module).__qualname__} {switches} {owned}")
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()[:16]


def verdicts(model: nn.Module, example: Any, methods: list[str], *, alone: bool) -> tuple[dict[str, Verdict], list[str]]:
    """What each method does to a model, and the parameters that the model itself does not use; the model is left as it was.

    Args:
        model: A model on the meta device (or any other).
        example: An input for it.
        methods: Names of methods.
        alone: Apply each method by itself. Otherwise all that fit are applied together, and where that shows a fault, each by
            itself.
    """
    found = {method: _planned(model, method, build=True) for method in methods}
    fits = [m for m, (status, _) in found.items() if status == "works"]
    union = {} if alone else _attempt(model, example, "+".join(["full", *(m for m in fits if find(m).adapter is not None)]))
    if union == {} and not alone:
        return found, []
    # Full fine-tuning adds nothing: what is silent there, such as a mask token, is so without medpeft.
    unused = _attempt(model, example, "full")
    if isinstance(unused, str):
        return dict.fromkeys(methods, ("crashed", unused)), []
    if alone or isinstance(union, str) or _faults(union, unused):
        found |= {m: _by_itself(model, example, m, unused) for m in fits}
    return found, sorted(unused)


def _planned(model: nn.Module, method: str, *, build: bool = False) -> Verdict:
    """Whether a method would be applied; with `build`, its adapters are constructed too."""
    try:
        planned = medpeft.plan(model, method)
        return "works", str(planned.trainable) if build else ""
    except medpeft.MedpeftError as error:
        return "refused", str(error)
    except Exception:
        return "crashed", _last_lines()


def _by_itself(model: nn.Module, example: Any, method: str, unused: Mapping[str, str]) -> Verdict:
    """The verdict on one method that planning found no fault with, on a model that runs without it."""
    silent = _attempt(model, example, method)
    if isinstance(silent, Refusal):
        return "refused", str(silent)
    if isinstance(silent, str):
        return "crashed", silent
    faults = _faults(silent, unused)
    return ("silent", f"{len(faults)} tensors, such as {faults[0]}") if faults else ("works", "")


def _faults(silent: Mapping[str, str], unused: Mapping[str, str]) -> list[str]:
    """What is silent in layers that the model itself does use."""
    idle = {name.rpartition(".")[0] for name in unused}
    return [text for n, text in silent.items() if n not in unused and n.partition(".adapters.")[0] not in idle]


def _attempt(model: nn.Module, example: Any, applied: str) -> dict[str, str] | str:
    """The trainable tensors that reach no output, each with what is known of the cause; or what went wrong."""
    try:
        medpeft.apply(model, applied, batchnorm="frozen", keep_base=False)
        try:
            return {tensor.name: str(tensor) for tensor in connected(model, example).without_effect}
        finally:
            forget(model)
    except medpeft.MedpeftError as error:
        # With a cause, it is another error's report: the model does not run.
        return Refusal(error) if error.__cause__ is None else _last_lines()
    except Exception:
        return _last_lines()


def _last_lines() -> str:
    return re.sub(r"\s+", " ", traceback.format_exc())[-400:]


def skip_initialisation() -> None:
    """Leave out the initialisation of weights, which is most of the time it takes to build a model on the meta device."""
    import timm.layers.weight_init as timm_init

    def untouched(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor

    for module in (torch.nn.init, timm_init):
        for name, function in list(vars(module).items()):
            if name.endswith("_") and not name.endswith("__") and callable(function):
                setattr(module, name, untouched)


if __name__ == "__main__":
    sys.exit(main())
