"""An ONNX file with any number of images in a batch, compared with the model by onnxruntime."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medpeft.adapters.registry import find

from ..errors import TrainerError
from .model import TOLERANCE, Trained, merge, relative_difference


def write_onnx(trained: Trained, path: Path) -> None:
    """Write the model, merged where its method can be; its metadata say how it is used.

    Args:
        trained: its model is merged by this, for good, where it can be.
        path: a file that is not there.

    Raises:
        TrainerError: torch cannot export the model, or the file computes something else.
    """
    import onnx

    if not any(find(name).unmergeable for name in trained.settings.option):
        merge(trained)
    try:
        _convert(trained, path)
    # The exporter raises errors of its own for what it does not know.
    except Exception as error:
        raise TrainerError(
            f"torch cannot export {trained.settings.model} to ONNX: {type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}"
        ) from error
    file = onnx.load(path)
    onnx.helper.set_model_props(file, trained.described())
    onnx.save(file, path)
    _compare(trained, path)


def _convert(trained: Trained, path: Path) -> None:
    batch = torch.export.Dim.DYNAMIC
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            trained.model,
            (trained.example,),
            path,
            input_names=["images"],
            output_names=["outputs"],
            dynamic_shapes=({0: batch},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


@torch.no_grad()
def _compare(trained: Trained, path: Path) -> None:
    """Raise a TrainerError unless the file computes for one image and for five what the model does."""
    for count in (1, 5):
        images = torch.randn(
            count, *trained.example.shape[1:], generator=torch.Generator().manual_seed(count)
        )
        difference = relative_difference(run_onnx(path, images), trained.model(images))
        if not difference < TOLERANCE:
            raise TrainerError(
                f"The ONNX file computes something else than the model: they differ by {difference:.1e} of "
                "the largest. It is not kept."
            )


def run_onnx(path: Path, images: Tensor) -> Tensor:
    """Compute a file's outputs for images (N, 3, …) by onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs: Any = session.run(None, {"images": images.numpy()})
    return torch.from_numpy(outputs[0])
