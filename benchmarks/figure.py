"""Draw the results of peers.py: time of a step and memory kept for every task, as ratios to the floor.

python benchmarks/peers.py --json peers.json
python benchmarks/figure.py peers.json docs/images/peers.svg
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# Two of the Okabe-Ito colours, which differ for every kind of colour vision, and in grey.
MEDPEFT, OTHERS = "#D55E00", "#56B4E9"


def main() -> None:
    """Read the rows and write the picture."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("rows", type=Path, help="what peers.py wrote with --json")
    parser.add_argument("picture", type=Path, help="an .svg or .png")
    args = parser.parse_args()
    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "medpeft"
    measured = json.loads(args.rows.read_text())
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    draw(measured["tasks"], args.picture)


def draw(tasks: dict[str, list[dict[str, Any]]], picture: Path) -> None:
    """Draw one row of bars a task: time on the left, memory on the right."""
    heights = [len(rows) - 1 for rows in tasks.values()]
    figure, axes = plt.subplots(
        len(tasks),
        2,
        figsize=(9, 0.34 * sum(heights) + 0.62 * len(tasks)),
        sharex="col",
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    for (task, rows), (left, right) in zip(tasks.items(), axes, strict=True):
        bars(left, rows, "ratio", labels=True)
        bars(right, rows, "mib_ratio", labels=False)
        left.set_title(task, loc="left", fontsize=9, fontweight="bold")
    axes[-1][0].set_xlabel("time of a training step / floor")
    axes[-1][1].set_xlabel("bytes kept for backward / floor")
    # Without a date, the same rows give the same file.
    metadata = {"Date": None} if picture.suffix == ".svg" else None
    figure.savefig(picture, dpi=160, metadata=metadata)
    plt.close(figure)


def bars(axis: Axes, rows: list[dict[str, Any]], key: str, labels: bool) -> None:
    """Draw a bar for every library but the floor, which is the line at 1."""
    widths, colours, names = [], [], []
    for row in reversed(rows):
        if row["library"] != "floor":
            widths.append(row[key])
            colours.append(MEDPEFT if row["library"] == "medpeft" else OTHERS)
            names.append(row["library"] if labels else "")
    drawn = axis.barh(range(len(widths)), widths, color=colours, height=0.72)
    axis.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(range(len(widths)), names, fontsize=8)
    axis.set_xlim(0, max(3.0, axis.get_xlim()[1]))
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="x", labelsize=8)


if __name__ == "__main__":
    main()
