"""What a study shows at a glance: score against cost, and score against the number of images.

A picture shows one thing and is no wider than a phone can show, at a size at which its text can still be
read.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from .summary import crossings, is_full, pareto_front
from .tables import by_last_score, percent, task_of

# Okabe and Ito's colours, told apart with any colour vision, but for their yellow, which is too pale for
# lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#595959"
SIZE = (5.4, 4.2)  # inches; at 150 dots an inch, 10 points are 10 pixels on a telephone of 390

COSTS = {
    "trainable": "trainable parameters",
    "saved_mib": "kept for the backward pass of a step (MiB)",
    "step_ms": "time of a training step (ms)",
}

Looks = dict[str, tuple[str, str]]


def looks_of(labels: Sequence[str]) -> Looks:
    """Give every label a colour and a marker of its own; the rows of full fine-tuning are black."""
    looks: Looks = {}
    others = 0
    for label in dict.fromkeys(labels):
        if is_full(label):
            looks[label] = ("#000000", MARKERS[(len(looks) - others) % len(MARKERS)])
        else:
            # Six and seven have no common divisor: neighbours differ in both, and 42 pass before a pair
            # recurs.
            looks[label] = (COLOURS[others % len(COLOURS)], MARKERS[others % len(MARKERS)])
            others += 1
    return looks


def draw_pareto(rows: pd.DataFrame, cost: str, title: str, path: Path) -> None:
    """Draw the mean score of every method against one cost, with its interval and its name.

    A grey line joins the methods that no other beats: none costs less and scores more.

    Args:
        rows: of `summarise`, of one model, data set and share of the images.
        cost: a key of `COSTS`.
        title: above the picture.
        path: the picture to write.
    """
    rows = rows.dropna(subset=["mean", cost])
    figure, axes = _picture(title)
    looks = looks_of(list(rows["label"]))
    left = _left_edge(rows[cost], cost)
    shown = rows.assign(x=rows[cost].clip(lower=left))
    front = shown.iloc[pareto_front(rows[cost], rows["mean"])]
    axes.step(front["x"], front["mean"], where="post", color="#AAAAAA", linewidth=1.2, zorder=1)
    for row in shown.to_dict("records"):
        colour, marker = looks[row["label"]]
        axes.plot(
            [row["x"]] * 2, [row["low"], row["high"]], color=colour, alpha=0.25, linewidth=1.2, zorder=2
        )
        axes.plot(
            row["x"], row["mean"], marker, color=colour, markeredgecolor="white", markersize=9, zorder=3
        )
    cheap = rows[cost] < left
    names = rows["label"].mask(cheap, "← " + rows["label"] + rows[cost].map(", {:,.3g} MiB".format))
    if cost == "trainable":
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.1)
    axes.set(xlabel=COSTS[cost], ylabel=f"test {_words(rows)}")
    _name_points(figure, axes, shown.assign(name=names, colour=shown["label"].map(dark_colours(looks))))
    figure.savefig(path)


def draw_volume(rows: pd.DataFrame, title: str, path: Path) -> None:
    """Draw the mean score against the number of training images, each method with its interval.

    A cross marks the first share from which on a method is ahead of the baseline, or behind it, after it was
    not: only where the difference can be told from none on both sides.

    Args:
        rows: of `summarise`, of one model and data set.
        title: above the picture.
        path: the picture to write.
    """
    figure, axes = _picture(title)
    looks = looks_of(list(rows["label"]))
    lines = {}
    for place, (label, part) in enumerate(rows.sort_values("fraction").groupby("label", sort=False)):
        colour, marker = looks[str(label)]
        # Beside each other, so that no interval covers another.
        x = part["fraction"] * 1.04 ** (place - len(looks) / 2)
        (line,) = axes.plot(x, part["mean"], marker=marker, color=colour, markersize=7, linewidth=1.5)
        lines[str(label)] = line
        axes.vlines(x, part["low"], part["high"], color=colour, alpha=0.4, linewidth=1.5)
        for _, first, ahead in crossings(part):
            at = (part["fraction"] == first).to_numpy().argmax()
            axes.plot(x.iloc[at], part["mean"].iloc[at], "o", color=colour, markersize=17, fillstyle="none")
            words = f"{label} ahead" if ahead else f"{label} behind"
            axes.annotate(
                words, (x.iloc[at], part["mean"].iloc[at]), (-12, 12), textcoords="offset points", ha="right"
            )
    counts = dict(zip(rows["fraction"], rows["train_images"], strict=True))
    axes.set_xscale("log")
    axes.set_xticks(sorted(counts), [f"{percent(share)}\n{counts[share]:,}" for share in sorted(counts)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.08)
    axes.set(
        xlabel="share and number of the training images; bars: 95 % intervals", ylabel=f"test {_words(rows)}"
    )
    order = by_last_score(rows)
    axes.legend(list(map(lines.__getitem__, order)), order, loc="lower right", fontsize=9, framealpha=0.7)
    figure.savefig(path)


def _words(rows: pd.DataFrame) -> str:
    task = task_of(rows)
    return task.words[task.score]


def dark_colours(looks: Looks) -> dict[str, str]:
    """Give for every label a darker tone of its colour, in which its name can be read."""
    darker = {}
    for label, (colour, _) in looks.items():
        red, green, blue = to_rgb(colour)
        darker[label] = to_hex((0.6 * red, 0.6 * green, 0.6 * blue))
    return darker


def _name_points(figure: Figure, axes: Axes, points: pd.DataFrame) -> None:
    """Write each point's name beside it, where it covers no other name and no marker.

    Further away it has a line to its point. adjustText left four of a study's thirteen names on markers.
    """
    figure.draw_without_rendering()
    half = 5.5 * figure.dpi / 72
    taken = []
    for x, y in axes.transData.transform(points[["x", "mean"]].to_numpy(dtype=float)):
        taken.append(Bbox.from_extents(x - half, y - half, x + half, y + half))
    inside = axes.get_window_extent().expanded(1.02, 1)
    for point in points.sort_values("mean", ascending=False).to_dict("records"):
        at = point["x"], point["mean"]
        label = axes.annotate(
            point["name"],
            at,
            (0, 0),
            textcoords="offset points",
            fontsize=9,
            va="center",
            color=point["colour"],
        )
        label.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        for offset, side in OFFSETS:
            label.set(position=offset, horizontalalignment=side)
            box = label.get_window_extent()
            if (
                inside.contains(box.x0, box.y0)
                and inside.contains(box.x1, box.y1)
                and not box.count_overlaps(taken)
            ):
                break
        taken.append(label.get_window_extent())
        if np.hypot(*label.get_position()) > 16:
            arrow = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
            axes.annotate(
                "", at, label.get_position(), textcoords="offset points", arrowprops=arrow, zorder=3
            )


def _offsets() -> list[tuple[tuple[float, float], str]]:
    """List the places for a name in points from its own, nearest first, with the side it is written to."""
    places = []
    for distance in (8, 14, 22, 32, 44, 58, 74):
        for up in (0.0, 0.6, -0.6, 1.0, -1.0):
            along = max(distance * (1 - abs(up)), 3)
            places += [((along, up * distance), "left"), ((-along, up * distance), "right")]
    return places


OFFSETS = _offsets()


def _picture(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _left_edge(costs: pd.Series, cost: str) -> float:
    """Say where the axis begins: at the data, but for one or two methods that are far cheaper.

    A linear probe keeps nothing for the backward pass, and on an axis from there all the others are one dot.
    """
    ordered = np.sort(costs.to_numpy(dtype=float))
    whole = ordered[-1] - ordered[0]
    for skipped in (1, 2):
        if cost == "trainable" or len(ordered) < skipped + 3:
            break
        inner = ordered[-1] - ordered[skipped]
        if whole > 4 * inner:
            return float(ordered[skipped] - 0.15 * (inner or ordered[-1]))
    return float(ordered[0])
