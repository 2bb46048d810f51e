"""The zoo's results as a table: how many architectures of each family a method works on, and what it says to the others."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

STATUSES = ("works", "refused", "silent", "crashed")
FAILURES = ("silent", "crashed")


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts per family and method, totals, the reasons for refusals, and every failure.

    An architecture that was planned alone has the verdict of the one it is like, if planning said that the method fits.
    """
    by_name = {row["name"]: row for row in rows}
    families: dict[str, dict[str, dict[str, int]]] = {}
    reasons: dict[str, Counter[str]] = {}
    tried: dict[str, list[int]] = {}
    failures = []
    for row in rows:
        name = row["name"] if row["library"] == "others" else row["family"]
        for method, (status, text) in row["verdicts"].items():
            if row["like"] and status == "works":
                status, text = by_name[row["like"]]["verdicts"].get(method, (status, text))
            cell = families.setdefault(name, {}).setdefault(method, dict.fromkeys(STATUSES, 0))
            cell[status] += 1
            tried.setdefault(method, [0, 0])[0] += 1
            tried[method][1] += row["connected"]
            if status == "refused":
                reasons.setdefault(method, Counter())[_general(text)] += 1
            if status in FAILURES and not row["like"]:
                failures.append((row["name"], method, status, text))
    verdicts = [cell for methods in families.values() for cell in methods.values()]
    return {
        "versions": versions(),
        "totals": {
            "architectures": sum(bool(row["verdicts"]) for row in rows),
            **{s: sum(cell[s] for cell in verdicts) for s in STATUSES},
        },
        "connected": sum(row["connected"] for row in rows),
        "tried": tried,
        "unbuilt": {row["name"]: row["unbuilt"] for row in rows if "unbuilt" in row},
        "unused": {row["name"]: row["unused"] for row in rows if row.get("unused")},
        "seconds": round(sum(row["seconds"] for row in rows)),
        "families": dict(sorted(families.items(), key=lambda item: ("/" in item[0], " " in item[0], item[0]))),
        "reasons": {method: dict(counter.most_common(5)) for method, counter in reasons.items()},
        "failures": failures,
    }


def _general(reason: str) -> str:
    """A reason for a refusal without the names of the model and its layers."""
    reason = re.sub(r" found nothing to train in \S+ \(target=None\)", " found nothing to train", reason)
    reason = re.sub(r" This model has .*$", "", reason)
    reason = re.sub(r"\S+ has no head", "the model has no head", reason)
    return re.sub(r"\b[\w.]*\.\d+[\w.]*", "…", reason)[:240]


def versions() -> dict[str, str]:
    """Versions of the libraries whose models are tried."""
    import importlib.metadata as metadata

    names = ("torch", "timm", "torchvision", "transformers", "monai", "open_clip_torch", "diffusers")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return found


def markdown(found: dict[str, Any]) -> str:
    """The page of the documentation."""
    totals = found["totals"]
    methods = list(dict.fromkeys(m for cells in found["families"].values() for m in cells))
    listed = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        "# The zoo",
        "",
        f"{len(methods)} methods on {totals['architectures']:,} architectures:",
        f"**{totals['works']:,} combinations work, {totals['refused']:,} are refused with a reason,",
        f"{totals['silent']} are silent, {totals['crashed']} crash.**",
        "",
        "A method *works* if every tensor that it trains reaches the output of the model, in train and in eval mode. A method",
        "that fits nothing is *refused* by a `MedpeftError` that says why, and leaves the model untouched. *Silent* would be a",
        "tensor that trains and reaches nothing: what this project is there to make impossible.",
        "",
        "Made by `python benchmarks/zoo.py --markdown docs/zoo.md --json docs/zoo.json` with",
        f"{listed}.",
        "Models are built on the meta device, without weights. An architecture is *run* on fake tensors, or *planned* alone if",
        "a smaller one of its kind (the same classes of modules with the same switches) was run. `--all` runs every one.",
        "",
        *_tried(found),
        "",
        "A number counts the architectures of the family on which the method works; *of n* means that it is refused on the",
        "others, a dash that it is refused on all, ✓ that it works on the only one tried. An empty cell was not tried.",
    ]
    groups = {
        "timm": [n for n in found["families"] if "/" not in n and " " not in n],
        "torchvision": [n for n in found["families"] if "/" not in n and " " in n],
        "Other libraries": [n for n in found["families"] if "/" in n],
    }
    for title, names in groups.items():
        if names:
            lines += ["", f"## {title}", "", *_table(found, names, methods)]
    lines += ["", "## Reasons for refusals", "", *_reasons(found)]
    lines += ["", "## Parameters that a model does not use", "", *_unused(found)]
    return "\n".join(lines) + "\n"


def _tried(found: dict[str, Any]) -> list[str]:
    """How many architectures each method was tried on, methods with the same numbers together."""
    groups: dict[tuple[int, int], list[str]] = {}
    for method, (architectures, run) in found["tried"].items():
        groups.setdefault((architectures, run), []).append(method)
    return [
        f"- {', '.join(f'`{m}`' for m in methods)}: {architectures:,} architectures, {run:,} of them run"
        for (architectures, run), methods in sorted(groups.items(), reverse=True)
    ]


def _table(found: dict[str, Any], names: list[str], methods: list[str]) -> list[str]:
    head = f"| | {' | '.join(methods)} |\n|---|{' ---: |' * len(methods)}"
    rows = []
    for name in names:
        cells = found["families"][name]
        shown = name.removeprefix("torchvision ")
        rows.append(f"| {shown} | {' | '.join(_cell(cells.get(method)) for method in methods)} |")
    return [head, *rows]


def _cell(counts: dict[str, int] | None) -> str:
    if counts is None:
        return ""
    total = sum(counts.values())
    failed = [f"**{counts[s]} {s}**" for s in FAILURES if counts[s]]
    if failed:
        return ", ".join([str(counts["works"]), *failed])
    if counts["works"] == 0:
        return "–"
    if total == 1:
        return "✓"
    return str(total) if counts["works"] == total else f"{counts['works']} of {total}"


def _unused(found: dict[str, Any]) -> list[str]:
    text = (
        "Some architectures own parameters that do not reach the output in train or in eval mode, whatever trains them: mask",
        "tokens, auxiliary heads in eval mode, norms that a pooling leaves out. They do not count above; `medpeft.check` names",
        "them.",
        "",
    )
    rows = [
        f"| {name} | {', '.join(f'`{n}`' for n in names[:4])}{', …' if len(names) > 4 else ''} |"
        for name, names in found["unused"].items()
    ]
    return [*text, "| architecture (and those of its kind) | parameters |", "|---|---|", *rows]


def _reasons(found: dict[str, Any]) -> list[str]:
    rows = ["| method | reason | architectures |", "|---|---|---:|"]
    for method, reasons in found["reasons"].items():
        rows += [f"| {method} | {reason.replace('|', '/')} | {count} |" for reason, count in reasons.items()]
    return rows
