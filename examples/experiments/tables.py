"""The tables of the paper: a row for each method, a column for each data set or amount of data, the best in bold."""

from collections.abc import Mapping
from html import escape
from pathlib import Path

import pandas as pd

from .statistics import Lead
from .summary import OTHER_SCORES, across_data

AVERAGE, RANK, PARAMETERS = "Average", "Average rank", "Trainable"

Table = tuple[pd.DataFrame, pd.DataFrame]
"""The cells as text, indexed by the methods' labels, and of the same shape which of them are the best of their column."""


def score_table(summary: pd.DataFrame) -> Table:
    """Lay out the scores of one model.

    Args:
        summary: of `summarise`, rows of one model and one fraction.

    Returns:
        For each data set `mean ± sd [low, high]` of the macro-F1; then the average and the average rank where there are
        several data sets, and the trainable parameters.
    """
    labels, names = list(dict.fromkeys(summary["label"])), list(dict.fromkeys(summary["data"]))
    text, best = pd.DataFrame(index=labels), pd.DataFrame(index=labels)
    for name in names:
        rows = summary[summary["data"] == name].set_index("label").reindex(labels)
        text[name] = [score_text(row) for _, row in rows.iterrows()]
        best[name] = rows["mean"] == rows["mean"].max()
    if len(names) > 1:
        both = across_data(summary).reindex(labels)
        text[AVERAGE] = [f"{value:.3f}" if value == value else "–" for value in both["average"]]
        text[RANK] = [f"{value:.1f}" for value in both["rank"]]
        best[AVERAGE] = both["average"] == both["average"].max()
        best[RANK] = both["rank"] == both["rank"].min()
    counts = summary.groupby("label", sort=False)["trainable"].agg(["min", "max"]).reindex(labels)
    # The head has as many rows as there are classes, so data sets may differ.
    text[PARAMETERS] = [
        f"{low:,}" if low == high else f"{low:,}–{high:,}" for low, high in counts.itertuples(index=False)
    ]
    best[PARAMETERS] = False
    return text, best


def volume_table(summary: pd.DataFrame, leads: Mapping[str, Lead], baseline: str) -> Table:
    """Lay out the scores of one model on one data set, a column for each share of the training data.

    Args:
        summary: of `summarise`.
        leads: of `leads`; the last column says where each method is ahead.
        baseline: the label of what they were compared with.
    """
    labels = list(dict.fromkeys(summary["label"]))
    text, best = pd.DataFrame(index=labels), pd.DataFrame(index=labels)
    for fraction, rows in summary.groupby("fraction"):
        column = f"{100 * float(fraction):.3g} % ({rows['train_images'].iloc[0]} images)"
        found = rows.set_index("label").reindex(labels)
        text[column] = [score_text(row) for _, row in found.iterrows()]
        best[column] = found["mean"] == found["mean"].max()
    if leads:
        column = f"Against {baseline}"
        text[column] = [lead_text(leads[label]) if label in leads else "–" for label in labels]
        best[column] = False
    return text, best


def rate_table(summary: pd.DataFrame) -> Table:
    """Lay out the learning rates of one model on one data set, a column for each share of the training data.

    Args:
        summary: of `summarise`.
    """
    labels = list(dict.fromkeys(summary["label"]))
    rates = summary.pivot_table(index="label", columns="fraction", values="lr").reindex(labels)
    text = rates.map(lambda rate: "–" if pd.isna(rate) else f"{rate:.3g}")
    text = text.rename(columns=lambda fraction: f"{100 * fraction:.3g} %").rename_axis(
        index=None, columns=None
    )
    return text, text.astype(bool) & False


def lead_text(lead: Lead) -> str:
    """Say in words where a method is ahead."""
    if not lead.crossings:
        return "ahead" if lead.ahead else "behind"
    words = ("until", "from") if lead.ahead else ("from", "until")
    return "ahead " + ", ".join(f"{words[i % 2]} {100 * at:.2g} %" for i, at in enumerate(lead.crossings))


