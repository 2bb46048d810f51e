"""A bundle of MONAI: a folder that MONAI loads, runs and exports further, without medpeft.

configs/metadata.json   what it is, in the form of MONAI's schema
configs/inference.json  the network, and how an image becomes its input and its output an answer
models/model.pt         the merged weights
scripts/                what reads images, builds a network with a decoder and writes answers, as Python
docs/README.md, LICENSE to be read, and filled in
"""

import json
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch

from .. import scripts
from ..networks.origin import licence_of, origin_of
from .answers import Answer, described_tensor
from .inference import inference
from .masks import Segmentations
from .model import Trained, definition_of, merge
from .predictions import Classes, Findings, Grades, Quantity

# The newest, of https://github.com/Project-MONAI/MONAI-extra-test-data/releases/tag/0.8.1
SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
)
SCRIPTS = Path(scripts.__path__[0])
ANSWERS: dict[str, type[Answer]] = {
    "classify": Classes,
    "multilabel": Findings,
    "ordinal": Grades,
    "regress": Quantity,
    "segment": Segmentations,
}
# Of what the trainer may be without, as pyproject.toml has it.
LEAST = {"nibabel": "5.3"}
TO_FILL_IN = "To be filled in by whoever gives this model to others."


def write_bundle(trained: Trained, path: Path) -> None:
    """Write the folder.

    Args:
        trained: its model is merged by this, for good.
        path: a folder that is not there.

    Raises:
        TrainerError: the network cannot be built without medpeft.
    """
    merge(trained)
    definition = definition_of(trained)
    answer = ANSWERS[trained.settings.task](trained)
    for name in ("configs", "models", "docs"):
        (path / name).mkdir(parents=True)
    _write_json(path / "configs" / "metadata.json", metadata(trained, answer))
    _write_json(path / "configs" / "inference.json", inference(trained, definition, answer))
    shutil.copytree(SCRIPTS, path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    torch.save(trained.model.state_dict(), path / "models" / "model.pt")
    (path / "docs" / "README.md").write_text(readme(trained, answer), encoding="utf-8")
    (path / "LICENSE").write_text(licence(trained), encoding="utf-8")


def metadata(trained: Trained, answer: Answer) -> dict[str, Any]:
    """Give what `monai.bundle verify_metadata` checks."""
    settings, names = trained.settings, ", ".join(trained.task.names)
    shown = {name: trained.record["test"][name] for name in trained.task.words}
    channels = ["red", "green", "blue"]
    if trained.takes_volumes:
        channels = ["grey", "grey", "grey"]
    image = described_tensor("image", "magnitude", trained.network_shape, channels, answer.patched())
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"{settings.method} on {settings.model}"},
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": needed(trained),
        "name": f"{settings.model}, {names}",
        "task": f"{answer.task_name}: {names}",
        "description": f"{settings.model}, fine-tuned by {settings.method} and merged.",
        "authors": TO_FILL_IN,
        "copyright": TO_FILL_IN,
        "data_source": TO_FILL_IN,
        "eval_metrics": shown,
        "fitted": trained.record["fitted"],
        "intended_use": f"Research. {TO_FILL_IN}",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": answer.output()}},
    }


def needed(trained: Trained) -> dict[str, str]:
    """Give the packages that the bundle needs beside MONAI; in the versions here, if they are installed."""
    packages = ["timm", "torchvision", "pillow", "tifffile"]
    if trained.takes_volumes:
        packages = ["timm", "torchvision", "pillow", "nibabel"]
    versions = {}
    for name in packages:
        # The volumes of the training may have been no files of NIfTI, and those of a bundle are.
        try:
            versions[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            versions[name] = LEAST[name]
    return versions


def readme(trained: Trained, answer: Answer) -> str:
    """Describe the bundle, and how it is used."""
    settings, names = trained.settings, ", ".join(trained.task.names)
    side, shape = trained.preprocessing.image_size, ",".join(map(str, (1, 3, *trained.network_shape)))
    read = f"""Pictures (.png, .jpg, .tif and others) are read upright, grey or RGB, resized to {side} pixels
and normalised. What is deeper than 8 bit is stretched from its least to its largest value. DICOM files are
shown as they say, which needs pydicom."""
    if trained.takes_volumes:
        read = f"""Volumes (.nii, .nii.gz, one a file) are read from the feet up, resized to {side} voxels
a side and normalised. What is deeper than 8 bit is stretched from its least to its largest value. Series of
DICOM must be converted before, to what the training saw of them."""
    return f"""# {settings.model} for {names}

{settings.model}, fine-tuned by `{settings.method}` with medpeft's trainer, its adapters merged into plain
weights. The scores and what they rest on are in `model-card.md` beside the run.

{read}

{answer.what_is_written()}
The network alone, which `ckpt_export` writes, gives {answer.what_the_network_gives()}.

    python -m monai.bundle run --config_file configs/inference.json \\
        --dataset_dir my/images --output_dir my/answers
    python -m monai.bundle ckpt_export network_def --config_file configs/inference.json --use_trace True \\
        --input_shape "[{shape}]"

The first needs pytorch-ignite, both need fire, and both are run in the bundle's folder: MONAI finds
`scripts` there, which is code, to be read before it is run.

Intended use, limits and authors: {TO_FILL_IN.lower()}
"""


def licence(trained: Trained) -> str:
    """Say under which licence the pretrained weights came, and that the rest is open."""
    return (
        f"The weights were fine-tuned from {origin_of(trained.settings, trained.model)}, licence: "
        f"{licence_of(trained.settings, trained.model)}.\n\n"
        "The licence of the fine-tuned weights, which may not be wider than that and than what the data "
        f"allow: {TO_FILL_IN.lower()}\n"
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
