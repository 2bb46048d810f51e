"""What of a bundle depends on the task: how the network is run, and what becomes of its output."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from .model import Trained

Config = dict[str, Any]


class Answer(ABC):
    """The answer of a network to what its task asks, in the words of MONAI's bundles.

    Attributes:
        task_name: what metadata.json calls the task.
        trained: the model, merged.
    """

    task_name: ClassVar[str]

    def __init__(self, trained: Trained) -> None:
        self.trained = trained

    @abstractmethod
    def output(self) -> Config:
        """Give the output of the network, as `described_tensor` does."""

    def patched(self) -> bool:
        """Say whether the network sees patches of the images."""
        return False

    def inferer(self) -> Config:
        """Give what runs the network."""
        return {"_target_": "SimpleInferer"}

    @abstractmethod
    def postprocessing(self) -> list[Config]:
        """Give the transforms from the network's output `pred` of one image to the answer."""

    def entries(self) -> Config:
        """Give further entries of inference.json."""
        return {}

    def handlers(self) -> list[Config]:
        """Give what of ignite's handlers writes the answers."""
        return []

    @abstractmethod
    def what_is_written(self) -> str:
        """Say for the README what the answers are."""

    @abstractmethod
    def what_the_network_gives(self) -> str:
        """Say for the README what the output of the network alone is, such as that `ckpt_export` writes."""


def described_tensor(
    kind: str, form: str, shape: Sequence[int], channels: Sequence[str], patch: bool = False
) -> Config:
    """Describe an input or output for metadata.json.

    Args:
        kind: of those in MONAI's specification, such as image or tuples.
        form: such as magnitude or labels.
        shape: of its space, empty where it has none.
        channels: what each is called.
        patch: whether it is a part of a larger one.
    """
    return {
        "type": kind,
        "format": form,
        "modality": "n/a",
        "num_channels": len(channels),
        "spatial_shape": list(shape),
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": patch,
        "channel_def": {str(place): name for place, name in enumerate(channels)},
    }
