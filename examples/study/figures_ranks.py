"""Mean ranks on a line, and what joins rows that do not differ (Demšar 2006, figure 1)."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .ranks import Ranks

STEP = 0.28  # inches from one name to the next


def draw_ranks(ranks: Ranks, title: str, path: Path) -> None:
    """Draw the mean rank of every row, the best on the left, and the critical difference.

    Args:
        ranks: of `rank_rows`.
        title: above the picture.
        path: the picture to write.
    """
    rows = len(ranks.means)
    half = (rows + 1) // 2
    joined = ranks.groups()
    # From the axis downwards, in steps: first the lines that join rows, then the names.
    names_from = 0.6 + 0.45 * len(joined)
    figure = Figure(figsize=(5.4, 1.3 + STEP * (names_from + half)), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.set(xlim=(1, rows), ylim=(-names_from - half, 1.2))
    axes.xaxis.tick_top()
    axes.spines["top"].set_position(("data", 0))
    axes.spines[["left", "right", "bottom"]].set_visible(False)
    axes.set(yticks=[], xticks=range(1, rows + 1))
    for place, (first, last) in enumerate(joined):
        axes.plot([first - 0.04, last + 0.04], [-0.45 * (place + 1)] * 2, color="black", linewidth=3)
    for place, (label, mean) in enumerate(ranks.means.items()):
        left = place < half
        down = place if left else rows - 1 - place
        _name(axes, str(label), float(mean), -names_from - down, (1.0, "right") if left else (rows, "left"))
    low = 1 + 0.02 * (rows - 1)
    axes.annotate(
        "", (low, 1.1), (low + ranks.critical, 1.1), arrowprops={"arrowstyle": "|-|,widthA=0.3,widthB=0.3"}
    )
    axes.text(
        low + ranks.critical, 1.1, f"  critical difference {ranks.critical:.2f}", va="center", fontsize=9
    )
    figure.savefig(path)


def _name(axes: Axes, label: str, mean: float, height: float, edge: tuple[float, str]) -> None:
    """Draw a line from a mean rank down and to an edge of the picture, where the name is."""
    end, side = edge
    axes.plot([mean, mean, end], [0, height, height], color="black", linewidth=0.8, clip_on=False)
    text = f"{label}  {mean:.2f} " if side == "right" else f" {mean:.2f}  {label}"
    axes.text(end, height, text, ha=side, va="center", fontsize=9)
