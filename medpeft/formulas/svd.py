"""Singular value decompositions kept on disk, each under a digest of its weight.

An adapted base is then decomposed once, not at every start. A file is found by what it was computed from, so
that one directory serves any number of models. The UNet of Stable Diffusion 1.x, 3.2 GiB of weights in
float32, takes 4.0 GiB.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ..checkpoint.file import memory, read_layout, read_tensors, short, write
from ..errors import CheckpointError

SVD = tuple[Tensor, Tensor, Tensor]

_DIRECTORY: ContextVar[Path | None] = ContextVar("medpeft_svdcache", default=None)
# How far a stored product may lie from the weight, relative to its norm: float32 leaves about 1e-6.
_TOLERANCE = 1e-4


@contextmanager
def caching(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Within a `with` block, `decompose` keeps what it computes in this directory and takes from it what is there.

    Args:
        directory: Made if it does not exist.

    Raises:
        CheckpointError: it cannot be made.
    """
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"The cache {path} cannot be made: {error}. Name another directory.") from error
    token = _DIRECTORY.set(path)
    try:
        yield path
    finally:
        _DIRECTORY.reset(token)


def current() -> Path | None:
    """The directory of the innermost `caching`, to be passed on to threads, which do not see it."""
    return _DIRECTORY.get()


def decompose(weight: Tensor, cache: Path | None = None) -> SVD:
    """U (out, k), S (k,) descending and Vh (k, in) with U·diag(S)·Vh = W, computed where the weight is, or read.

    Args:
        weight: W (out, in), of any floating-point type.
        cache: The directory; None is that of `caching`, and outside of it nothing is read or kept.

    Returns:
        U, S and Vh, in float32 or wider, on the weight's device.

    Raises:
        CheckpointError: a decomposition cannot be written.
    """
    directory = None if weight.is_meta else cache or current()
    found = None if directory is None else stored(weight, directory)
    if found is not None:
        return found
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    left, values, right = _svd(wide)
    if directory is not None:
        store(weight, (left, values, right), directory)
    return left, values, right


def _svd(matrix: Tensor) -> SVD:
    """U, S and Vh."""
    found = _by_eigenvectors(matrix)
    if found is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        found = left, values, right
    return found


def _by_eigenvectors(matrix: Tensor) -> SVD | None:
    """U, S and Vh of a long float32 matrix, by the eigenvectors of its small side's product with itself, in float64.

    A convolution of Stable Diffusion, 1280×11520, takes 2.3 s in place of 10, and its product is ten times
    closer to W. None where that gains nothing, or is not exact enough.
    """
    small, long = sorted(matrix.shape)
    if matrix.dtype != torch.float32 or matrix.is_meta or is_fake(matrix) or long < 3 * small:
        return None
    tall = matrix.shape[0] == long
    wide = (matrix.t() if tall else matrix).double()
    squares, vectors = torch.linalg.eigh(wide @ wide.t())
    values, first = squares.clamp(min=0).sqrt().flip(0), vectors.flip(1)
    # Squaring costs half the digits: too few are left of a singular value that small.
    if values[-1] <= 1e-5 * values[0]:
        return None
    second = (first.t() @ wide) / values[:, None]
    pair = (second.t(), first.t()) if tall else (first, second)
    return pair[0].float().contiguous(), values.float(), pair[1].float().contiguous()


def stored(weight: Tensor, directory: Path) -> SVD | None:
    """What the directory holds for a weight, on its device; None where it holds nothing, or, with a warning, nothing whole."""
    path = _path(weight, directory)
    if not path.exists():
        return None
    try:
        with path.open("rb") as file:
            found = read_tensors(file, read_layout(file, path.name), path.name)
        # A file that was cut short or altered would train shifts of other vectors than it says.
        if _fits(found, weight):
            return found["U"].to(weight.device), found["S"].to(weight.device), found["Vh"].to(weight.device)
        reason = "it is no decomposition of the weight it is named after"
    except (OSError, CheckpointError) as error:
        reason = str(error)
    warnings.warn(f"{path} is computed anew: {reason}", stacklevel=2)
    return None


def store(weight: Tensor, svd: SVD, directory: Path) -> None:
    """Keep a decomposition of a weight, whole or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in zip(("U", "S", "Vh"), svd, strict=True)
    }
    write(os.fspath(_path(weight, directory)), tensors, {"format": "pt"})


def _path(weight: Tensor, directory: Path) -> Path:
    digest = hashlib.sha256(f"{tuple(weight.shape)} {short(weight.dtype)} ".encode())
    digest.update(memory(weight.detach().cpu().contiguous()))
    return directory / f"{digest.hexdigest()}.safetensors"


def _fits(found: dict[str, Tensor], weight: Tensor) -> bool:
    """Whether the tensors are a decomposition of the weight: their shapes, and their product on a random vector."""
    outputs, inputs = weight.shape
    rank, wide = min(outputs, inputs), torch.promote_types(weight.dtype, torch.float32)
    shapes = {"U": (outputs, rank), "S": (rank,), "Vh": (rank, inputs)}
    if {name: tuple(t.shape) for name, t in found.items()} != shapes or any(
        t.dtype != wide for t in found.values()
    ):
        return False
    matrix = weight.detach().to("cpu", wide)
    x = torch.randn(inputs, generator=torch.Generator().manual_seed(0)).to(wide)
    error = (found["U"] * found["S"]) @ (found["Vh"] @ x) - matrix @ x
    return bool(error.norm() <= _TOLERANCE * matrix.norm() * x.norm() / inputs**0.5)
