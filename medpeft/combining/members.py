"""The files to combine: each read and checked as `load` does, and all of one base, method and places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapters.by_place import ByPlace
from ..adapters.record import Applied, adapted_inside
from ..architecture.layers import within
from ..checkpoint.compatibility import Wording, differences
from ..checkpoint.header import read as read_header
from ..checkpoint.load import HeadPolicy, Prepared, prepare
from ..checkpoint.messages import as_lines
from ..checkpoint.source import Source, name_of, opened
from ..errors import CheckpointError, require
from ..surgery.build import state_of_built
from ..surgery.plan import Plan

_FREE = ("rank", "alpha", "dropout", "init", "rslora", "freeze_a")
"""Options of `lora` in which files may differ: what they add to the weight is a matrix all the same."""

_FACTS = Wording(
    "{}: only in this file", "{}: only in the first file", "{}: {!r} in this file, {!r} in the first"
)


@dataclass(frozen=True)
class Member:
    """One of the files to combine, read and checked.

    Attributes:
        weight: Its weight.
        prepared: What loading it would do.
    """

    weight: float
    prepared: Prepared

    @property
    def name(self) -> str:
        """Its name, for messages."""
        return self.prepared.header.name

    @property
    def classes(self) -> list[str] | None:
        """Names of its classes, None if it has none."""
        return self.prepared.header.classes

    @property
    def plan(self) -> Plan:
        """The plan that loading it would carry out."""
        assert self.prepared.planned is not None  # The model is not adapted.
        return self.prepared.planned

    @property
    def record(self) -> Applied:
        """The record of what was applied."""
        return self.plan.record

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the file by name."""
        return self.prepared.values

    def starts(self) -> dict[str, Tensor]:
        """The values from which its adapters started, by the names of the file."""
        return dict(state_of_built(self.prepared.built))


def read(
    model: nn.Module,
    files: Mapping[Source, float],
    *,
    check_base: bool,
    keep_base: bool | None,
    head: Source | None,
) -> list[Member]:
    """Read the files, and compare each with the first.

    Args:
        model: The base.
        files: The files with their weights.
        check_base: As in `load`.
        keep_base: As in `load`.
        head: The file whose head is taken; None reads the heads of all.

    Raises:
        MedpeftError: the model is adapted.
        CheckpointError: a file is damaged, is of another base or differs from the first in more than values.
    """
    inside = adapted_inside(model)
    require(inside is None, "combine takes the base, and this model is adapted: call medpeft.remove(model).")
    members = []
    for source, weight in files.items():
        policy: HeadPolicy = "strict"
        if head is not None and source != head:
            policy = "skip"
        with opened(source) as file:
            header = read_header(file, name_of(source))
            prepared = prepare(model, file, header, check_base=check_base, head=policy, keep_base=keep_base)
        members.append(Member(float(weight), prepared))
    for member in members[1:]:
        lines = differences(_facts(member), _facts(members[0]), _FACTS)
        if head is None and member.classes != members[0].classes:
            lines.append("the names of the classes: pass head= with the file whose head is to be taken")
        if lines:
            raise CheckpointError(
                f"{member.name} cannot be combined with {members[0].name}:\n  {as_lines(lines)}\n"
                "Files of one base can be, that were trained by one method with the same options and places."
            )
    _require_sums(members)
    return members


def _facts(member: Member) -> dict[str, object]:
    """What the files to combine have in common."""
    record = member.record
    facts: dict[str, object] = {"batchnorm": record.batchnorm, "head": record.head}
    for method, options in record.methods.items():
        for option, value in options.items():
            if method != "lora" or option not in _FREE:
                facts[f"{method}: {option}"] = value
    for method, layer, weight in record.sites:
        facts[f"adapters of {method!r} at {f'{layer}.{weight}'!r}"] = True
    for name in record.selected:
        if not within(name, record.head):
            facts[f"selected parameter {name!r}"] = True
    return facts


def _require_sums(members: Sequence[Member]) -> None:
    """Raise `CheckpointError` for DoRA: what it adds to the weight has no low rank."""
    for member in members:
        dora = member.record.methods.get("lora", {}).get("dora", False)
        if dora is True or isinstance(dora, ByPlace):
            raise CheckpointError(
                f"{member.name} has dora=True, and the sum of such changes is no LoRA: load each file into a "
                "copy of the base, merge both and average the weights."
            )


def require_same_start(name: str, members: Sequence[Member], starts: Sequence[Tensor]) -> None:
    """Raise `CheckpointError` where adapters started from other values.

    A hidden unit in one is then another one in the other, and numbers in one place mean different things.
    """
    for member, start in zip(members[1:], starts[1:], strict=True):
        if torch.equal(start, starts[0]):
            continue
        raise CheckpointError(
            f"{name!r} started from other values in {member.name} (seed {member.record.seed}) than in "
            f"{members[0].name} (seed {members[0].record.seed}), so numbers at one place mean different "
            "things: combine files that were trained from one seed."
        )


def require_positive(members: Sequence[Member], what: str) -> None:
    """Raise `MedpeftError` where weights give no average."""
    weights = [member.weight for member in members]
    require(
        min(weights) >= 0 and sum(weights) > 0,
        f"{what} can only be averaged, with weights of at least 0 that are not all 0: the weights are "
        f"{', '.join(f'{weight:g}' for weight in weights)}.",
    )
