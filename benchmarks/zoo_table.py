"""The zoo's results as tables.

They count the architectures of each family on which a method works, and give the reasons for the others.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

STATUSES = ("works", "refused", "silent", "crashed")
FAILURES = ("silent", "crashed")

LIBRARIES = ("torch", "timm", "torchvision", "transformers", "monai", "open_clip_torch", "diffusers")
"""Distributions whose models are tried."""


@dataclass
class Tally:
    """Counts of verdicts.

    Attributes:
        families: Architectures by family, method and status.
        reasons: Reasons for refusals by method.
        tried: By method the architectures tried, and those of them that were run.
        failures: Architecture, method, status and text of every failure.
    """

    families: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    reasons: dict[str, Counter[str]] = field(default_factory=dict)
    tried: dict[str, list[int]] = field(default_factory=dict)
    failures: list[tuple[str, str, str, str]] = field(default_factory=list)

    def add(self, row: dict[str, Any], method: str, status: str, text: str) -> None:
        """Count the verdict on one method."""
        family = row["name"] if row["library"] == "others" else row["family"]
        counts = self.families.setdefault(family, {}).setdefault(method, dict.fromkeys(STATUSES, 0))
        counts[status] += 1
        tried = self.tried.setdefault(method, [0, 0])
        tried[0] += 1
        tried[1] += row["connected"]
        if status == "refused":
            self.reasons.setdefault(method, Counter())[_without_names(text)] += 1
        if status in FAILURES and not row["like"]:
            self.failures.append((row["name"], method, status, text))

    def totals(self) -> dict[str, int]:
        """Count the verdicts of each status."""
        totals = dict.fromkeys(STATUSES, 0)
        for methods in self.families.values():
            for counts in methods.values():
                for status in STATUSES:
                    totals[status] += counts[status]
        return totals


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum the results up: counts by family and method, totals, the reasons for refusals, and every failure.

    An architecture that was only planned has the verdict of the one it is like, if planning said that the
    method fits.
    """
    by_name = {row["name"]: row for row in rows}
    tally = Tally()
    for row in rows:
        for method, (status, text) in row["verdicts"].items():
            if row["like"] and status == "works":
                status, text = by_name[row["like"]]["verdicts"].get(method, (status, text))
            tally.add(row, method, status, text)
    architectures = sum(bool(row["verdicts"]) for row in rows)
    return {
        "versions": versions(),
        "totals": {"architectures": architectures, **tally.totals()},
        "connected": sum(row["connected"] for row in rows),
        "tried": tally.tried,
        "unbuilt": _column("unbuilt", rows),
        "unused": _column("unused", rows),
        "seconds": round(sum(row["seconds"] for row in rows)),
        "families": {name: tally.families[name] for name in sorted(tally.families, key=_place)},
        "reasons": {method: dict(counter.most_common(5)) for method, counter in tally.reasons.items()},
        "failures": tally.failures,
    }


