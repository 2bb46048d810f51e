"""Answers that are a line of predictions.csv an image: classes, findings, a grade, a quantity."""

from abc import abstractmethod
from typing import Any, ClassVar

from ..tasks.regress import half_width
from .answers import Answer, Config, described_tensor


class Row(Answer):
    """A line of a table."""

    @property
    def first_value_names(self) -> list[str]:
        """The names among which the first value is a position; by default it is none."""
        return []

    @property
    @abstractmethod
    def columns(self) -> list[str]:
        """What the values of an image are called."""

    @property
    def names(self) -> list[str]:
        """The names of the task: classes, findings, grades or the quantity."""
        return self.trained.task.names

    @property
    def fitted(self) -> dict[str, Any]:
        """What was fitted on the validation part."""
        fitted: dict[str, Any] = self.trained.record["fitted"]
        return fitted

    def probabilities(self) -> list[str]:
        """Name the columns of probabilities as the trainer does."""
        return [f"p({name})" for name in self.names]

    def output(self) -> Config:
        """Give one logit a name."""
        return described_tensor("tuples", "logits", [], self.names)

    def entries(self) -> Config:
        """Give the table."""
        table = {
            "_target_": "scripts.table.Table",
            "file": "$os.path.join(@output_dir, 'predictions.csv')",
            "folder": "@dataset_dir",
            "columns": self.columns,
            "first_value_names": self.first_value_names,
        }
        return {"table": table}

    def handlers(self) -> list[Config]:
        """Give what fills the table."""
        handler = {
            "_target_": "ClassificationSaver",
            "saver": "@table",
            "batch_transform": "$lambda batch: [one['image'].meta for one in batch]",
            "output_transform": "$lambda batch: [one['pred'] for one in batch]",
        }
        return [handler]


class Probabilities(Row):
    """A probability for each class or finding, at the fitted temperature.

    Attributes:
        one: what each is called.
        activation: what makes probabilities of logits.
    """

    one: ClassVar[str]
    activation: ClassVar[str]

    @property
    def columns(self) -> list[str]:
        """A probability for each."""
        return self.probabilities()

    def postprocessing(self) -> list[Config]:
        """Give the activation at the temperature."""
        return [
            changed(f"$lambda logits: logits / {self.fitted['temperature']!r}"),
            {"_target_": "Activationsd", "keys": "pred", self.activation: True},
        ]

    def what_is_written(self) -> str:
        """Say what the columns are."""
        return f"predictions.csv has the probability of each {self.one}, at the temperature that was fitted."

    def what_the_network_gives(self) -> str:
        """Say how the outputs become probabilities."""
        return (
            f"a logit for each {self.one}: divide by the temperature {self.fitted['temperature']:.6g}, then "
            f"take the {self.activation}"
        )


class Classes(Probabilities):
    """The probability of each class."""

    task_name = "Classification of images"
    one, activation = "class", "softmax"


class Findings(Probabilities):
    """The probability of each finding, each for itself."""

    task_name = "Findings in images"
    one, activation = "finding", "sigmoid"

    def what_is_written(self) -> str:
        """Say what the columns are, and from where on a finding is there."""
        thresholds = []
        for name, threshold in zip(self.names, self.fitted["thresholds"], strict=True):
            thresholds.append(f"{name} from {threshold:.4g}")
        return f"{super().what_is_written()} By the trainer's thresholds there is {', '.join(thresholds)} on."


class Grades(Row):
    """The grade, and the probability of each."""

    task_name = "Grading of images"

    @property
    def first_value_names(self) -> list[str]:
        """The grades."""
        return self.names

    @property
    def columns(self) -> list[str]:
        """The grade, and a probability a grade."""
        return ["prediction", *self.probabilities()]

    def output(self) -> Config:
        """Give one logit, of a conditional probability, for each grade but the highest."""
        above = [f"above {grade}, of those that are not below it" for grade in self.names[:-1]]
        return described_tensor("tuples", "logits", [], above)

    def postprocessing(self) -> list[Config]:
        """Give grade and probabilities."""
        function = {
            "_target_": "scripts.grades.grade_and_probabilities",
            "_mode_": "callable",
            "temperature": self.fitted["temperature"],
        }
        return [changed(function)]

    def what_is_written(self) -> str:
        """Say what the columns are."""
        return (
            "predictions.csv has the grade, and the probability of each grade at the temperature that was "
            "fitted."
        )

    def what_the_network_gives(self) -> str:
        """Say how the outputs become probabilities."""
        return (
            "a logit for each grade but the highest: its sigmoid is the probability, of images that are not "
            "below the grade, to be above it. The grade is how many of the running products of these are "
            "above 0.5; for the probability of each grade, divide the logits by the temperature "
            f"{self.fitted['temperature']:.6g} first"
        )


class Quantity(Row):
    """The quantity in its unit, and the interval that was fitted around it."""

    task_name = "Measurement in images"

    @property
    def columns(self) -> list[str]:
        """The quantity, and where there is an interval, its ends."""
        if half_width(self.fitted) is None:
            return ["prediction"]
        return ["prediction", "low", "high"]

    def output(self) -> Config:
        """Give the quantity, which the network gives in standard deviations from the mean."""
        return described_tensor("tuples", "standard deviations from the mean", [], self.names)

    def postprocessing(self) -> list[Config]:
        """Bring the output to its unit, and put the interval around it."""
        center, scale = self.fitted["center"], self.fitted["scale"]
        steps = [changed(f"$lambda output: output * {scale!r} + {center!r}")]
        half = half_width(self.fitted)
        if half is not None:
            steps.append(changed(f"$lambda value: torch.cat([value, value - {half!r}, value + {half!r}])"))
        return steps

    def what_is_written(self) -> str:
        """Say what the columns are."""
        text = f"predictions.csv has {self.names[0]}, in the unit of the labels"
        if half_width(self.fitted) is None:
            return f"{text}."
        coverage = self.fitted["interval"]["coverage"]
        return (
            f"{text}, and the interval from low to high that is to hold the truth in {coverage:g} of images."
        )

    def what_the_network_gives(self) -> str:
        """Say how the output becomes a quantity."""
        center, scale = self.fitted["center"], self.fitted["scale"]
        return f"the quantity in standard deviations from the mean: times {scale:.6g}, plus {center:.6g}"


def changed(function: str | Config) -> Config:
    """Apply a function to the prediction of one image."""
    return {"_target_": "Lambdad", "keys": "pred", "func": function}
