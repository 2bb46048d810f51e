"""The verdict on a method and a model: works, refused, silent, or crashed."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from typing import Any

from torch import nn

import medpeft
from medpeft.adapters.registry import find
from medpeft.checks.connections import connected
from medpeft.surgery.apply import forget

Verdict = tuple[str, str]
"""A status and what there is to say about it."""

Outcome = dict[str, str] | str
"""The trainable tensors that reach no output, each with the cause; or what went wrong."""


class Refusal(str):
    """Reason why a method does not run on an input, known only once it sees a mask or a number of tokens."""


def verdicts(
    model: nn.Module,
    example: Any,
    methods: list[str],
    *,
    alone: bool,
) -> tuple[dict[str, Verdict], list[str]]:
    """Judge every method on a model, which is left as it was, and name the parameters that it does not use.

    Args:
        model: A model on the meta device (or any other).
        example: An input for it.
        methods: Names of methods.
        alone: Apply each method by itself. Otherwise all that fit are applied together, each that refuses the
            input by itself, and every one by itself only if that shows a fault.
    """
    by_method = {method: planned(model, method, build=True) for method in methods}
    fitting = [method for method, (status, _) in by_method.items() if status == "works"]
    together: Outcome = {}
    if not alone:
        together, refusing = _together(model, example, fitting)
        if together == {}:
            for method in refusing:
                by_method[method] = _by_itself(model, example, method, {})
            return by_method, []
    # Full fine-tuning adds nothing: a tensor without effect there, such as a mask token, has none anyway.
    unused = _attempt(model, example, "full")
    if isinstance(unused, str):
        return dict.fromkeys(methods, ("crashed", unused)), []
    if alone or isinstance(together, str) or _faults(together, unused):
        for method in fitting:
            by_method[method] = _by_itself(model, example, method, unused)
    return by_method, sorted(unused)


def planned(model: nn.Module, method: str, *, build: bool = False) -> Verdict:
    """Judge whether a method would be applied; with `build`, its adapters are constructed too."""
    try:
        plan = medpeft.plan(model, method)
        return "works", str(plan.trainable) if build else ""
    except medpeft.MedpeftError as error:
        return "refused", str(error)
    except Exception:
        return "crashed", last_lines()


def _together(model: nn.Module, example: Any, methods: list[str]) -> tuple[Outcome, list[str]]:
    """Judge all methods with adapters at once, without those that a refusal names; list these, too."""
    additive = [method for method in methods if find(method).adapter is not None]
    refusing: list[str] = []
    while True:
        outcome = _attempt(model, example, "+".join(["full", *additive]))
        named = []
        if isinstance(outcome, Refusal):
            named = [method for method in additive if f"'{method}'" in outcome]
        if not named:
            return outcome, refusing
        refusing += named
        additive = [method for method in additive if method not in named]


def _by_itself(model: nn.Module, example: Any, method: str, unused: Mapping[str, str]) -> Verdict:
    """Judge one method that planning found no fault with, on a model that runs without it."""
    outcome = _attempt(model, example, method)
    if isinstance(outcome, Refusal):
        return "refused", str(outcome)
    if isinstance(outcome, str):
        return "crashed", outcome
    faults = _faults(outcome, unused)
    if faults:
        return "silent", f"{len(faults)} tensors, such as {faults[0]}"
    return "works", ""


def _faults(without_effect: Mapping[str, str], unused: Mapping[str, str]) -> list[str]:
    """List the tensors without effect in layers that the model itself uses."""
    idle = {name.rpartition(".")[0] for name in unused}
    faults = []
    for name, text in without_effect.items():
        if name not in unused and name.partition(".adapters.")[0] not in idle:
            faults.append(text)
    return faults


def _attempt(model: nn.Module, example: Any, methods: str) -> Outcome:
    """Find the trainable tensors that reach no output, each with the cause; or say what went wrong."""
    try:
        medpeft.apply(model, methods, batchnorm="frozen", keep_base=False)
        try:
            return {tensor.name: str(tensor) for tensor in connected(model, example).without_effect}
        finally:
            forget(model)
    except medpeft.MedpeftError as error:
        # With a cause, it is another error's report: the model does not run.
        return Refusal(error) if error.__cause__ is None else last_lines()
    except Exception:
        return last_lines()


def last_lines() -> str:
    """Take the end of the traceback of the error that is being handled, in one line."""
    return re.sub(r"\s+", " ", traceback.format_exc())[-400:]
