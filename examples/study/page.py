"""What a study answers, in words, tables and pictures, on one page that needs nothing else."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader

from . import figures, tables
from .figures_ranks import draw_ranks
from .ranks import rank_rows
from .summary import AHEAD, BEHIND, LEVEL, MARGIN, UNCLEAR, Record, crossings, is_full, summarise

ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


@dataclass
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        pictures: as base64, each with what it shows.
        parts: of every table its kind, by which the page has a note, its heading, and its HTML.
        remarks: on the pictures.
    """

    title: str
    pictures: list[tuple[str, str]] = field(default_factory=list)
    parts: list[tuple[str, str, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def add_picture(self, path: Path, description: str) -> None:
        """Add a PNG, which the page will hold itself."""
        content = base64.b64encode(path.read_bytes()).decode("ascii")
        self.pictures.append((content, f"{description}, {self.title}"))

    def add_table(self, kind: str, heading: str, table: tables.Table) -> None:
        """Add a table."""
        self.parts.append((kind, heading, table.to_html()))


@dataclass
class Page:
    """What the page says.

    Attributes:
        title: a question.
        command: what was typed.
        about: the settings in common.
        missing: what is not in the tables, and why.
        answers: in a sentence for each model and data set.
        cautions: what stands in the way of believing them.
        sections: the rest.
    """

    title: str
    command: str
    about: str
    missing: Sequence[str] = ()
    answers: list[str] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write it as one file."""
        path.write_text(ENVIRONMENT.get_template("page.html").render(vars(self)), encoding="utf-8")


def write_comparison(
    done: Sequence[Record], page: Page, folder: Path, baseline: str | None = None, margin: float = MARGIN
) -> str:
    """Write the tables, the pictures and the page of a comparison; give the tables in Markdown.

    Args:
        done: the finished runs.
        page: answers, cautions and sections are added to it.
        folder: where they go.
        baseline: the row to compare with; None for full fine-tuning.
        margin: a difference within it is none that matters.
    """
    summary = summarise(done, baseline, margin)
    named: dict[str, tables.Table] = {}
    for model, rows in summary.groupby("model", sort=False):
        scores = Section(f"Scores on {model}")
        named[str(model)] = tables.score_table(rows)
        scores.add_table("scores", "", named[str(model)])
        _add_ranks(scores, done, str(model), folder)
        page.sections.append(scores)
        for data, group in rows.groupby("data", sort=False):
            title = f"{model} on {data}"
            page.answers.append(answer(group))
            section = Section(title)
            for cost, name in figures.COSTS.items():
                if group[cost].notna().any():
                    picture = folder / f"pareto-{file_name(title)}-{cost}.png"
                    figures.draw_pareto(group, cost, title, picture)
                    section.add_picture(picture, f"Score of every method against {name}")
            named[f"{title}: other scores"] = tables.detail_table(group)
            section.add_table("details", "Other scores", named[f"{title}: other scores"])
            section.add_table("costs", "Costs", tables.cost_table(group))
            section.add_table("images", "Images", count_images(done, str(data)))
            page.sections.append(section)
    return _finish(page, summary, named, folder, "scores")


def write_volume(
    done: Sequence[Record], page: Page, folder: Path, baseline: str | None = None, margin: float = MARGIN
) -> str:
    """Write the same of a study of the number of images; give the tables in Markdown."""
    summary = summarise(done, baseline, margin)
    named: dict[str, tables.Table] = {}
    for (model, data), rows in summary.groupby(["model", "data"], sort=False):
        title = f"{model} on {data}"
        page.answers += volume_answers(rows)
        section = Section(title)
        picture = folder / f"volume-{file_name(title)}.png"
        figures.draw_volume(rows, title, picture)
        section.add_picture(picture, "Score against the number of training images")
        named[title] = tables.volume_table(rows)
        named[f"{title}: learning rates"] = tables.rate_table(rows)
        section.add_table("volume", "", named[title])
        section.add_table("rates", "Learning rates", named[f"{title}: learning rates"])
        own = [record for record in done if record.data == data]
        _add_ranks(section, own, str(model), folder)
        section.add_table("images", "Images", count_images(done, str(data)))
        page.sections.append(section)
    return _finish(page, summary, named, folder, "volume")


def _add_ranks(section: Section, done: Sequence[Record], model: str, folder: Path) -> None:
    """Draw the mean ranks of a model's rows where there are enough blocks of runs to rank them in."""
    ranks = rank_rows([record for record in done if record.model == model])
    if ranks is not None:
        picture = folder / f"ranks-{file_name(section.title)}.png"
        draw_ranks(ranks, section.title, picture)
        section.add_picture(picture, "Mean ranks of the methods")
        section.remarks.append(ranks.words())


def _finish(
    page: Page, summary: pd.DataFrame, named: dict[str, tables.Table], folder: Path, stem: str
) -> str:
    page.cautions += cautions(summary)
    page.write(folder / "report.html")
    return tables.write_tables(named, summary, folder, stem)


def answer(rows: pd.DataFrame) -> str:
    """Say in a sentence which methods are ahead of the baseline, level with it, or behind.

    Args:
        rows: of `summarise`, of one model, data set and share of the images, the best first.
    """
    baseline = str(rows["baseline"].iloc[0])
    score = rows.set_index("label")["mean"].get(baseline, float("nan"))
    words = tables.task_of(rows).words[tables.task_of(rows).score]
    name = f"{baseline} ({words} {score:.3f})"
    if is_full(baseline):
        name = f"full fine-tuning ({baseline}, {words} {score:.3f})"
    parts: list[str] = []
    for verdict, says in verdict_words(rows["margin"].iloc[0]).items():
        labels = list(rows["label"][rows["verdict"] == verdict])
        if labels:
            verb = "is" if len(labels) == 1 else "are"
            reference = "it" if parts else name
            parts.append(f"{listed(labels)} {verb} {says.format(reference)}")
    found = "; ".join(parts) or f"there is nothing to compare {name} with"
    return f"On {rows['data'].iloc[0]} with {rows['model'].iloc[0]}, {found}."


def verdict_words(margin: float) -> dict[str, str]:
    """Say each verdict in words, with a place for the baseline."""
    return {
        AHEAD: "ahead of {}",
        LEVEL: f"level with {{}} (within {margin:g})",
        BEHIND: "behind {}",
        UNCLEAR: "not to be told from {}",
    }


def volume_answers(rows: pd.DataFrame) -> list[str]:
    """Say of each method with which shares of the images it is ahead of the baseline, behind, or neither."""
    baseline, data = rows["baseline"].iloc[0], rows["data"].iloc[0]
    sentences = []
    for label, part in rows[rows["label"] != baseline].groupby("label", sort=False):
        parts: list[str] = []
        for verdict, says in verdict_words(rows["margin"].iloc[0]).items():
            shares = part["fraction"][part["verdict"] == verdict].sort_values()
            if len(shares):
                reference = "it" if parts else baseline
                parts.append(f"{says.format(reference)} with {listed(list(map(tables.percent, shares)))}")
        crossed = ""
        for before, after, ahead in crossings(part):
            verb = "overtakes it" if ahead else "falls behind"
            crossed += f"; it {verb} between {tables.percent(before)} and {tables.percent(after)}"
        if parts:
            sentences.append(f"On {data}, {label} is {listed(parts)} of the images{crossed}.")
    return sentences


def cautions(summary: pd.DataFrame) -> list[str]:
    """Say what stands in the way of believing the numbers."""
    fewest = int(summary["runs"].min())
    if fewest >= 5:
        return []
    runs = "One run a row is" if fewest == 1 else f"{fewest} runs a row are"
    text = f"Caution: {runs} few. Deviations and intervals are rough then, mostly too narrow, and other "
    return [text + "seeds may turn the order around. Take five or more, as with --seed 0 1 2 3 4."]


def about(done: Sequence[Record], expected: int) -> str:
    """Say in one line how the numbers came about."""
    first = done[0].metrics
    seeds = sorted({str(record.split[0]) for record in done})
    versions = ", ".join(f"{name} {version}" for name, version in first.get("versions", {}).items())
    settings = first["settings"]
    folds = f", each with {settings['k_folds']} folds" if settings.get("k_folds") else ""
    return (
        f"{len(done)} of {expected} runs; seeds {', '.join(seeds)}{folds}; at most {settings['epochs']} "
        f"epochs, batches of {settings['batch_size']}, {settings['image_size']} pixels; {versions}."
    )


def listed(names: Sequence[str]) -> str:
    """Join names in words."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def count_images(done: Sequence[Record], data: str) -> tables.Table:
    """Count the images of the run of a data set that trains on the most."""
    own = [record.metrics["images"] for record in done if record.data == data]
    return tables.image_table(max(own, key=lambda images: sum(images["train"].values())))


def file_name(title: str) -> str:
    """Name files after a title such as `MODEL on DATA`: names of models may hold slashes."""
    return title.replace(" on ", "-").replace("/", "_").replace(":", "_")
