"""The tables of a study: a row a method, the best first; as Markdown, LaTeX, HTML and CSV."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from jinja2 import Environment
from pandas.io.formats.style import Styler
from trainer.tasks import TASKS, Task

from .summary import AHEAD, BEHIND, FURTHER, LEVEL, across_data, other_scores

# A template is what the Markdown is: pandas needs one more package for it.
MARKDOWN = Environment(autoescape=False, trim_blocks=True).from_string(
    """\
| {{ head | join(" | ") }} |
| --- |{{ " --: |" * (head | length - 1) }}
{% for row in rows %}
| {{ row | join(" | ") }} |
{% endfor %}
"""
)
LATEX = {"±": r"$\pm$", "–": "--", "−": "$-$", "▲": r"$\uparrow$", "▼": r"$\downarrow$", "≈": r"$\approx$"}
SIGNS = {AHEAD: " ▲", LEVEL: " ≈", BEHIND: " ▼"}
COSTS = {
    "saved_mib": "Kept for backward (MiB)",
    "peak_mib": "Peak memory (MiB)",
    "step_ms": "Step (ms)",
    "seconds": "Run (s)",
}


class Table:
    """A table as text: the cells, and of the same shape which of them are the best of their column.

    Args:
        labels: of the rows, in order.
        name: of the rows.
    """

    def __init__(self, labels: list[str], name: str = "Method") -> None:
        self.text = pd.DataFrame(index=pd.Index(labels, name=name))
        self.best = pd.DataFrame(index=self.text.index)

    def add(self, title: str, text: pd.Series, best: pd.Series | None = None) -> None:
        """Add a column, in the order of the labels; a row that it lacks has a dash."""
        self.text[title] = text.astype(object).reindex(self.text.index).fillna("–")
        self.best[title] = False
        if best is not None:
            self.best.loc[best[best].index.intersection(self.best.index), title] = True

    def to_markdown(self) -> str:
        """Write it in Markdown."""
        bold = self.text.where(~self.best, "**" + self.text.astype(str) + "**").reset_index()
        rows = bold.replace(r"\|", r"\\|", regex=True).to_numpy().tolist()
        return MARKDOWN.render(head=[self.text.index.name, *self.text.columns], rows=rows) + "\n"

    def to_latex(self) -> str:
        """Write it in LaTeX, for the package booktabs."""
        styler = self._styler("latex", "textbf:--rwrap")
        latex: str = styler.to_latex(hrules=True, column_format="l" + "r" * self.text.shape[1])
        for sign, command in LATEX.items():
            latex = latex.replace(sign, command)
        return latex

    def to_html(self) -> str:
        """Write it in HTML."""
        html: str = self._styler("html", "font-weight: bold").to_html()
        return html

    def _styler(self, language: str, bold: str) -> Styler:
        styles = self.best.replace({True: bold, False: ""}).astype(str)
        named = self.text.rename_axis(columns=self.text.index.name, index=None)
        styler = named.style.apply(lambda _: styles, axis=None).format(escape=language)
        return styler.format_index(escape=language, axis=0).format_index(escape=language, axis=1)


def score_table(summary: pd.DataFrame) -> Table:
    """Lay out the scores of one model on all the training images.

    Args:
        summary: of `summarise`, rows of one model.

    Returns:
        For each data set the score and its difference from the baseline; then average and average rank where
        there are several data sets, and the trainable parameters. The best row is the first.
    """
    both = across_data(summary).sort_values("rank", kind="stable")
    table = Table(list(both.index))
    several, score = summary["data"].nunique() > 1, score_words(summary)
    for name, group in summary.groupby("data", sort=False):
        rows = group.set_index("label")
        table.add(f"{score} on {name}", rows.apply(score_text, axis=1), rows["mean"] == rows["mean"].max())
        title = f"Against {rows['baseline'].iloc[0]}"
        table.add(f"{title} on {name}" if several else title, rows.apply(difference_text, axis=1))
    if several:
        average, rank = both["average"], both["rank"]
        table.add("Average", average.dropna().map("{:.3f}".format), average == average.max())
        table.add("Average rank", rank.map("{:.1f}".format), rank == rank.min())
    # The head has as many rows as there are classes, so data sets may differ.
    counts = summary.groupby("label")["trainable"]
    low, high = counts.min().map("{:,}".format), counts.max().map("{:,}".format)
    table.add("Trainable", low.where(low == high, low + "–" + high))
    return table


def volume_table(rows: pd.DataFrame) -> Table:
    """Lay out the scores of one model on one data set, a column for each share of the training images."""
    table = Table(by_last_score(rows))
    for fraction, group in rows.groupby("fraction"):
        part = group.set_index("label")
        text = part.apply(score_text, axis=1) + part["verdict"].map(SIGNS).fillna("")
        title = f"{percent(fraction)} ({part['train_images'].iloc[0]:,} images)"
        table.add(title, text, part["mean"] == part["mean"].max())
    return table


def rate_table(rows: pd.DataFrame) -> Table:
    """Lay out the learning rates of one model on one data set, a column for each share."""
    table = Table(by_last_score(rows))
    for fraction, group in rows.groupby("fraction"):
        table.add(percent(fraction), group.set_index("label")["lr"].map("{:.3g}".format))
    return table


def detail_table(rows: pd.DataFrame) -> Table:
    """Lay out the other scores of one model on one data set: `mean ± sd` over the runs."""
    found = rows.set_index("label")
    table = Table(list(found.index))
    task = task_of(rows)
    for name, title in other_scores(task).items():
        text = found.apply(lambda row, name=name: spread_text(row[name], row[f"{name}_sd"]), axis=1)
        best = found[name].min() if name in task.lower else found[name].max()
        table.add(capitalised(title), text, found[name] == best)
    for name, title in FURTHER.items():
        if found[name].notna().any():
            text = found.apply(lambda row, name=name: spread_text(row[name], row[f"{name}_sd"]), axis=1)
            best = found[name].max() if name == "worst_recall" else found[name].min()
            table.add(capitalised(title), text, found[name] == best)
    return table


def cost_table(rows: pd.DataFrame) -> Table:
    """Lay out what the runs of one model on one data set cost, and the learning rate that each took."""
    found = rows.set_index("label")
    table = Table(list(found.index))
    if (found["depth"] < 1).any():
        table.add("Depth", found["depth"].map("{:g}".format))
    if found["options"].any():
        table.add("Options", found["options"].replace("", "–"))
    table.add("Learning rate", found["lr"].map("{:.3g}".format))
    table.add("Trainable", found["trainable"].map("{:,}".format))
    for name, title in COSTS.items():
        table.add(title, found[name].dropna().map("{:,.0f}".format))
    return table


def image_table(images: Mapping[str, Mapping[str, int]]) -> Table:
    """Lay out how many images of each class are in each part."""
    counts = pd.DataFrame(images).fillna(0).astype(int)
    counts.loc["all"] = counts.sum()
    table = Table(list(counts.index), "Class")
    for part in counts:
        table.add(str(part), counts[part].map("{:,}".format))
    return table


def write_tables(tables: Mapping[str, Table], summary: pd.DataFrame, folder: Path, stem: str) -> str:
    """Write STEM.md and STEM.tex, with every table below its title, and STEM.csv; give the Markdown.

    The CSV holds every number of the summary unrounded, one row a method, model, data set and share of the
    training images.
    """
    markdown, latex = [], []
    for title, table in tables.items():
        markdown.append(f"### {title}\n\n{table.to_markdown()}")
        latex.append(f"% {title}\n{table.to_latex()}")
    (folder / f"{stem}.md").write_text("\n".join(markdown), encoding="utf-8")
    (folder / f"{stem}.tex").write_text("\n".join(latex), encoding="utf-8")
    summary.to_csv(folder / f"{stem}.csv", index=False)
    return "\n".join(markdown)


def task_of(rows: pd.DataFrame) -> type[Task]:
    """Give the task of rows of `summarise`."""
    return TASKS[str(rows["task"].iloc[0])]


def score_words(rows: pd.DataFrame) -> str:
    """Say what the score of rows of `summarise` is called."""
    task = task_of(rows)
    return capitalised(task.words[task.score])


def capitalised(words: str) -> str:
    """Begin with a capital letter."""
    return words[0].upper() + words[1:]


def score_text(row: pd.Series) -> str:
    """Write one score: the mean, the standard deviation over runs where there are several, the interval."""
    return f"{spread_text(row['mean'], row['sd'])} [{row['low']:.3f}, {row['high']:.3f}]"


def difference_text(row: pd.Series) -> str:
    """Write a difference from the baseline with its interval, and a sign where that bears a verdict."""
    if pd.isna(row["difference"]):
        return "–"
    text = f"{row['difference']:+.3f} [{row['difference_low']:+.3f}, {row['difference_high']:+.3f}]"
    return text.replace("-", "−") + SIGNS.get(row["verdict"], "")


def spread_text(mean: float, sd: float) -> str:
    """Write a mean with the standard deviation where there is one."""
    if pd.isna(mean):
        return "–"
    return f"{mean:.3f}" + ("" if pd.isna(sd) else f" ± {sd:.3f}")


def percent(share: float) -> str:
    """Write a share."""
    return f"{100 * share:.3g} %"


def by_last_score(rows: pd.DataFrame) -> list[str]:
    """Name the rows by their score on the largest share that they have, the best first."""
    last = rows.sort_values("fraction").groupby("label", sort=False).tail(1)
    return list(last.sort_values("mean", ascending=False)["label"])