def detail_table(summary: pd.DataFrame) -> Table:
    """Lay out the other scores of one model on one data set: `mean ± sd` over the runs.

    Args:
        summary: of `summarise`.
    """
    rows = summary.set_index("label")
    text, best = pd.DataFrame(index=rows.index.to_list()), pd.DataFrame(index=rows.index.to_list())
    for name, column in OTHER_SCORES.items():
        values = rows[name]
        text[column] = [_spread(value, sd) for value, sd in zip(values, rows[f"{name}_sd"], strict=True)]
        # An error is the better the lower it is.
        best[column] = (values == (values.min() if name == "ece" else values.max())).to_list()
    return text, best


def cost_table(summary: pd.DataFrame) -> Table:
    """Lay out what the runs of one model on one data set cost, and the learning rate that each took.

    Args:
        summary: of `summarise`.
    """
    rows = summary.set_index("label")
    text = pd.DataFrame(
        {
            "Learning rate": [f"{value:.3g}" for value in rows["lr"]],
            "Trainable": [f"{value:,}" for value in rows["trainable"]],
            "Kept for backward (MiB)": [_number(value) for value in rows["saved_mib"]],
            "Peak memory (MiB)": [_number(value) for value in rows["peak_mib"]],
            "Step (ms)": [_number(value) for value in rows["step_ms"]],
            "Run (s)": [_number(value) for value in rows["seconds"]],
        },
        index=rows.index.to_list(),
    )
    return text, text.astype(bool) & False


def score_text(row: pd.Series) -> str:
    """Write one score: the mean, the standard deviation over runs where there are several, the interval."""
    if pd.isna(row["mean"]):
        return "–"
    return f"{_spread(row['mean'], row['sd'])} [{row['low']:.3f}, {row['high']:.3f}]"


def to_markdown(text: pd.DataFrame, best: pd.DataFrame) -> str:
    """Write a table in Markdown, the best of each column in bold."""
    bold = text.where(~best, "**" + text.astype(str) + "**")
    lines = [["Method", *map(str, bold.columns)], ["---", *["--:"] * len(bold.columns)]]
    lines += [[str(label), *row] for label, row in zip(bold.index, bold.to_numpy().tolist(), strict=True)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def to_latex(text: pd.DataFrame, best: pd.DataFrame) -> str:
    """Write a table in LaTeX, for the package booktabs."""
    bold = best.replace({True: "textbf:--rwrap", False: ""}).astype(str)
    styled = text.style.apply(lambda _: bold, axis=None).format(escape="latex")
    escaped = styled.format_index(escape="latex", axis=0).format_index(escape="latex", axis=1)
    latex: str = escaped.to_latex(hrules=True, column_format="l" + "r" * len(text.columns))
    return latex.replace("±", r"$\pm$").replace("–", "--")


def to_html(text: pd.DataFrame, best: pd.DataFrame) -> str:
    """Write a table in HTML."""
    escaped = text.map(escape).rename(index=escape, columns=escape)
    bold = escaped.mask(best.to_numpy(dtype=bool), "<b>" + escaped + "</b>")
    html: str = bold.to_html(escape=False, border=0, justify="unset")
    return html


def write_tables(tables: Mapping[str, Table], summary: pd.DataFrame, folder: Path, stem: str) -> str:
    """Write STEM.md and STEM.tex, with every table below its title, and STEM.csv; give the Markdown.

    The CSV holds every number of the summary unrounded, one row a method, model, data set and share of the training data.
    """
    markdown = "\n".join(f"### {title}\n\n{to_markdown(*table)}" for title, table in tables.items())
    latex = "\n".join(f"% {title}\n{to_latex(*table)}" for title, table in tables.items())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.md").write_text(markdown, encoding="utf-8")
    (folder / f"{stem}.tex").write_text(latex, encoding="utf-8")
    summary.to_csv(folder / f"{stem}.csv", index=False)
    return markdown


def _spread(mean: float, sd: float) -> str:
    if pd.isna(mean):
        return "–"
    return f"{mean:.3f}" if pd.isna(sd) else f"{mean:.3f} ± {sd:.3f}"


def _number(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:,.0f}"
