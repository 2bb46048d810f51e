"""The command `medpeft`: answers about a timm architecture or a checkpoint, without a script.

Exit codes:
0  what was asked for holds, also if the reader of the output closed it early (`medpeft methods | head -1`);
1  it failed, and the reason is on stderr;
2  the command cannot be understood.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import io
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import medpeft
from medpeft.checkpoint.header import Header
from medpeft.checkpoint.writing import write
from medpeft.errors import MedpeftError, require


class Answer(NamedTuple):
    """Output of a command: values for `--json`, and a text for people."""

    values: Any
    text: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        return 0
    except OSError as error:  # The disk is full.
        _discard_output()
        print(f"medpeft: {error}", file=sys.stderr)
        return 1


def _discard_output() -> None:
    """Discard unwritten output: Python tries to write it once more at its end, and would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: Sequence[str] | None) -> int:
    """Carry out a command, and print its answer or why there is none."""
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # A console may have no Greek letters.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = _warn
            answer: Answer = options.run(options)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        print(f"medpeft: {error}. Install it: python -m pip install {package}", file=sys.stderr)
        return 1
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        # A MedpeftError, or an error of torch or timm about an option.
        print(f"medpeft: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(answer.values, indent=2, default=str))
    else:
        print(answer.text)
    return 0


def _warn(message: Any, *source: Any, **options: Any) -> None:
    """Print a warning without the line of code that gave it."""
    print(f"medpeft: warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="medpeft",
        description=(medpeft.__doc__ or "").partition("\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"medpeft {medpeft.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _command(commands, "methods", _methods, "list the methods")
    trained = "what a method would train in a timm architecture, without its weights"
    plan = _command(commands, "plan", _plan, trained)
    _add_model(plan)
    plan.add_argument(
        "--layers", action="store_true", help="a row for every layer, not for every type of layer"
    )
    proven = "whether all that a method would train reaches the output, without weights"
    _add_model(_command(commands, "check", _check, proven))
    inspect = _command(commands, "inspect", _inspect, "what is in a file of medpeft.save")
    inspect.add_argument("file", type=Path)
    folded = "fold a file of medpeft.save into its base: a plain timm checkpoint"
    _add_merge(_command(commands, "merge", _merge, folded))
    return parser


def _command(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    """Declare a command with the option that every one has."""
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(run=run)
    return command


def _add_model(command: argparse.ArgumentParser) -> None:
    """Declare an architecture and how to adapt it."""
    command.add_argument("arch", help="a timm architecture, such as resnet50")
    command.add_argument("method", help="a method, or several: bias+norm")
    repeated: dict[str, Any] = {"action": "append", "default": [], "type": _option}
    command.add_argument("--option", metavar="K=V", help="such as rank=4", **repeated)
    command.add_argument(
        "--target", action="append", help="layers to take: a glob or a role; may be repeated"
    )
    command.add_argument("--exclude", action="append", help="layers to leave out")
    command.add_argument("--depth", type=float, default=1.0, help="share of the blocks, the last ones (1)")
    command.add_argument("--num-classes", type=int, default=2, metavar="N", help="outputs of the head (2)")


def _add_merge(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of merging."""
    command.add_argument("file", type=Path)
    command.add_argument("--arch", required=True, help="the timm architecture that was adapted")
    command.add_argument("--output", required=True, type=Path, help="safetensors file to write")
    command.add_argument(
        "--base",
        type=Path,
        help="weights of the base as timm saves them; else its pretrained ones, downloaded",
    )
    outputs = "outputs of the head, where the file does not tell"
    command.add_argument("--num-classes", type=int, metavar="N", help=outputs)


def _option(text: str) -> tuple[str, Any]:
    """Read `rank=4` as `("rank", 4)`; a value that is no Python literal is a string."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    constants = {"true": True, "false": False, "none": None}
    if value.lower() in constants:
        return name, constants[value.lower()]
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _methods(options: argparse.Namespace) -> Answer:
    methods = medpeft.methods()
    width = max(map(len, methods))
    lines = [f"{name:{width}}  {summary}" for name, summary in methods.items()]
    return Answer(methods, "\n".join(lines))


def _plan(options: argparse.Namespace) -> Answer:
    model = _on_meta(options.arch, options.num_classes)
    planned = medpeft.plan(model, options.method, **_request(options))
    table = planned.table()
    values = {
        "arch": options.arch,
        "method": planned.record.name,
        "trainable": sum(row.parameters for row in table.rows),
        "rows": [dict(vars(row)) for row in table.rows],
    }
    if not options.layers:
        table = table.by_type(note="--layers lists every place")
    return Answer(values, str(table))


def _check(options: argparse.Namespace) -> Answer:
    model = _on_meta(options.arch, options.num_classes)
    medpeft.apply(model, options.method, **_request(options))
    # Two images, because a BatchNorm in train mode may need more than one.
    report = medpeft.check(model, torch.empty(2, *_input_size(model), device="meta"))
    values = {"arch": options.arch, "method": options.method, **vars(report)}
    return Answer(values, f"{options.method} on {options.arch}: {report}")


def _inspect(options: argparse.Namespace) -> Answer:
    header = medpeft.inspect(options.file)
    return Answer(header.to_dict(), str(header))


def _merge(options: argparse.Namespace) -> Answer:
    header = medpeft.inspect(options.file)
    model = medpeft.load(_base(options, header).eval(), options.file)
    medpeft.merge(model, example_input=torch.rand(1, *_input_size(model)))
    state = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    write(str(options.output), state, {"format": "pt"})
    size = options.output.stat().st_size
    values = {"output": str(options.output), "arch": options.arch, "tensors": len(state), "bytes": size}
    merged = f"{options.arch} with {header.name} merged"
    return Answer(values, f"{options.output}: {merged}, {len(state)} tensors, {size:,} bytes")


def _base(options: argparse.Namespace, header: Header) -> nn.Module:
    """Build the architecture with the base's weights.

    The weights may have the head of another task. The file brings its own.
    """
    sizes = {}
    classes = options.num_classes or _outputs(header)
    if classes:
        sizes["num_classes"] = classes
    model = _timm_model(options.arch, pretrained=options.base is None, **sizes)
    if options.base is not None:
        heads = tuple(f"{name}." for name in header.document["head"])
        _load_all_but(heads, model, options)
    return model


def _load_all_but(heads: tuple[str, ...], model: nn.Module, options: argparse.Namespace) -> None:
    """Load the base's weights into a model, its head apart."""
    state = _read_weights(options.base)
    for name in list(state):
        if name.startswith(heads):
            del state[name]
    missing, unexpected = model.load_state_dict(state, strict=False)
    wrong = [*(name for name in missing if not name.startswith(heads)), *unexpected]
    if wrong:
        shown = ", ".join(wrong[:4])
        problem = f"{options.base} does not hold the weights of {options.arch}"
        raise MedpeftError(f"{problem}: {shown} missing or unexpected.")


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of weights as timm saves them."""
    from timm.models import load_state_dict

    require(path.is_file(), f"There is no file {path}.")
    try:
        state: dict[str, Tensor] = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # torch, pickle and safetensors have one each
        raise MedpeftError(f"{path} holds no weights that can be read: {error}") from error
    return state


def _outputs(header: Header) -> int:
    """Count the outputs of the head in a file; 0 if it does not tell."""
    for name in header.document["head"]:
        if f"{name}.weight" in header.tensors:
            return header.tensors[f"{name}.weight"].shape[0]
    return len(header.classes or [])


def _request(options: argparse.Namespace) -> dict[str, Any]:
    """Collect the arguments of `apply` and `plan` beside the method."""
    places = {"target": options.target, "exclude": options.exclude, "depth": options.depth}
    return places | dict(options.option)


def _on_meta(arch: str, classes: int) -> nn.Module:
    """Build an architecture without values, which costs neither memory nor a download."""
    with torch.device("meta"):
        return _timm_model(arch, num_classes=classes)


def _timm_model(arch: str, **options: Any) -> nn.Module:
    """Build a timm architecture, or say which names are near."""
    import timm  # Half of the command's start-up time, and `methods` and `inspect` do without.

    name = arch.partition(".")[0]
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = "timm.list_models() lists all."
        if near:
            hint = f"Did you mean {', '.join(near)}?"
        raise MedpeftError(f"timm {timm.__version__} has no architecture {name!r}. {hint}")
    model: nn.Module = timm.create_model(arch, **options)
    return model


def _input_size(model: nn.Module) -> tuple[int, ...]:
    """Shape of one image that the model takes; (3, 224, 224) if timm does not say."""
    config: Any = getattr(model, "pretrained_cfg", {})
    return tuple(config.get("input_size", (3, 224, 224)))


if __name__ == "__main__":
    sys.exit(main())
