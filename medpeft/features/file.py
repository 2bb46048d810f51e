"""Features on disk: one memory-mapped file that says what its features were computed from.

- The size is known before anything is written, and compared with the free space.
- Every image's features have a digest, written after them. A row without one is missing, and one with
  another digest is altered: `store` computes both again, so that an interrupted run goes on where it ended;
  `open` refuses the file.
- A file that was made from another base, place, data or preprocessing is refused, and so is one that was
  cut off or altered.

Layout: eight bytes with the length of the header, the header as JSON, zeros up to a multiple of 4,096 bytes,
the digests (images, views, 16 bytes), zeros again, the features (images, views, …).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.file import digest, memory, parse
from ..checkpoint.messages import clip
from ..checkpoint.validators import fields as json_fields
from ..checkpoint.validators import list_of, one_of, size, text
from ..errors import CheckpointError, require

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FORMAT = "medpeft features 1"
_PAGE = 4096
_DIGEST = 16
_MAX_HEADER = 2**20


@dataclass(frozen=True)
class FeatureKey:
    """What features depend on, and their form. Two files with the same key hold the same features.

    Attributes:
        base: Digest of the tensors of the model that the features depend on.
        place: Where they are taken.
        data: The caller's name of the data: a digest, or a path with a version.
        preprocessing: The caller's description of what is done to an image before the model.
        images: Number of images.
        views: Augmented views of each.
        shape: Shape of an image's features.
        dtype: Their dtype in the file.
    """

    base: str
    place: str
    data: str
    preprocessing: str
    images: int
    views: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes_each(self) -> int:
        """Bytes of the features of one view of an image."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole file."""
        return self.offset(self.images * self.views)

    @cached_property
    def first_digest(self) -> int:
        """Where the digests begin in the file."""
        return _pages(8 + len(self.header()))

    def offset(self, row: int) -> int:
        """Where the features of a row begin; rows count images, and views within each."""
        digests = _pages(self.images * self.views * _DIGEST)
        return self.first_digest + digests + row * self.bytes_each

    def header(self) -> bytes:
        """Return the header of the file."""
        document = {"format": _FORMAT, **asdict(self), "shape": list(self.shape)}
        checked = json.dumps(document, sort_keys=True)
        return json.dumps({**document, "digest": digest(checked.encode())}, sort_keys=True).encode()

    def differences(self, other: FeatureKey) -> list[str]:
        """Say in what another key differs."""
        lines = []
        for field in fields(self):
            mine, others = getattr(self, field.name), getattr(other, field.name)
            if mine != others:
                lines.append(f"{field.name}: {clip(others, 60)} in the file, {clip(mine, 60)} here")
        return lines


_IS_HEADER = json_fields(
    {
        "format": one_of(_FORMAT),
        "base": text,
        "place": text,
        "data": text,
        "preprocessing": text,
        "images": size,
        "views": size,
        "shape": list_of(size, lengths=range(13)),
        "dtype": one_of(*DTYPES),
        "digest": text,
    }
)


