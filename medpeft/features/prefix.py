"""A model in two parts: what it computes before its first trainable tensor, once, and the rest."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import running
from ..adapters.record import require_model
from ..checkpoint.file import short
from ..checkpoint.fingerprint import digest_of
from ..errors import CheckpointError, require
from .file import DTYPES, FeatureFile, FeatureKey, create, read_key
from .proof import prove
from .rest import Rest, Route, require_frozen, run_until
from .route import find_route


class Prefix:
    """The result of `prefix`: a model in two parts; the first gives the same in every epoch. Print it.

    Attributes:
        model: The model, untouched.
        rest: An `nn.Module` that takes features and goes on from them. Its parameters and modes are those of
            the model, so that what trains in the one has trained in the other.
        place: Where the features are taken: "the input of 'blocks.9'".
        shape: Shape of an image's features.
        dtype: Their dtype.

    Examples:
        >>> import torch, medpeft
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = medpeft.apply(model, "linear_probe", head="2")
        >>> print(medpeft.prefix(model, torch.randn(3, 4)))
        features of Sequential are the input of '2': 8 float32 an image, 32 bytes
    """

    def __init__(self, model: nn.Module, route: Route) -> None:
        self.model, self.route = model, route
        self.rest = Rest(model, route)
        self.place = str(route.place)
        shape = [size for axis, size in enumerate(route.features.shape) if axis != route.features.batch_axis]
        self.shape = tuple(size for size in shape if isinstance(size, int))
        self.dtype = route.features.dtype

    def features(self, example_input: Any) -> Tensor:
        """Compute what enters the rest for a batch of images, without gradients.

        Args:
            example_input: What the model takes: an input, a tuple of inputs, or a mapping of keyword inputs.

        Returns:
            (images, …), contiguous, on the model's device.

        Raises:
            MedpeftError: the model does not come by the place for this input.
        """
        with running.counted(self.model):  # A switch of the model's adapters waits for it.
            require_frozen(self.model, self.route)
            return run_until(self.model, self.route, example_input)

    def bytes_on_disk(self, images: int, *, views: int = 1, dtype: torch.dtype | None = None) -> int:
        """Forecast the size of a file of features, before anything is computed."""
        return self._key("", "", images, views, dtype).total_bytes

    def store(
        self,
        path: str | os.PathLike[str],
        images: Sequence[Any],
        *,
        data: str,
        preprocessing: str,
        views: int = 1,
        dtype: torch.dtype | None = None,
        batch_size: int = 32,
    ) -> FeatureFile:
        """Compute the features of all images into a file, or those that the file does not have yet.

        The file is made in its final size first. A run that was interrupted goes on when it is called again
        with the same arguments.

        Args:
            path: The file.
            images: A sequence or data set of single images, tensors, or tuples that begin with one. With
                several views it is asked for every image as often, and augments it anew each time.
            data: Names the images: a digest, or a path with a version.
            preprocessing: Describes what `images` does to them.
            views: How many views of each image to keep.
            dtype: `torch.float32`, `torch.float16` or `torch.bfloat16`; None is that of the features.
            batch_size: Images at once.

        Raises:
            CheckpointError: the file is there with features of another base, data or preprocessing; there is
                no room for it; or it cannot be written.
            MedpeftError: the features are too large for the dtype.
        """
        key = self._key(data, preprocessing, len(images), views, dtype)
        if not os.path.exists(path):
            create(path, key)
        file = FeatureFile(path, key)
        wanted = sorted([*file.missing, *file.altered])
        for start in range(0, len(wanted), batch_size):
            rows = wanted[start : start + batch_size]
            batch = torch.stack([_image(images[row // views]) for row in rows])  # (C, …) each → (rows, C, …)
            file.write(rows, self.features(batch.to(self._device)))
        return file

    def open(self, path: str | os.PathLike[str], *, data: str, preprocessing: str) -> FeatureFile:
        """Open a file that `store` has written, for the same base, place, data and preprocessing.

        Raises:
            CheckpointError: it was made for others; it is not complete; it was cut off or altered.
        """
        there = read_key(os.fspath(path))
        key = self._key(data, preprocessing, there.images, there.views, DTYPES[there.dtype])
        file = FeatureFile(path, key)
        rows = key.images * key.views
        if file.altered:
            raise CheckpointError(
                f"{path} was altered: {len(file.altered)} of {rows} rows have another digest, the first is "
                f"row {file.altered[0]}. Call store to compute these again."
            )
        if file.missing:
            raise CheckpointError(f"{path} lacks {len(file.missing)} of {rows} rows: call store to go on.")
        return file

    def _key(
        self, data: str, preprocessing: str, images: int, views: int, dtype: torch.dtype | None
    ) -> FeatureKey:
        require_frozen(self.model, self.route)
        kind = short(dtype or self.dtype)
        require(kind in DTYPES, f"Features are stored as {', '.join(DTYPES)}, not as {kind}: pass a dtype.")
        tensors: dict[str, Tensor] = dict(self.model.named_parameters())
        tensors.update(self.model.named_buffers())
        base = digest_of({name: tensors[name] for name in self.route.tensors})
        return FeatureKey(base, self.place, data, preprocessing, images, views, self.shape, kind)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def __str__(self) -> str:
        size = "×".join(map(str, self.shape)) or "1"
        kind = short(self.dtype)
        bytes_each = torch.Size(self.shape).numel() * self.dtype.itemsize
        return (
            f"features of {type(self.model).__name__} are {self.place}: {size} {kind} an image, "
            f"{bytes_each:,} bytes"
        )


def _image(item: Any) -> Tensor:
    """Take an image out of an item of a data set, which may have a label after it."""
    image: Tensor = item[0] if isinstance(item, (tuple, list)) else item
    return image


def prefix(model: nn.Module, example_input: Any, *, output: Callable[[Any], Any] | None = None) -> Prefix:
    """Split a model before its first trainable tensor: what comes before is the same in every epoch.

    The place is found, and proved on copies: on the example, in eval and in train mode, the model gives
    bit for bit what its rest makes of its features; these are the same in both modes (but for rounding where
    torch has another kernel for inference), whatever random numbers are drawn, and do not depend on the
    other images of the batch. The model is not touched.

    Args:
        model: A model after `apply` on its last layers, as it trains: its device, precision, autocast.
        example_input: A batch of images, a tuple of inputs, or a mapping of keyword inputs. Other batches may
            have any number of images, of the same size.
        output: Takes what the loss needs out of what the model returns, and the rest returns that. None for
            all of it. Serves models that return hidden states too: `output=lambda y: y[0]`.

    Raises:
        MedpeftError: something flows around every place, as the skip connections of a UNet; or what comes
            before is not the same every time, by dropout, stochastic depth or adapting BatchNorm. All are
            named.

    Examples:
        >>> import torch, medpeft
        >>> layers = [torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)]
        >>> model = medpeft.apply(torch.nn.Sequential(*layers), "lora", target="2", head="3", rank=2)
        >>> x = torch.randn(5, 4)
        >>> split = medpeft.prefix(model, x)
        >>> features = split.features(x)  # once, for all epochs
        >>> features.shape, split.place
        (torch.Size([5, 8]), "the input of '2'")
        >>> split.rest(features).sum().backward()
        >>> torch.equal(split.rest(features), model(x))
        True
    """
    require_model(model)
    is_meta = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    require(
        not is_meta,
        f"This {type(model).__name__} has no values (meta device), and the proof needs them: load weights.",
    )
    route = find_route(model, example_input, output)
    prove(model, route, example_input)
    return Prefix(model, route)
