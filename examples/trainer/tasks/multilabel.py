"""Several findings, each of which an image has or has not, or of which nothing is known."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from ..errors import TrainerError
from ..files.images import Integers
from ..judging.scores import fit_temperature, score_class
from ..judging.thresholds import describe_rule, fit_threshold
from ..pictures.figures import draw_history
from ..pictures.figures_curves import Curve, draw_curves
from ..settings import Settings
from .class_names import check_spelling
from .outcome import Outcome, Targets
from .task import Task

PREFIX = "label:"  # of the columns of `Rows.table` that say of one finding whether it is there
YES, NO = {"1", "1.0", "true", "yes", "positive"}, {"0", "0.0", "false", "no", "negative"}
MISSING, UNCERTAIN = {"", "nan", "na", "n/a", "null"}, {"-1", "-1.0", "uncertain"}
NOTHING = {"no finding", "no findings", "none"}
# Scores that are means over those of each finding.
MEANS = ("auroc", "average_precision", "balanced_accuracy")
HEAVIEST = 100.0  # weight of a rare finding
WORDS = {
    "auroc": "AUROC, mean of findings",
    "average_precision": "average precision",
    "macro_f1": "macro-F1",
    "balanced_accuracy": "balanced accuracy",
}


class Multilabel(Task):
    """Which of several findings an image has.

    Targets are (N, K): 1 where a finding is there, 0 where it is not, NaN where that is not known. That adds
    nothing to the loss nor to the scores.
    """

    score = "auroc"
    words = WORDS
    loss_words = "binary cross entropy"

    @classmethod
    def check(cls, rows: pd.DataFrame, settings: Settings) -> None:
        """Check that every cell can be read, and that findings are spelled in one way."""
        check_spelling(cls.named(rows))
        if findings_of(rows, settings).empty:
            raise TrainerError("The data name no finding. Give --finding-column, or a --label-column.")

    @classmethod
    def labelled(cls, rows: pd.DataFrame) -> bool:
        """Say whether rows have columns of findings."""
        return "label" in rows or bool(_columns(rows))

    @classmethod
    def named(cls, rows: pd.DataFrame) -> list[str]:
        """Give the findings."""
        if _columns(rows):
            return [column.removeprefix(PREFIX) for column in _columns(rows)]
        found: set[str] = set()
        for cell in rows["label"]:
            found |= set(_split(cell))
        return sorted(found)

    @classmethod
    def read(cls, rows: pd.DataFrame, shape: Sequence[int], settings: Settings) -> Targets:
        """Read the findings; a split is balanced by the rarest one that each image has."""
        table = findings_of(rows, settings)
        values = torch.tensor(table.to_numpy(dtype=np.float32))
        names, notes = list(table.columns), []
        for place, name in enumerate(names):
            known = values[:, place][~values[:, place].isnan()]
            if known.unique().numel() < 2:
                kind = (
                    "no label in any image" if not len(known) else f"{int(known[0])} in every labelled image"
                )
                notes.append(f"Finding '{name}' has {kind}: it is neither learned nor scored.")
        return Targets(values, names, rarest_finding(values), [*names, "no finding"], False, notes)

    def read_as(self, rows: pd.DataFrame, shape: Sequence[int]) -> Tensor:
        """Read the findings of the model; those that the rows have not are not known."""
        table = findings_of(rows, Settings()).reindex(columns=self.names)
        return torch.tensor(table.to_numpy(dtype=np.float32))

    def weigh(self, targets: Tensor) -> Tensor:
        """Give (K,) weights of what is there, by which it counts as much as what is not."""
        there, absent = (targets == 1).sum(0), (targets == 0).sum(0)
        return (absent / there.clamp(min=1)).clamp(1 / HEAVIEST, HEAVIEST)

    def loss(self, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """Give the mean binary cross entropy of what is known, of logits (B, K) and targets (B, K)."""
        return masked_loss(outputs, targets, weights)

    def watch(self, outputs: Tensor, targets: Tensor) -> float:
        """Give the mean AUROC of the findings that have both kinds."""
        found = [score_class(binary_auroc, *known(outputs[:, i], targets[:, i])) for i in range(self.outputs)]
        if all(map(math.isnan, found)):
            return 0.5
        return float(np.nanmean(found))

    def fit(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        """Fit one temperature for all findings."""
        return {"temperature": fit_temperature(outputs, targets, masked_loss)}

    def fit_thresholds(self, outcome: Outcome, rule: str) -> dict[str, Any]:
        """Fit the threshold of each finding; 0.5 where the validation part has none or nothing else."""
        probabilities = probabilities_of(outcome)
        thresholds = []
        for place in range(self.outputs):
            own, positive = known(probabilities[:, place], outcome.targets[:, place])
            threshold = math.nan
            if len(own):
                threshold = fit_threshold(own.double().numpy(), positive.numpy(), rule)
            thresholds.append(0.5 if math.isnan(threshold) else threshold)
        return {"rule": rule, "thresholds": thresholds}

    def scores(self, outcome: Outcome) -> dict[str, Any]:
        """Score every finding by itself, and average over those that have both kinds.

        Returns:
            Beside the averages, `auroc_undefined_findings`, their number, and `findings`: of each by name its
            scores, `labelled` images and `positive` ones.
        """
        findings = {}
        probabilities = probabilities_of(outcome)
        for place, name in enumerate(self.names):
            own, truth = known(probabilities[:, place], outcome.targets[:, place])
            findings[name] = score_finding(own, truth, outcome.fitted["thresholds"][place])
        table = pd.DataFrame.from_dict(findings, orient="index")
        averages = {name: float(table[name].mean()) for name in MEANS}
        undefined = int(table["auroc"].isna().sum())
        defined = table["f1"][table["auroc"].notna()]
        return {
            **averages,
            "macro_f1": float(defined.mean()),
            "auroc_undefined_findings": undefined,
            "findings": findings,
        }

    def table(self, outcome: Outcome, scores: Mapping[str, Any]) -> str:
        """Lay out the scores, and those of every finding."""
        lines = self.score_lines(scores)
        undefined = scores["auroc_undefined_findings"]
        if undefined:
            lines.append(f"  (AUROC is undefined for {undefined} of {self.outputs} findings)")
        table = pd.DataFrame.from_dict(scores["findings"], orient="index").rename_axis("finding")
        lines += ["", f"Each finding at its threshold: {describe_rule(outcome.fitted['rule'])}"]
        return "\n".join([*lines, table.to_string(float_format="{:.3f}".format, na_rep="–")])

    def predictions(self, outputs: Tensor, fitted: Mapping[str, Any]) -> pd.DataFrame:
        """Give `prediction`, the findings at their thresholds, and each one's probability in `p(FINDING)`."""
        probabilities = torch.sigmoid(outputs / fitted["temperature"])
        there = probabilities >= torch.tensor(fitted["thresholds"])
        said = ["|".join(np.array(self.names)[row].tolist()) for row in there.numpy()]
        columns = {"prediction": said}
        for place, name in enumerate(self.names):
            columns[f"p({name})"] = probabilities[:, place].tolist()
        return pd.DataFrame(columns)

    def truths(self, targets: Tensor) -> pd.DataFrame:
        """Give `label(FINDING)`, empty where it is not known."""
        return pd.DataFrame({f"label({name})": targets[:, i].tolist() for i, name in enumerate(self.names)})

    def count(self, targets: Tensor) -> dict[str, int]:
        """Count the images that have each finding, and those that have none."""
        counts = dict(zip(self.names, (targets == 1).sum(0).tolist(), strict=True))
        return {**counts, "no finding": int((~(targets == 1).any(1)).sum())}

    def draw(self, outcome: Outcome, record: Mapping[str, Any], title: str, folder: Path) -> None:
        """Draw the training, and the curves of every finding with the point at its threshold."""
        draw_history(record, self, title, folder / "training.png")
        curves, probabilities = {}, probabilities_of(outcome)
        for place, name in enumerate(self.names):
            own, positive = known(probabilities[:, place], outcome.targets[:, place])
            curves[name] = Curve(own.numpy(), positive.numpy(), record["test"]["findings"][name])
        draw_curves(curves, title, folder / "curves.png")


