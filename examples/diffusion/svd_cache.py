"""Keep singular value decompositions on disk, each under a digest of its weight.

SV-Diff then decomposes a base once, not at every start. A file is found by what it was computed from, so one
directory serves any number of models. The UNet of Stable Diffusion 1.x, 3.2 GiB of weights in float32, takes
4.0 GiB.
"""

import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import medpeft
from medpeft.checkpoint.file import memory, short
from medpeft.checkpoint.writing import write
from medpeft.formulas.svd import SVD, compute, supplying

# How far a stored product may lie from the weight, relative to its norm: float32 leaves about 1e-6.
_TOLERANCE = 1e-4


@contextmanager
def caching(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Within a `with` block, let medpeft keep its decompositions in this directory and read what is there.

    Raises:
        medpeft.CheckpointError: the directory cannot be made.
    """
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise medpeft.CheckpointError(
            f"The cache {path} cannot be made: {error}. Name another directory."
        ) from error
    with supplying(lambda weight: read_or_compute(weight, path)):
        yield path


def read_or_compute(weight: Tensor, directory: Path) -> SVD:
    """Read the decomposition of a weight, or compute and keep it.

    Raises:
        medpeft.CheckpointError: it cannot be written.
    """
    digest = hashlib.sha256(f"{tuple(weight.shape)} {short(weight.dtype)} ".encode())
    digest.update(memory(weight.detach().cpu().contiguous()))
    path = directory / f"{digest.hexdigest()}.safetensors"
    stored = _read(path, weight)
    if stored is not None:
        return stored
    computed = compute(weight)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in computed._asdict().items()}
    write(str(path), tensors, {"format": "pt"})
    return computed


def _read(path: Path, weight: Tensor) -> SVD | None:
    """Read a decomposition onto the weight's device; None, with a warning, where the file is damaged."""
    if not path.exists():
        return None
    try:
        tensors = load_file(path)
        # A file that was cut short or altered would train shifts of other vectors than it says.
        if _fits(tensors, weight):
            return SVD(*(tensors[name].to(weight.device) for name in SVD._fields))
        reason = "it is no decomposition of the weight it is named after"
    except (OSError, SafetensorError) as error:
        reason = str(error)
    warnings.warn(f"{path} is computed anew: {reason}", stacklevel=2)
    return None


def _fits(tensors: dict[str, Tensor], weight: Tensor) -> bool:
    """Whether tensors are a decomposition of the weight, by shape and by their product on a random vector."""
    outputs, inputs = weight.shape
    rank, wide = min(outputs, inputs), torch.promote_types(weight.dtype, torch.float32)
    shapes = {"U": (outputs, rank), "S": (rank,), "Vh": (rank, inputs)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != shapes or {tensor.dtype for tensor in tensors.values()} != {wide}:
        return False
    matrix = weight.detach().to("cpu", wide)
    x = torch.randn(inputs, generator=torch.Generator().manual_seed(0)).to(wide)
    error = (tensors["U"] * tensors["S"]) @ (tensors["Vh"] @ x) - matrix @ x
    return bool(error.norm() <= _TOLERANCE * matrix.norm() * x.norm() / inputs**0.5)