def _column(key: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Take one value of every row that has it, by architecture."""
    return {row["name"]: row[key] for row in rows if row.get(key)}


def _place(family: str) -> tuple[bool, bool, str]:
    """Order families: timm's, torchvision's, those of other libraries."""
    return "/" in family, " " in family, family


def _without_names(reason: str) -> str:
    """Leave out of a reason the names of the model and its layers."""
    reason = re.sub(r" found nothing to train in \S+ \(target=None\)", " found nothing to train", reason)
    reason = re.sub(r" This model has .*$", "", reason)
    reason = re.sub(r"\S+ has no head", "the model has no head", reason)
    return re.sub(r"\b[\w.]*\.\d+[\w.]*", "…", reason)[:240]


def versions() -> dict[str, str]:
    """Look up the versions of the libraries whose models are tried."""
    installed = {}
    for name in LIBRARIES:
        try:
            installed[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


_PAGE = """\
# The zoo

{methods} methods on {architectures:,} architectures:
**{works:,} combinations work, {refused:,} are refused with a reason,
{silent} are silent, {crashed} crash.**

A method *works* if every tensor that it trains reaches the output of the model, in train and in eval mode. A
method that fits nothing is *refused* by a `MedpeftError` that says why, and leaves the model untouched.
*Silent* would be a tensor that trains and reaches nothing: what this project is there to make impossible.

Made by `python benchmarks/zoo.py --markdown docs/zoo.md --json docs/zoo.json` with
{versions}.
Models are built on the meta device, without weights. An architecture is *run* on fake tensors, or *planned*
alone if a smaller one of its kind (the same classes of modules with the same switches) was run. `--all` runs
every one.

{tried}

A number counts the architectures of the family on which the method works; *of n* means that it is refused on
the others, a dash that it is refused on all, ✓ that it works on the only one tried. An empty cell was not
tried.
{tables}
## Reasons for refusals

{reasons}

## Parameters that a model does not use

Some architectures own parameters that do not reach the output in train or in eval mode, whatever trains them:
mask tokens, auxiliary heads in eval mode, norms that a pooling leaves out. They do not count above;
`medpeft.check` names them.

{unused}
"""


def markdown(results: dict[str, Any]) -> str:
    """Write the page of the documentation."""
    methods: dict[str, None] = {}
    for verdicts in results["families"].values():
        methods.update(dict.fromkeys(verdicts))
    return _PAGE.format(
        **results["totals"],
        methods=len(methods),
        versions=", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        tried=_tried(results),
        tables=_tables(results, list(methods)),
        reasons=_reasons(results),
        unused=_unused(results),
    )


def _tried(results: dict[str, Any]) -> str:
    """List how many architectures each method was tried on, methods with the same numbers together."""
    groups: dict[tuple[int, int], list[str]] = {}
    for method, (architectures, run) in results["tried"].items():
        groups.setdefault((architectures, run), []).append(f"`{method}`")
    lines = []
    for (architectures, run), methods in sorted(groups.items(), reverse=True):
        lines.append(f"- {', '.join(methods)}: {architectures:,} architectures, {run:,} of them run")
    return "\n".join(lines)


def _tables(results: dict[str, Any], methods: list[str]) -> str:
    """Write a section for timm, for torchvision and for the other libraries."""
    sections: dict[str, list[str]] = {"timm": [], "torchvision": [], "Other libraries": []}
    for family, verdicts in results["families"].items():
        title = "timm"
        if "/" in family:
            title = "Other libraries"
        elif " " in family:
            title = "torchvision"
        cells = [_cell(verdicts.get(method)) for method in methods]
        sections[title].append(f"| {family.removeprefix('torchvision ')} | {' | '.join(cells)} |")
    head = f"| | {' | '.join(methods)} |\n|---|{' ---: |' * len(methods)}"
    text = ""
    for title, rows in sections.items():
        if rows:
            text += "\n".join(["", f"## {title}", "", head, *rows, ""])
    return text


def _cell(counts: dict[str, int] | None) -> str:
    """Say on how many architectures of a family a method works."""
    if counts is None:
        return ""
    total, works = sum(counts.values()), counts["works"]
    failed = [f"**{counts[status]} {status}**" for status in FAILURES if counts[status]]
    if failed:
        return ", ".join([str(works), *failed])
    if works == 0:
        return "–"
    if total == 1:
        return "✓"
    if works == total:
        return str(total)
    return f"{works} of {total}"


def _unused(results: dict[str, Any]) -> str:
    """List the parameters that each architecture does not use."""
    lines = ["| architecture (and those of its kind) | parameters |", "|---|---|"]
    for architecture, names in results["unused"].items():
        shown = [f"`{name}`" for name in names[:4]]
        if len(names) > 4:
            shown.append("…")
        lines.append(f"| {architecture} | {', '.join(shown)} |")
    return "\n".join(lines)


def _reasons(results: dict[str, Any]) -> str:
    """List the reasons for refusals with their counts."""
    lines = ["| method | reason | architectures |", "|---|---|---:|"]
    for method, reasons in results["reasons"].items():
        for reason, count in reasons.items():
            lines.append(f"| {method} | {reason.replace('|', '/')} | {count} |")
    return "\n".join(lines)
