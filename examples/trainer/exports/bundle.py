"""A bundle of MONAI: a folder that MONAI loads, runs and exports further, without medpeft.

configs/metadata.json   what it is, in the form of MONAI's schema
configs/inference.json  the network, and how an image becomes its input and its output a class
models/model.pt         the merged weights
docs/README.md, LICENSE to be read, and filled in
"""

import json
import shutil
from pathlib import Path
from typing import Any

import monai
import numpy as np
import timm
import torch

from ..errors import TrainerError
from ..origin import licence_of, origin_of
from .model import Trained, plain_network

# The newest, of https://github.com/Project-MONAI/MONAI-extra-test-data/releases/tag/0.8.1
SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
)
TO_FILL_IN = "To be filled in by whoever gives this model to others."


def write_bundle(trained: Trained, path: Path) -> None:
    """Write the folder.

    Args:
        trained: is merged.
        path: a folder that is not there.

    Raises:
        TrainerError: the data are volumes, or the network cannot be built without medpeft.
    """
    if len(trained.preprocessing.stored) != 2:
        raise TrainerError(
            "--export bundle writes how an image is read, and the data are volumes. Take onnx."
        )
    definition = plain_network(trained)
    unfinished = path.with_name("bundle.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for name in ("configs", "models", "docs"):
        (unfinished / name).mkdir(parents=True)
    _write_json(unfinished / "configs" / "metadata.json", metadata(trained))
    _write_json(unfinished / "configs" / "inference.json", inference(trained, definition))
    torch.save(trained.model.state_dict(), unfinished / "models" / "model.pt")
    (unfinished / "docs" / "README.md").write_text(readme(trained), encoding="utf-8")
    (unfinished / "LICENSE").write_text(licence(trained), encoding="utf-8")
    unfinished.rename(path)


def metadata(trained: Trained) -> dict[str, Any]:
    """Give what `monai.bundle verify_metadata` checks."""
    settings, classes = trained.settings, trained.task.names
    shown = {name: trained.record["test"][name] for name in trained.task.words}
    side = trained.preprocessing.image_size
    image = _tensor("image", "magnitude", [side, side], ["red", "green", "blue"])
    logits = _tensor("probabilities", "classes", [], classes)
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"{settings.method} on {settings.model}"},
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"timm": timm.__version__, "torchvision": "0.20"},
        "name": f"{settings.model}, {', '.join(classes)}",
        "task": f"Classification of images: {', '.join(classes)}",
        "description": f"{settings.model}, fine-tuned by {settings.method} and merged.",
        "authors": TO_FILL_IN,
        "copyright": TO_FILL_IN,
        "data_source": TO_FILL_IN,
        "eval_metrics": shown,
        "intended_use": f"Research. {TO_FILL_IN}",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": logits}},
    }


def _tensor(kind: str, form: str, shape: list[int], channels: list[str]) -> dict[str, Any]:
    return {
        "type": kind,
        "format": form,
        "modality": "n/a",
        "num_channels": len(channels),
        "spatial_shape": shape,
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": False,
        "channel_def": {str(place): name for place, name in enumerate(channels)},
    }


def inference(trained: Trained, definition: dict[str, Any]) -> dict[str, Any]:
    """Give the network, the preprocessing and the postprocessing, as MONAI's `ConfigParser` reads them."""
    return {
        "imports": ["$import glob", "$import os", "$import torch"],
        "bundle_root": ".",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "dataset_dir": "@bundle_root",
        "files": "$sorted(glob.glob(os.path.join(@dataset_dir, '**', '*.png'), recursive=True))",
        "data": "$[{'image': file} for file in @files]",
        "network_def": definition,
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": reading(trained)},
        "dataset": {"_target_": "Dataset", "data": "@data", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 8, "num_workers": 0},
        "inferer": {"_target_": "SimpleInferer"},
        "postprocessing": {"_target_": "Compose", "transforms": answering(trained)},
        "handlers": [loading(), saving()],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
        },
        "run": ["$@evaluator.run()"],
    }


def loading() -> dict[str, Any]:
    """Give the handler that takes the weights from their file."""
    return {
        "_target_": "CheckpointLoader",
        "load_path": "$os.path.join(@bundle_root, 'models', 'model.pt')",
        "load_dict": {"model": "@network"},
    }


def saving() -> dict[str, Any]:
    """Give the handler that writes predictions.csv."""
    return {
        "_target_": "ClassificationSaver",
        "output_dir": "@bundle_root",
        "batch_transform": "$lambda batch: [one['image'].meta for one in batch]",
        "output_transform": "$lambda batch: [one['pred'] for one in batch]",
    }


def reading(trained: Trained) -> list[dict[str, Any]]:
    """Give the transforms from a file to the input: they do what `images.py` and `Preprocessing` do."""
    preprocessing = trained.preprocessing
    height, width = preprocessing.stored
    # 3 is Pillow's BICUBIC. Grey images are resized as grey, which gives the same.
    converter = f"$lambda image: image.convert('RGB').resize(({width}, {height}), 3)"
    steps = [
        {"_target_": "torchvision.transforms.v2.Resize", "size": [preprocessing.image_size] * 2},
        {"_target_": "torchvision.transforms.v2.ToDtype", "dtype": "$torch.float32", "scale": True},
        {
            "_target_": "torchvision.transforms.v2.Normalize",
            "mean": preprocessing.mean,
            "std": preprocessing.std,
        },
    ]
    return [
        {
            "_target_": "LoadImaged",
            "keys": "image",
            "reader": "PILReader",
            "dtype": "$__import__('numpy').uint8",
            "converter": converter,
            "reverse_indexing": False,
        },
        {"_target_": "EnsureChannelFirstd", "keys": "image", "channel_dim": -1},
        {
            "_target_": "Lambdad",
            "keys": "image",
            "func": {"_target_": "torchvision.transforms.v2.Compose", "transforms": steps},
        },
    ]


def answering(trained: Trained) -> list[dict[str, Any]]:
    """Give the transforms from the network's output `pred` to probabilities at the fitted temperature."""
    temperature = trained.metadata["temperature"]
    return [
        {"_target_": "Lambdad", "keys": "pred", "func": f"$lambda logits: logits / {temperature!r}"},
        {"_target_": "Activationsd", "keys": "pred", "softmax": True},
    ]


def readme(trained: Trained) -> str:
    """Describe the bundle, and how it is used."""
    settings, classes = trained.settings, ", ".join(trained.task.names)
    side = trained.preprocessing.image_size
    return f"""# {settings.model} for {classes}

{settings.model}, fine-tuned by `{settings.method}` with medpeft's trainer, its adapters merged into plain
weights. The scores and what they rest on are in `model-card.md` beside the run.

Images (.png) are read by Pillow as 8-bit RGB, resized to {side} pixels and normalised. DICOM and images
deeper than 8 bit must be brought to 8 bit before. The output is one logit a class; `postprocessing`
divides by the temperature that was fitted on the validation part, and gives probabilities of {classes}.

    python -m monai.bundle run --config_file configs/inference.json --dataset_dir my/images
    python -m monai.bundle ckpt_export network_def --config_file configs/inference.json --use_trace True

The first needs pytorch-ignite, both need fire. Intended use, limits and authors: {TO_FILL_IN.lower()}
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
