"""What a study shows at a glance: score against cost, and score against the amount of data."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from .statistics import Lead, pareto_front
from .tables import lead_text

# Okabe and Ito's colours, told apart with any colour vision, but for their yellow, which is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#595959"

COSTS = {
    "trainable": "trainable parameters",
    "saved_mib": "kept for backward in a step (MiB)",
    "step_ms": "time of a training step (ms)",
}


def draw_pareto(summary: pd.DataFrame, title: str, path: Path) -> None:
    """Draw the mean macro-F1 against parameters, memory and step time.

    A marker's area grows with the number of trainable parameters. A grey line joins the methods that no other beats: none
    costs less and scores more.

    Args:
        summary: of `summarise`, rows of one model, data set and fraction.
        title: one line above all.
        path: the picture to write.
    """
    rows = summary.dropna(subset=["mean"]).sort_values("mean", ascending=False)
    shown = [cost for cost in COSTS if rows[cost].notna().all()]
    figure = Figure(figsize=(4.1 * len(shown) + 2.2, 4.2), dpi=150, layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(shown), sharey=True))
    looks = looks_of(list(summary["label"]))
    for axes, cost in zip(panels, shown, strict=True):
        _draw_costs(axes, rows, cost, looks)
    panels[0].set_ylabel("test macro-F1")
    entries = [
        _entry(label, f"{label}  {mean:.3f}", looks)
        for label, mean in zip(rows["label"], rows["mean"], strict=True)
    ]
    figure.legend(
        handles=entries,
        loc="outside right center",
        frameon=False,
        title="macro-F1, best first\n(size: parameters)",
    )
    figure.suptitle(title)
    figure.savefig(path)


def draw_volume(
    summary: pd.DataFrame, leads: Mapping[str, Lead], baseline: str, title: str, path: Path
) -> None:
    """Draw the mean macro-F1 against the share of the training data, and mark where the methods' curves cross the baseline's.

    Args:
        summary: of `summarise`, rows of one model and data set.
        leads: of `leads`.
        baseline: the label of full fine-tuning.
        title: one line above all.
        path: the picture to write.
    """
    figure = Figure(figsize=(8.6, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    looks = looks_of(list(summary["label"]), baseline)
    entries = []
    for label, rows in summary.sort_values("fraction").groupby("label", sort=False):
        colour, marker = looks[label]
        heavy = 2.4 if label == baseline else 1.5
        axes.plot(rows["fraction"], rows["mean"], marker=marker, color=colour, linewidth=heavy, markersize=6)
        spread = rows["sd"].fillna(0)
        axes.fill_between(
            rows["fraction"],
            rows["mean"] - spread,
            rows["mean"] + spread,
            color=colour,
            alpha=0.12,
            linewidth=0,
        )
        lead = leads.get(label)
        crosses = lead.crossings if lead else ()
        entries.append(
            _entry(label, f"{label}  ({lead_text(lead)})" if lead and crosses else label, looks, line=True)
        )
        heights = np.interp(np.log(crosses), np.log(rows["fraction"]), rows["mean"])
        axes.plot(crosses, heights, "X", color=colour, markeredgecolor="white", markersize=13, zorder=5)
    _finish_volume(axes, summary)
    order = {label: i for i, label in enumerate(_by_last_score(summary))}
    entries.sort(key=lambda entry: order[str(entry.get_gid())])
    if any(lead.crossings for lead in leads.values()):
        entries.append(
            Line2D([], [], marker="X", linestyle="", color=GREY, markersize=9, label=f"crosses {baseline}")
        )
    figure.legend(handles=entries, loc="outside right center", frameon=False)
    figure.suptitle(title)
    figure.savefig(path)


def looks_of(labels: Sequence[str], baseline: str = "full") -> dict[str, tuple[str, str]]:
    """Give every label a colour and a marker, which follow from the labels' order; full fine-tuning is a black circle."""
    others = [label for label in dict.fromkeys(labels) if label != baseline]
    # Six and seven have no common divisor: neighbours differ in both, and 42 pass before a pair recurs.
    pairs = [
        (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i in range(len(COLOURS) * len(MARKERS))
    ]
    pairs.remove((COLOURS[-1], MARKERS[0]))
    return {baseline: (COLOURS[-1], MARKERS[0])} | {
        label: pairs[i % len(pairs)] for i, label in enumerate(others)
    }


def _draw_costs(axes: Axes, rows: pd.DataFrame, cost: str, looks: dict[str, tuple[str, str]]) -> None:
    front = rows.iloc[pareto_front(rows[cost], rows["mean"])]
    axes.step(front[cost], front["mean"], where="post", color=GREY, linewidth=1, zorder=1)
    for row in rows.itertuples():
        colour, marker = looks[str(row.label)]
        x = getattr(row, cost)
        axes.plot([x, x], [row.low, row.high], color=colour, alpha=0.35, linewidth=1.2, zorder=2)
        dot = axes.scatter(
            x,
            row.mean,
            _area(row.trainable),
            colour,
            marker=marker,
            edgecolors="white",
            linewidths=0.7,
            zorder=3,
        )
        # Whole also at 0, where a linear probe lies that keeps nothing.
        dot.set_clip_on(False)
    if cost == "trainable":
        axes.set_xscale("log")
    else:
        # From zero, so that a step that looks twice as long is.
        axes.set_xlim(left=0, right=1.08 * rows[cost].max())
    axes.set_xlabel(COSTS[cost])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _area(trainable: float) -> float:
    """Give a marker's area in square points, which grows by as much for every tenfold number of parameters."""
    return 40 + 40 * max(0.0, math.log10(trainable) - 3)


def _entry(label: str, text: str, looks: dict[str, tuple[str, str]], line: bool = False) -> Line2D:
    colour, marker = looks[label]
    return Line2D(
        [],
        [],
        marker=marker,
        color=colour,
        linestyle="-" if line else "",
        label=text,
        markersize=7,
        gid=label,
    )


def _finish_volume(axes: Axes, summary: pd.DataFrame) -> None:
    counts = dict(zip(summary["fraction"], summary["train_images"], strict=True))
    ticks = sorted(counts)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{100 * tick:.3g} %\n{counts[tick]}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="share and number of the training images", ylabel="test macro-F1")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _by_last_score(summary: pd.DataFrame) -> list[str]:
    last = summary.sort_values("fraction").groupby("label", sort=False).tail(1)
    return [str(label) for label in last.sort_values("mean", ascending=False)["label"]]
