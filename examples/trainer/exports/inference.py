"""inference.json of a bundle: the network, and how an image becomes its input and its output an answer."""

from .answers import Answer, Config
from .model import Trained


def inference(trained: Trained, definition: Config, answer: Answer) -> Config:
    """Give what MONAI's `ConfigParser` reads.

    Args:
        trained: its model has been merged.
        definition: of the network, as `definition_of` gives it.
        answer: of the task.
    """
    batch_size = 8
    if trained.takes_volumes:
        batch_size = 1
    return {
        # What the expressions after a `$` name.
        "imports": ["$import numpy", "$import os", "$import torch"],
        "bundle_root": ".",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "dataset_dir": "$os.path.join(@bundle_root, 'images')",
        "output_dir": "$os.path.join(@bundle_root, 'eval')",
        "data": {
            "_target_": "scripts.reading.images_in",
            "folder": "@dataset_dir",
            "volumes": trained.takes_volumes,
        },
        "network_def": definition,
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": reading(trained)},
        "dataset": {"_target_": "Dataset", "data": "@data", "transform": "@preprocessing"},
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@dataset",
            "batch_size": batch_size,
            "num_workers": 0,
        },
        "inferer": answer.inferer(),
        "postprocessing": {"_target_": "Compose", "transforms": answer.postprocessing()},
        **answer.entries(),
        "handlers": [loading(), *answer.handlers()],
        "evaluator": evaluating(),
        "run": ["$@evaluator.run()"],
    }


def evaluating() -> Config:
    """Give the loop of ignite, which runs all of it."""
    return {
        "_target_": "SupervisedEvaluator",
        "device": "@device",
        "val_data_loader": "@dataloader",
        "network": "@network",
        "inferer": "@inferer",
        "postprocessing": "@postprocessing",
        "val_handlers": "@handlers",
    }


def loading() -> Config:
    """Give the handler that takes the weights from their file."""
    return {
        "_target_": "CheckpointLoader",
        "load_path": "$os.path.join(@bundle_root, 'models', 'model.pt')",
        "load_dict": {"model": "@network"},
    }


def reading(trained: Trained) -> list[Config]:
    """Give the transforms from a file to the input, all of which can be inverted."""
    preprocessing = trained.preprocessing
    # As the trainer orders the axes; a picture's are exchanged by MONAI's readers, and here back again.
    reader = "scripts.reading.PictureReader"
    order: Config = {"_target_": "Transposed", "keys": "image", "indices": [0, 2, 1]}
    if trained.takes_volumes:
        reader = "scripts.reading.VolumeReader"
        order = {"_target_": "Orientationd", "keys": "image", "axcodes": "SPL", "labels": None}
    return [
        # None keeps the file's dtype: only what is deeper than 8 bit is stretched.
        {"_target_": "LoadImaged", "keys": "image", "reader": reader, "dtype": None},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
        order,
        {
            "_target_": "scripts.reading.ToInputd",
            "keys": "image",
            "stored": list(preprocessing.stored),
            "size": list(preprocessing.input_shape),
            "mean": preprocessing.mean,
            "std": preprocessing.std,
        },
    ]
