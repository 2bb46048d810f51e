"""Plain weights: the adapters merged, in a file that timm, torchvision or MONAI load without medpeft."""

import json
from pathlib import Path

from safetensors.torch import save

from .model import Trained, definition_of, merge


def write_merged(trained: Trained, path: Path) -> None:
    """Write the merged state dict; its header says how the network is built and used.

    Args:
        trained: its model is merged by this, for good.
        path: a file that is not there.

    Raises:
        TrainerError: the network cannot be built without medpeft.
    """
    merge(trained)
    definition = definition_of(trained)
    # Cloned: safetensors refuses tensors that share memory, as tied weights do.
    tensors = {name: value.contiguous().clone() for name, value in trained.model.state_dict().items()}
    header = {**trained.described(), "network": json.dumps(definition)}
    path.write_bytes(save(tensors, header))
