"""From the flags to a model, its batches, its optimizer and a plan."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricOptimizer
from torch import Tensor, nn
from torch.utils.data import Dataset

import medpeft

from .batches import Batches, Part, make_transform, plain_batches, training_batches
from .checkpoint import Training, save_training
from .errors import TrainerError
from .features import FeaturePart, cached_features, trained_head
from .flags import settings_of
from .images import Images, Integers
from .loop import Plan, Say, warmup_cosine
from .models import build_model, checkpoint_activations, input_statistics
from .order import Order, balanced
from .preprocessing import Preprocessing
from .sources import read_data
from .split import PARTS, fold, split
from .subset import training_subset

Parts = dict[str, Dataset[tuple[Tensor, Tensor]]]


@dataclass
class Run:
    """What one run works with.

    Attributes:
        model: the adapted model.
        network: what is called to train: the model, or its head on cached features.
        images: the data.
        found: the positions of the images in each part.
        parts: the parts as they are fed to the network.
        preprocessing: from a file to the input.
    """

    model: nn.Module
    network: nn.Module
    images: Images
    found: dict[str, Integers]
    parts: Parts
    preprocessing: Preprocessing


def images_of(args: argparse.Namespace) -> Images:
    """Read the data that the flags name; several runs may share them."""
    return read_data(
        args.data,
        args.image_size,
        args.patient_column,
        args.quiet,
        group_column=args.group_column,
        skip_broken=args.skip_broken,
    )


def parts_of(args: argparse.Namespace, images: Images) -> dict[str, Integers]:
    """Split the data as the flags say."""
    if args.k_folds:
        found = fold(images, args.seed, args.k_folds, args.fold, args.val_fraction)
    else:
        found = split(images, args.seed, args.val_fraction, args.test_fraction)
    found["train"] = training_subset(images, found["train"], args.train_fraction, args.seed)
    return found


def adapted_model(args: argparse.Namespace, classes: int) -> nn.Module:
    """Build the model and apply the method to it."""
    model = build_model(args.model, classes, args.image_size, not args.no_pretrained)
    if args.strategy != "fsdp2":
        # Convolutions on a CPU take a third less time with channels last; shards are rows, and lie as they are.
        model = model.to(memory_format=torch.channels_last)
    if args.checkpoint_activations:
        checkpoint_activations(model)
    return medpeft.apply(model, args.option, target=args.target, batchnorm=args.batchnorm, seed=args.seed)


def prepare(
    fabric: Fabric,
    args: argparse.Namespace,
    model: nn.Module,
    images: Images,
    found: dict[str, Integers],
    say: Say,
) -> Run:
    """Bring the parts into the form that the model takes: images, or features that a frozen model has of them."""
    mean, std = input_statistics(model)
    height, width = images.pixels.shape[-2:]
    preprocessing = Preprocessing((height, width), args.image_size, mean, std)
    if args.cache_features is None:
        parts: Parts = {
            part: Part(
                images,
                rows,
                make_transform(args.image_size, mean, std, args.augment if part == "train" else "none"),
            )
            for part, rows in found.items()
        }
        return Run(model, model, images, found, parts, preprocessing)
    if fabric.world_size > 1:
        raise TrainerError("--cache-features computes the features once, on one device. Take --devices 1.")
    everything = Part(images, np.arange(len(images)), preprocessing.transform())
    features, file, there = cached_features(fabric, args, model, everything, preprocessing)
    say(f"{'Took' if there else 'Computed'} the features of {len(features)} images: {file}")
    labels = torch.from_numpy(images.labels)
    parts = {part: FeaturePart(features[rows], labels[rows]) for part, rows in found.items()}
    return Run(model, trained_head(model)[1], images, found, parts, preprocessing)


def batches_of(fabric: Fabric, args: argparse.Namespace, run: Run) -> tuple[dict[str, Batches], Order]:
    """Batch the parts, for this process; only the training part is shuffled."""
    rank, world = fabric.global_rank, fabric.world_size
    labels = run.images.labels[run.found["train"]]
    balance = balanced(labels) if args.balanced_sampler else None
    order = Order(len(labels), args.batch_size, args.seed, args.accumulate, rank, world, balance)
    batches = {}
    for part in PARTS:
        if part == "train":
            loader = training_batches(run.parts[part], order, args.num_workers)
        else:
            loader = plain_batches(run.parts[part], args.batch_size // world, args.num_workers, rank, world)
        batches[part] = cast(Batches, fabric.setup_dataloaders(loader, use_distributed_sampler=False))
    return batches, order


def plan_of(
    fabric: Fabric, args: argparse.Namespace, run: Run, batches: dict[str, Batches], order: Order, say: Say
) -> Plan:
    """Say how to train."""
    rows = run.found["train"]
    weights = class_weights(run.images, rows).to(fabric.device) if args.class_weights else None
    return Plan(
        batches["train"],
        order,
        torch.from_numpy(run.images.labels[rows]),
        batches["val"],
        weights,
        args.epochs,
        args.patience,
        args.seed,
        args.save_every,
        save=lambda training: save_training(fabric, training, settings_of(args), checkpoint_file(args)),
        say=say,
        quiet=args.quiet,
    )


def class_weights(images: Images, rows: Integers) -> Tensor:
    """Give (C,) weights by which every class has the same weight in the training loss."""
    counts = np.bincount(images.labels[rows], minlength=len(images.classes))
    return torch.tensor(len(rows) / (len(counts) * counts), dtype=torch.float32)


def set_up(
    fabric: Fabric, args: argparse.Namespace, run: Run, steps: int, scaler: torch.amp.GradScaler | None
) -> Training:
    """Place the network on the devices, and make its optimizer."""
    network = fabric.setup_module(
        cast(nn.Module, torch.compile(run.network)) if args.compile else run.network
    )
    # After FSDP2 has put its shards into the place of the parameters.
    groups = medpeft.parameter_groups(run.model, lr=args.lr, weight_decay=args.weight_decay)
    adamw = torch.optim.AdamW(groups)
    optimizer = cast(_FabricOptimizer, fabric.setup_optimizers(adamw))
    return Training(run.model, network, optimizer, warmup_cosine(adamw, args.epochs * steps), scaler)


def checkpoint_file(args: argparse.Namespace) -> Path:
    """Name the file from which a run goes on."""
    return Path(args.output) / "last.ckpt"
