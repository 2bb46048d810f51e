"""Plain weights: the adapters merged, in a file that timm, torchvision or MONAI load without medpeft."""

import json
import os
from pathlib import Path

from safetensors.torch import save

from .model import Trained, plain_network


def write_merged(trained: Trained, path: Path) -> None:
    """Write the merged state dict; its header says how the network is built and used.

    Args:
        trained: is merged.
        path: a file that is not there.
    """
    definition = plain_network(trained)
    # Cloned: safetensors refuses tensors that share memory, as tied weights do.
    tensors = {name: value.contiguous().clone() for name, value in trained.model.state_dict().items()}
    header = {**trained.described(), "network": json.dumps(definition)}
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_bytes(save(tensors, header))
    os.replace(unfinished, path)
