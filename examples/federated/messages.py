"""Flower's messages: how a state lies in them, and which site one is from."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message

Arrays = dict[str, npt.NDArray[Any]]


def record_of(arrays: Mapping[str, npt.NDArray[Any]]) -> ArrayRecord:
    """Pack arrays for Flower."""
    return ArrayRecord({name: Array(np.asarray(array, order="C")) for name, array in arrays.items()})


def arrays_of(record: object) -> Arrays:
    """Unpack Flower's arrays.

    Raises:
        TypeError, ValueError, EOFError: they are none, or cannot be read.
    """
    if not isinstance(record, ArrayRecord):
        raise TypeError("it has no arrays.")
    return {name: array.numpy() for name, array in record.items()}


def site_of(message: Message) -> str:
    """Give the name of the site that sent a message; of its node where the message does not tell."""
    about = None
    if message.has_content():
        about = message.content.get("about")
    if isinstance(about, ConfigRecord) and "site" in about:
        return str(about["site"])
    return f"node {message.metadata.src_node_id}"
