"""The command `medpeft`: what the library says about a timm architecture or one of its files, without writing a script.

Exit codes: 0 if what was asked for holds, 1 if it failed (the reason is on stderr), 2 for a command that cannot be understood.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import io
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import medpeft
from medpeft.checkpoint.file import write
from medpeft.checkpoint.header import Header
from medpeft.errors import MedpeftError, require


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # A console without Greek letters shows formulas with question marks.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = _warn
            found, text = options.run(options)
    except (ValueError, TypeError, OSError, RuntimeError) as error:  # MedpeftError, and what torch and timm make of an option
        print(f"medpeft: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found, indent=2, default=str) if options.json else text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="medpeft", description=(medpeft.__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _command(commands, "methods", _methods, "list the methods")
    plan = _command(commands, "plan", _plan, "what a method would train in a timm architecture, without its weights")
    check = _command(commands, "check", _check, "whether all that a method would train reaches the output, without weights")
    for command in (plan, check):
        command.add_argument("arch", help="a timm architecture, such as resnet50")
        command.add_argument("method", help="a method, or several: bias+norm")
        command.add_argument("--option", action="append", default=[], type=_option, metavar="K=V", help="such as rank=4")
        command.add_argument("--target", action="append", help="layers to take: a glob or a role; may be repeated")
        command.add_argument("--exclude", action="append", help="layers to leave out")
        command.add_argument("--num-classes", type=int, default=2, metavar="N", help="outputs of the head (2)")
    inspect = _command(commands, "inspect", _inspect, "what is in a file of medpeft.save")
    inspect.add_argument("file", type=Path)
    merge = _command(commands, "merge", _merge, "fold a file of medpeft.save into its base: a plain timm checkpoint")
    merge.add_argument("file", type=Path)
    merge.add_argument("--arch", required=True, help="the timm architecture that was adapted")
    merge.add_argument("--output", required=True, type=Path, help="safetensors file to write")
    merge.add_argument("--base", type=Path, help="weights of the base as timm saves them; else its pretrained ones, downloaded")
    merge.add_argument("--num-classes", type=int, metavar="N", help="outputs of the head, where the file does not tell")
    return parser


def _command(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(run=run)
    return command


def _option(text: str) -> tuple[str, Any]:
    """`rank=4` as `("rank", 4)`; a value that is no Python literal is a string."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    constants = {"true": True, "false": False, "none": None}
    try:
        return name, constants[value.lower()] if value.lower() in constants else ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _warn(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    print(f"medpeft: warning: {message}", file=sys.stderr)


def _methods(options: argparse.Namespace) -> tuple[Any, str]:
    found = medpeft.methods()
    width = max(map(len, found))
    return found, "\n".join(f"{name:{width}}  {summary}" for name, summary in found.items())


def _plan(options: argparse.Namespace) -> tuple[Any, str]:
    planned = medpeft.plan(_on_meta(options.arch, options.num_classes), options.method, **_request(options))
    table = planned.table()
    rows = [dict(vars(row)) for row in table.rows]
    total = sum(row.parameters for row in table.rows)
    return {"arch": options.arch, "method": planned.record.name, "trainable": total, "rows": rows}, str(table)


def _check(options: argparse.Namespace) -> tuple[Any, str]:
    model = medpeft.apply(_on_meta(options.arch, options.num_classes), options.method, **_request(options))
    # Two images, as a BatchNorm in train mode may need more than one.
    checked = medpeft.check(model, torch.empty(2, *_input_size(model), device="meta"))
    return {"arch": options.arch, "method": options.method, **vars(checked)}, f"{options.method} on {options.arch}: {checked}"


def _inspect(options: argparse.Namespace) -> tuple[Any, str]:
    header = medpeft.inspect(options.file)
    return header.to_dict(), str(header)


def _merge(options: argparse.Namespace) -> tuple[Any, str]:
    header = medpeft.inspect(options.file)
    model = medpeft.load(_base(options, header).eval(), options.file)
    medpeft.merge(model, example_input=torch.rand(1, *_input_size(model)))
    state = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    write(str(options.output), state, {"format": "pt"})
    found = {"output": str(options.output), "arch": options.arch, "tensors": len(state), "bytes": options.output.stat().st_size}
    return found, f"{options.output}: {options.arch} with {header.name} merged, {len(state)} tensors, {found['bytes']:,} bytes"


def _base(options: argparse.Namespace, header: Header) -> nn.Module:
    """The architecture with the base's weights; the head, which the file brings, may be that of another task there."""
    classes = options.num_classes or _outputs(header)
    model = _timm_model(options.arch, pretrained=options.base is None, **({"num_classes": classes} if classes else {}))
    if options.base is None:
        return model
    state = _read_weights(options.base)
    heads = tuple(f"{name}." for name in header.document["head"])
    missing, unexpected = model.load_state_dict({n: t for n, t in state.items() if not n.startswith(heads)}, strict=False)
    wrong = [*(name for name in missing if not name.startswith(heads)), *unexpected]
    require(
        not wrong, f"{options.base} does not hold the weights of {options.arch}: {', '.join(wrong[:4])} missing or unexpected."
    )
    return model


def _read_weights(path: Path) -> dict[str, Tensor]:
    from timm.models import load_state_dict

    require(path.is_file(), f"There is no file {path}.")
    try:
        found: dict[str, Tensor] = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # torch, pickle and safetensors have one each
        raise MedpeftError(f"{path} holds no weights that can be read: {error}") from error
    return found


def _outputs(header: Header) -> int:
    """Number of outputs of the head in the file; 0 where it has none that says."""
    sizes = [
        header.tensors[f"{name}.weight"].shape[0] for name in header.document["head"] if f"{name}.weight" in header.tensors
    ]
    return sizes[0] if sizes else len(header.classes or [])


def _request(options: argparse.Namespace) -> dict[str, Any]:
    return {"target": options.target, "exclude": options.exclude, **dict(options.option)}


def _on_meta(arch: str, classes: int) -> nn.Module:
    """The architecture without values, which costs neither memory nor a download."""
    with torch.device("meta"):
        return _timm_model(arch, num_classes=classes)


def _timm_model(arch: str, **options: Any) -> nn.Module:
    import timm  # Half of the command's start-up time, and `methods` and `inspect` do without.

    name = arch.partition(".")[0]
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"Did you mean {', '.join(near)}?" if near else "timm.list_models() lists all."
        raise MedpeftError(f"timm {timm.__version__} has no architecture {name!r}. {hint}")
    model: nn.Module = timm.create_model(arch, **options)
    return model


def _input_size(model: nn.Module) -> tuple[int, ...]:
    config: Any = getattr(model, "pretrained_cfg", {})
    return tuple(config.get("input_size", (3, 224, 224)))


if __name__ == "__main__":
    sys.exit(main())
