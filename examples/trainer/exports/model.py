"""The model of a finished run, as its file holds it, and how to build it without medpeft."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import monai.networks.nets
import timm
import torch
import torchvision
from torch import Tensor, nn

import medpeft

from ..data.batches import Preprocessing
from ..errors import TrainerError
from ..networks.model import base_model
from ..networks.names import MONAI, TORCHVISION, NumbersOnCPU, monai_keywords, torchvision_keywords
from ..scripts import segmenter
from ..settings import Settings
from ..tasks import TASKS, Task
from ..work import trained_shape

TOLERANCE = 1e-3  # relative to the largest output
BUILDERS = {
    "timm.create_model": timm.create_model,
    "torchvision.models.get_model": torchvision.models.get_model,
    "scripts.segmenter.build": segmenter.build,
}


@dataclass
class Trained:
    """A trained model with what it takes to use it.

    Attributes:
        settings: of the run.
        task: of the run.
        model: with its adapters, in eval mode, on the CPU.
        preprocessing: from a file to the input.
        metadata: of the adapter's file.
        record: the metrics.
    """

    settings: Settings
    task: Task
    model: nn.Module
    preprocessing: Preprocessing
    metadata: dict[str, Any]
    record: dict[str, Any]

    @property
    def takes_volumes(self) -> bool:
        """Say whether the images are volumes."""
        return len(self.preprocessing.stored) == 3

    @property
    def network_shape(self) -> tuple[int, ...]:
        """Shape of what the network sees at once, without channels: an image, or a patch of it."""
        return trained_shape(self.settings, self.preprocessing)

    @property
    def example(self) -> Tensor:
        """Two inputs (2, 3, …), drawn from a seed of their own."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(2, 3, *self.network_shape, generator=generator)

    def described(self) -> dict[str, str]:
        """Say in words and JSON how the model is used, for the header of a file."""
        return {
            "model": self.settings.model,
            "method": self.settings.method,
            "task": self.settings.task,
            "classes": json.dumps(self.task.names, ensure_ascii=False),
            "fitted": json.dumps(self.record["fitted"], ensure_ascii=False),
            "details": json.dumps(self.metadata.get("details", {}), ensure_ascii=False),
            "preprocessing": json.dumps(self.preprocessing.to_metadata()),
            "input": "RGB from 0 to 1, less the mean, by the standard deviation, resized to the side",
        }


def trained_model(settings: Settings) -> Trained:
    """Build the model of a finished run anew, and put its adapter on it."""
    folder = Path(str(settings.output))
    file = folder / "adapter.safetensors"
    metadata = medpeft.inspect(file).metadata
    preprocessing = Preprocessing.from_metadata(metadata, file)
    task = TASKS[settings.task](metadata["classes"]).informed(metadata.get("details", {}))
    lightning.seed_everything(settings.seed, verbose=False)
    model, _ = base_model(settings, task.outputs, len(preprocessing.stored))
    model = medpeft.load(model, file).eval()
    record = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return Trained(settings, task, model, preprocessing, metadata, record)


def merge(trained: Trained) -> None:
    """Merge the model for good; outputs before and after are compared.

    Raises:
        medpeft.MedpeftError: the method has no equivalent weights.
    """
    with warnings.catch_warnings():
        # A bias that merging creates is no fault in an ONNX file, and `definition_of` looks for it.
        warnings.filterwarnings("ignore", "merge created")
        medpeft.merge(trained.model, example_input=trained.example)


def definition_of(trained: Trained) -> dict[str, Any]:
    """Find how a network that takes the weights of a merged model is built without medpeft.

    By timm, torchvision or MONAI, or, a model of timm with a decoder, by `scripts/segmenter.py`.

    Args:
        trained: its model has been merged.

    Returns:
        `_target_`, a function by its name, and its arguments, as MONAI's bundles write it.

    Raises:
        TrainerError: none of them builds one that computes the same.
    """
    own = {name: value.shape for name, value in trained.model.state_dict().items()}
    differing: set[str] = set()
    for definition in _candidates(trained):
        try:
            with torch.device("meta"), NumbersOnCPU():
                network = build(definition)
        # Not every network has the argument `img_size`, and each complains in its own way.
        except (TypeError, ValueError):
            continue
        there = {name: value.shape for name, value in network.state_dict().items()}
        if there == own and _computes_the_same(definition, trained):
            return definition
        differing = {name for name, _ in own.items() ^ there.items()}
    settings, names = trained.settings, ", ".join(sorted(differing)[:3])
    reason = "no call that is known builds a network that computes the same"
    if names:
        reason = (
            f"it differs in {names}, where {settings.method} gave a layer a weight or bias that it had not"
        )
    raise TrainerError(
        f"The merged {settings.model} cannot be built without medpeft: {reason}. Take --export onnx."
    )


@torch.no_grad()
def _computes_the_same(definition: dict[str, Any], trained: Trained) -> bool:
    """Say whether a network computes on the example what the merged model does, once it has its weights."""
    network = build(definition).eval()
    network.load_state_dict(trained.model.state_dict())
    expected = trained.model(trained.example)
    try:
        found = network(trained.example)
    # Of tensors of the same shapes, some networks take images of one size alone, and say so in their own way.
    except Exception:
        return False
    return relative_difference(found, expected) < TOLERANCE


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Compute the largest difference between outputs, relative to the largest of those expected."""
    largest = float(expected.abs().max().clamp_min(1e-6))
    return float((found - expected).abs().max()) / largest


def build(definition: dict[str, Any]) -> nn.Module:
    """Build what `definition_of` gave."""
    arguments = {name: value for name, value in definition.items() if name != "_target_"}
    target = definition["_target_"]
    make = BUILDERS.get(target) or getattr(monai.networks.nets, target.rpartition(".")[2])
    network: nn.Module = make(**arguments)
    return network


def _candidates(trained: Trained) -> Iterator[dict[str, Any]]:
    name, outputs = trained.settings.model, trained.task.outputs
    if name.startswith(MONAI):
        name = name.removeprefix(MONAI)
        side, dimensions = trained.network_shape[0], len(trained.network_shape)
        _, keywords = monai_keywords(name, outputs, side, dimensions, trained.settings.model_option)
        yield {"_target_": f"monai.networks.nets.{name}", **keywords}
        return
    if name.startswith(TORCHVISION):
        name = name.removeprefix(TORCHVISION)
        side, options = trained.network_shape[0], trained.settings.model_option
        keywords = torchvision_keywords(name, outputs, side, options)
        yield {"_target_": "torchvision.models.get_model", "name": name, **keywords}
        return
    plain = {"_target_": "timm.create_model", "model_name": name, "num_classes": outputs}
    if trained.settings.task == "segment":
        plain = {"_target_": "scripts.segmenter.build", "model_name": name, "outputs": outputs}
    plain |= trained.settings.model_option
    yield plain
    yield {**plain, "img_size": trained.network_shape[0]}
