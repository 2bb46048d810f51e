"""Combine the adapters of several files into one, on their base."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapters.by_place import ByPlace, plain_if_one, shown
from ..adapters.options import Count, Share, require_options
from ..adapters.record import own_tensors, require_model
from ..adapters.running import switching
from ..architecture.layers import within
from ..checkpoint.load import built_for
from ..checkpoint.messages import printable
from ..checkpoint.source import Source, name_of
from ..errors import CheckpointError, MedpeftError, clipped, require
from ..surgery.apply import carry_out
from ..surgery.plan import Plan, plan_from
from .changes import How, Recipe
from .lora import LowRank, low_rank_of, relative_error, tensors_of_lora
from .members import Member, read, require_positive, require_same_start

_ARGUMENTS = {
    "how": How,
    "rank": Count | None,
    "density": Share,
    "seed": int,
    "check_base": bool,
    "keep_base": bool | None,
}


@dataclass(frozen=True)
class Combined:
    """What `combine` made. Print it.

    Attributes:
        files: The name and the weight of each file.
        method: The methods, as "lora+bias".
        how: How their changes became one.
        rank: Rank of LoRA: of all layers, or by name of the layer; None without LoRA.
        error: What the rank left out of LoRA's combined changes, relative: ‖ΔW − B·A‖ / ‖ΔW‖ over all layers.
        classes: Names of the classes of the head, None if the files have none.

    Examples:
        >>> import copy, io, medpeft, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> file = io.BytesIO()
        >>> medpeft.save(medpeft.apply(copy.deepcopy(base), "lora", target="0", rank=2, head=None), file)
        >>> print(medpeft.combine(base, {file: 0.5}, rank=1))
        lora of 1 file, sum
          0.5     the open file
          rank 1, which leaves out 0.00% of the change
    """

    files: list[tuple[str, float]]
    method: str
    how: How
    rank: int | dict[str, int] | None
    error: float
    classes: list[str] | None

    def __str__(self) -> str:
        count = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        lines = [f"{self.method} of {count}, {self.how}"]
        lines += [f"  {weight:<8g}{name}" for name, weight in self.files]
        if self.rank is not None:
            lines.append(f"  rank {shown(self.rank)}, which leaves out {self.error:.2%} of the change")
        return printable("\n".join(lines))


def combine(
    model: nn.Module,
    files: Mapping[Source, float],
    *,
    how: How = "sum",
    rank: int | None = None,
    density: float = 1.0,
    seed: int = 0,
    head: Source | None = None,
    check_base: bool = True,
    keep_base: bool | None = None,
) -> Combined:
    """Load several files of one base and method as one adapter: the weighted sum of what they change.

    Then use the model as after `load`. LoRA is combined in the weights; how others are, the guide says.

    Args:
        model: The base, not adapted.
        files: A weight for each file, written as for `load`: 0.5 and 0.5 is the mean, 1 and 1 adds.
        how: "sum"; "ties" (trim each change, elect a sign at each place, average those that have it); or
            "dare" (leave out a random part of each change, enlarge the rest, and add).
        rank: Largest rank of LoRA: singular values beyond it are left out, and the result says how much that
            is. None keeps all; "ties" and "dare", which leave no low rank, need a number.
        density: Share of each change that "ties" and "dare" keep.
        seed: Seed of "dare".
        head: The file whose head is taken as it is; None is the mean of all, if classes and shapes agree.
        check_base: As in `load`.
        keep_base: As in `load`.

    Raises:
        MedpeftError: the model is adapted already, or an argument is none that it may be.
        CheckpointError: a file is damaged, or of another base; files differ in more than their values; or
            adapters started from other values. The model is untouched.

    Examples:
        >>> import copy, io, medpeft, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> files = {io.BytesIO(): 0.7, io.BytesIO(): 0.3}
        >>> for file in files:
        ...     medpeft.save(medpeft.apply(copy.deepcopy(base), "lora", target="0", rank=2, head="1"), file)
        >>> medpeft.combine(base, files).rank
        4
    """
    require_model(model)
    arguments = {"how": how, "rank": rank, "density": density, "seed": seed}
    arguments |= {"check_base": check_base, "keep_base": keep_base}
    require_options("", arguments, _ARGUMENTS)
    _require_files(files, head)
    with switching(model, "combine"):
        members = read(model, files, check_base=check_base, keep_base=keep_base, head=head)
        recipe = Recipe(how, tuple(member.weight for member in members), density, seed)
        return _load_combined(model, members, recipe, rank, _number_of(files, head))


def _load_combined(
    model: nn.Module, members: Sequence[Member], recipe: Recipe, rank: int | None, head_file: int | None
) -> Combined:
    """Adapt the model by what the files give together.

    The head is that of the file with the number `head_file`, or with None the mean of all.
    """
    planned, tensors, layers_of_lora = _plan_and_tensors(model, members, recipe, rank, head_file)
    carry_out(planned, built_for(planned, tensors), tensors)
    return Combined(
        files=[(member.name, member.weight) for member in members],
        method=planned.record.name,
        how=recipe.how,
        rank=planned.record.methods.get("lora", {}).get("rank"),
        error=relative_error(layers_of_lora),
        classes=members[head_file or 0].classes,
    )


def _require_files(files: object, head: Source | None) -> None:
    """Raise `MedpeftError` unless each file has a weight, and the one of the head is among them."""
    if not isinstance(files, Mapping) or not files:
        raise MedpeftError(
            f"files={clipped(files)} must be a dict of weights by file: {{'a.safetensors': 0.7, …}}."
        )
    for source, weight in files.items():
        label = f"the weight of {name_of(source)}"
        require_options("", {label: weight}, {label: float})  # Its message begins with the label.
    require(
        head is None or head in list(files),  # Not `in files`: a wrong one may have no hash.
        f"head={clipped(head)} is none of the files: name one of them, or None for the mean.",
    )


def _number_of(files: Mapping[Source, float], head: Source | None) -> int | None:
    """Number of the file whose head is taken, None for the mean of all."""
    if head is None:
        return None
    return list(files).index(head)


def _plan_and_tensors(
    model: nn.Module, members: Sequence[Member], recipe: Recipe, rank: int | None, head_file: int | None
) -> tuple[Plan, dict[str, Tensor], list[LowRank]]:
    """Compute the plan of the combined adapter and all its tensors; the model stays as it is.

    LoRA is combined in the weights, layer by layer. The head is that of one file, or the mean of all; running
    statistics are the mean. Selected parameters move from the base by their combined change, and other
    adapters from where they started.
    """
    layers_of_lora = low_rank_of(members, recipe, rank)
    planned = _plan(model, members[0], layers_of_lora)
    tensors = tensors_of_lora(planned, layers_of_lora)
    written = {item.prefix + key for item in layers_of_lora for key in item.keys}
    of_base = dict(own_tensors(model))
    starts = [member.starts() for member in members]
    named_by = members[head_file or 0]
    for name in named_by.tensors:
        if name in written:
            continue
        is_of_head = within(name, planned.record.head)
        if is_of_head and head_file is not None:
            tensors[name] = named_by.tensors[name]
            continue
        of_files = [member.tensors[name] for member in members]
        if is_of_head or name in planned.record.statistics:
            tensors[name] = _mean(name, members, of_files)
        elif name in of_base:
            tensors[name] = _moved(name, of_base[name].detach().cpu(), of_files, recipe)
        else:
            of_starts = [start[name] for start in starts]
            tensors[name] = _of_adapters(name, members, of_files, of_starts, recipe)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"The combined {name!r} would have values that are not finite.")
    return planned, tensors, layers_of_lora


def _mean(name: str, members: Sequence[Member], tensors: Sequence[Tensor]) -> Tensor:
    """Average a head or running statistics; of BatchNorm's count of batches, take the largest."""
    if not tensors[0].is_floating_point():
        return torch.stack(list(tensors)).amax(0)
    require_positive(members, repr(name))
    total = sum(member.weight for member in members)
    mean = torch.zeros_like(tensors[0], dtype=torch.float64)
    for member, tensor in zip(members, tensors, strict=True):
        mean += member.weight / total * tensor.double()
    return mean.to(tensors[0].dtype)