def _pages(count: int) -> int:
    """Round a number of bytes up to whole pages."""
    return -(-count // _PAGE) * _PAGE


class FeatureFile(Sequence[Tensor]):
    """Features of all images of a data set, in a file that is mapped into memory.

    `Prefix.store` writes one and `Prefix.open` opens it. `file[i]` are the features of the image i, as a new
    tensor (views, …), so that a file is a data set for a `DataLoader`.

    Attributes:
        path: The file.
        key: What the features depend on, and their form.
        missing: Rows that are not written yet, in order; a row is an image's number times `key.views`, plus
            the number of the view.
        altered: Rows whose values are not those that were written, in order.

    Examples:
        >>> import tempfile, torch, medpeft
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = medpeft.apply(model, "linear_probe", head="2")
        >>> images = torch.randn(10, 4)
        >>> split = medpeft.prefix(model, images)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = split.store(f"{folder}/train.features", images, data="train 1", preprocessing="none")
        ...     len(file), file[3].shape, torch.equal(file.read([3, 5]), split.features(images[[3, 5]]))
        (10, torch.Size([1, 8]), True)
    """

    def __init__(self, path: str | os.PathLike[str], key: FeatureKey) -> None:
        self.path, self.key = os.fspath(path), key
        self._header = bytes.fromhex(digest(key.header()))
        _require_key(self.path, key)
        shape = (key.images * key.views, key.bytes_each)
        self._rows = np.memmap(self.path, np.uint8, "r", key.offset(0), shape)
        digests = np.fromfile(self.path, np.uint8, shape[0] * _DIGEST, offset=key.first_digest)
        self.missing: list[int] = []
        self.altered: list[int] = []
        for row, expected in enumerate(digests.reshape(-1, _DIGEST)):  # (rows·16,) → (rows, 16)
            if not expected.any():
                self.missing.append(row)
            elif expected.tobytes() != self._digest(row, self._rows[row].data):
                self.altered.append(row)

    def _digest(self, row: int, values: memoryview | bytes) -> bytes:
        """Digest of a row, of its place in the file and of the header."""
        hashed = hashlib.blake2b(self._header + row.to_bytes(8, "little"), digest_size=_DIGEST)
        hashed.update(values)
        return hashed.digest()

    def write(self, rows: Sequence[int], features: Tensor) -> None:
        """Write the features of some rows, in the file's dtype.

        Raises:
            MedpeftError: they have another shape, or are too large for the file's dtype.
            CheckpointError: the disk refuses them.
        """
        require(
            tuple(features.shape) == (len(rows), *self.key.shape),
            f"{self.path} takes {len(rows)} rows of {self.key.shape}, not {tuple(features.shape)}.",
        )
        values = features.detach().to("cpu", DTYPES[self.key.dtype]).contiguous()
        require(
            bool(torch.isfinite(values).all()),
            f"Features of up to {float(features.abs().max()):.3g} are not finite in {self.key.dtype}: store "
            f"them as bfloat16 or float32.",
        )
        try:
            with open(self.path, "r+b") as file:
                for row, value in zip(rows, values, strict=True):
                    data = memory(value)
                    file.seek(self.key.offset(row))
                    file.write(data)
                    file.flush()  # A digest must not come before what it is of.
                    file.seek(self.key.first_digest + row * _DIGEST)
                    file.write(self._digest(row, data))
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written: {error}") from error
        written = set(rows)
        self.missing = [row for row in self.missing if row not in written]
        self.altered = [row for row in self.altered if row not in written]

    def read(self, images: Iterable[int], views: int | Iterable[int] = 0) -> Tensor:
        """Read the features of some images, of one view or of one of each: (images, …), a new tensor."""
        numbers = np.asarray(list(images))
        if not isinstance(views, int):
            views = np.asarray(list(views))
        return self._tensor(self._rows[numbers * self.key.views + views])

    def _tensor(self, rows: Any) -> Tensor:
        values = torch.from_numpy(np.array(rows)).view(DTYPES[self.key.dtype])
        return values.reshape(-1, *self.key.shape)  # (rows, elements) → (rows, …)

    def __len__(self) -> int:
        return self.key.images

    def __getitem__(self, image: Any) -> Any:
        if not -self.key.images <= image < self.key.images:
            raise IndexError(f"{self.path} has {self.key.images} images")
        first = image % self.key.images * self.key.views
        return self._tensor(self._rows[first : first + self.key.views])


def create(path: str | os.PathLike[str], key: FeatureKey) -> None:
    """Make a file with no features in it, of its final size.

    Raises:
        CheckpointError: there is no room for it, or it cannot be written.
    """
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    unfinished = os.path.join(folder, f".medpeft-{secrets.token_hex(8)}.tmp")
    try:
        free = shutil.disk_usage(folder).free
        if key.total_bytes > free:
            raise CheckpointError(
                f"{path} would take {key.total_bytes:,} bytes, {key.bytes_each:,} for each of {key.views} "
                f"views of {key.images:,} images, and {free:,} are free: take fewer views, or half the "
                f"precision."
            )
        try:
            header = key.header()
            with open(unfinished, "xb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                file.truncate(key.total_bytes)
            os.replace(unfinished, target)
        finally:
            with suppress(OSError):
                os.remove(unfinished)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def read_key(path: str) -> FeatureKey:
    """Read what the features of a file depend on.

    Raises:
        CheckpointError: it is no such file, or was cut off or altered.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _MAX_HEADER:
                raise CheckpointError(f"{path} is no file of features.")
            written = file.read(length)
            total = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    document = parse(written, f"the header of {path}")
    if not _IS_HEADER(document):
        raise CheckpointError(f"{path} is no file of features that this medpeft reads.")
    values = {field.name: document[field.name] for field in fields(FeatureKey)}
    key = FeatureKey(**{**values, "shape": tuple(values["shape"])})
    if key.header() != written:
        raise CheckpointError(f"{path} was altered: its header is not what it was.")
    if key.total_bytes != total:
        raise CheckpointError(
            f"{path} was cut off or added to: {key.total_bytes:,} bytes are declared, it has {total:,}."
        )
    return key


def _require_key(path: str, key: FeatureKey) -> None:
    """Require that the file at a path has a key.

    Raises:
        CheckpointError: it has another one; all differences are named.
    """
    differences = key.differences(read_key(path))
    if differences:
        listed = "\n  ".join(differences)
        raise CheckpointError(f"The features in {path} are others:\n  {listed}\nTake another path.")