def probabilities_of(outcome: Outcome) -> Tensor:
    """Give the probabilities (N, K) at the fitted temperature."""
    return torch.sigmoid(outcome.outputs / outcome.fitted["temperature"])


def findings_of(rows: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Read the findings of every row, (N, K), from columns of their own or from cells such as Effusion|Edema.

    Raises:
        TrainerError: a cell says neither that a finding is there nor that it is not.
    """
    columns = _columns(rows)
    if not columns:
        table = pd.DataFrame(index=rows.index)
        cells = [_split(cell) for cell in rows["label"]]
        unlabelled = np.array([str(cell).strip().lower() in MISSING for cell in rows["label"]])
        for name in Multilabel.named(rows):
            table[name] = [float(name in cell) for cell in cells]
            if settings.missing == "ignore":
                table.loc[unlabelled, name] = math.nan
        return table
    found = {}
    for column in columns:
        found[column.removeprefix(PREFIX)] = [_read(cell, column, settings) for cell in rows[column]]
    return pd.DataFrame(found, index=rows.index)


def _read(cell: Any, column: str, settings: Settings) -> float:
    text = str(cell).strip().lower()
    if text in YES:
        return 1.0
    if text in NO:
        return 0.0
    policy = {"ignore": math.nan, "negative": 0.0, "positive": 1.0}
    if text in MISSING:
        return policy[settings.missing]
    if text in UNCERTAIN:
        return policy[settings.uncertain]
    raise TrainerError(
        f"The finding '{column.removeprefix(PREFIX)}' has the value '{cell}'. Write 1 where it is there, 0 "
        "where it is not, -1 where that is uncertain, and leave the cell empty where it is not known."
    )


def _split(cell: Any) -> list[str]:
    """Take a cell such as Effusion|Edema apart; `No Finding` and an empty one name none."""
    names = [name.strip() for name in str(cell).split("|")]
    return [name for name in names if name.lower() not in MISSING | NOTHING]


def _columns(rows: pd.DataFrame) -> list[str]:
    return [str(column) for column in rows if str(column).startswith(PREFIX)]


def rarest_finding(values: Tensor) -> Integers:
    """Give for each image (N,) the place of the rarest finding that it has; K where it has none."""
    there = (values == 1).numpy()
    order = np.argsort(there.sum(0), kind="stable")
    # (N, K) in the order of their number: the first that is there is the rarest.
    first = there[:, order].argmax(1)
    rarest: Integers = np.where(there.any(1), order[first], there.shape[1]).astype(np.int64)
    return rarest


def known(values: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Keep what is known of one finding: (N,) and (N,) → (n,) and (n,), the targets as booleans."""
    rows = ~targets.isnan()
    return values[rows], targets[rows] == 1


def masked_loss(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Give the mean binary cross entropy over what is known; 0 where nothing is.

    Args:
        logits: (B, K).
        targets: (B, K), NaN where it is not known.
        weights: (K,) of what is there.
    """
    rows = ~targets.isnan()
    truth = torch.where(rows, targets, 0.0).to(logits.dtype)
    losses = binary_cross_entropy_with_logits(logits, truth, pos_weight=weights, reduction="none")
    return torch.where(rows, losses, 0.0).sum() / rows.sum().clamp(min=1)


def score_finding(probabilities: Tensor, positive: Tensor, threshold: float) -> dict[str, float]:
    """Score one finding, NaN where a score is not defined."""
    said = probabilities >= threshold
    hits = int((said & positive).sum())
    there, absent, named = int(positive.sum()), int((~positive).sum()), int(said.sum())
    sensitivity = hits / there if there else math.nan
    specificity = int((~said & ~positive).sum()) / absent if absent else math.nan
    return {
        "threshold": threshold,
        "labelled": len(positive),
        "positive": there,
        "auroc": score_class(binary_auroc, probabilities, positive),
        "average_precision": score_class(binary_average_precision, probabilities, positive),
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "ppv": hits / named if named else math.nan,
        "f1": 2 * hits / (there + named) if there + named else math.nan,
    }