def _moved(name: str, start: Tensor, tensors: Sequence[Tensor], recipe: Recipe) -> Tensor:
    """Move a tensor from its start by the combined change; "dare" draws by its name."""
    changes = [tensor.double() - start.double() for tensor in tensors]
    return (start.double() + recipe.combine(name, changes)).to(tensors[0].dtype)


def _of_adapters(
    name: str, members: Sequence[Member], tensors: Sequence[Tensor], starts: Sequence[Tensor], recipe: Recipe
) -> Tensor:
    """Combine a tensor of adapters that are no LoRA; what does not train has to be the same in all files."""
    trains = isinstance(starts[0], nn.Parameter)  # Else it is a buffer, drawn from the seed.
    if trains:
        require_same_start(name, members, starts)
        return _moved(name, starts[0].detach().cpu(), tensors, recipe)
    for member, tensor in zip(members, tensors, strict=True):
        if not torch.equal(tensor, tensors[0]):
            raise CheckpointError(
                f"{name!r}, which does not train, is another in {member.name} than in {members[0].name}, so "
                "that their adapters act in other places: combine files that were trained from one seed."
            )
    return tensors[0]


def _plan(model: nn.Module, first: Member, layers_of_lora: Sequence[LowRank]) -> Plan:
    """Plan what the first file says, with LoRA of the combined ranks and a factor of 1."""
    record = copy.copy(first.record)
    if layers_of_lora:
        ranks = ByPlace()
        for item in layers_of_lora:  # A layer has one rank, and may have several weights.
            ranks[item.layer] = max(item.rank, ranks.get(item.layer, 1))
        # The weights and factors of the files are in the combined B already.
        of_sum = {"rank": plain_if_one(ranks), "alpha": None, "rslora": False, "init": "kaiming"}
        record.methods = {**record.methods, "lora": {**record.methods["lora"], **of_sum}}
    return plan_from(model, record)
