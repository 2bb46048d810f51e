"""Fine-tune a pretrained model on medical images with any medpeft method.

Offline, on patches of stained tissue; then on your own folder with one subfolder a class:

    python examples/train.py --method ssf
    python examples/train.py --method lora --option rank=4 --data my/images

It uses a GPU if there is one, stops when the validation macro-F1 no longer rises, and writes
adapter.safetensors, metrics.json, predictions.csv and training.png to --output.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricOptimizer
from torch import Tensor, nn
from trainer.batches import Batches, Part, make_transform, plain_batches, training_batches
from trainer.checkpoint import Training, load_training, restore_training, save_training
from trainer.cost import forget_peak, peak_memory, saved_bytes, typical
from trainer.devices import make_fabric
from trainer.errors import TrainerError
from trainer.flags import changed_settings, make_parser, parse, settings_of
from trainer.images import Images, Integers
from trainer.loop import Plan, fit, predict, warmup_cosine
from trainer.metrics import score, table
from trainer.models import build_model, checkpoint_activations, input_statistics
from trainer.order import Order, balanced
from trainer.results import count, describe, write_results
from trainer.sources import read_data
from trainer.split import PARTS, fold, split
from trainer.subset import training_subset

import medpeft

Say = Callable[[str], None]


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; give its exit status."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        run(parse(make_parser(__doc__), given))
    except (TrainerError, medpeft.MedpeftError) as error:
        if first:
            print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if first:
            print("Interrupted. Go on from the last checkpoint with --resume.", file=sys.stderr)
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def run(
    args: argparse.Namespace,
    images: Images | None = None,
    after_epoch: Callable[[Training], None] | None = None,
) -> dict[str, Any]:
    """Train, test and save; give what metrics.json holds, and the test's predictions.

    Args:
        args: the flags, from `parse`.
        images: what `images_of(args)` gave before, so that several runs read the data once.
        after_epoch: called after every epoch and its checkpoint; a search may end the run there.

    Raises:
        TrainerError, medpeft.MedpeftError: data, model, method or flags do not fit.
    """
    begun = time.perf_counter()
    fabric, scaler = make_fabric(args)
    say = print_line if fabric.is_global_zero and not args.quiet else no_line
    images = images_of(args) if images is None else images
    found = parts_of(args, images)
    say(describe(images, found))

    fabric.seed_everything(args.seed, workers=True, verbose=False)
    model = adapted_model(args, len(images.classes))
    say(f"\n{medpeft.report(model)}\n")
    kept = saved_bytes(model, args.batch_size // (args.accumulate * fabric.world_size), args.image_size)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)

    batches, order = batches_of(fabric, args, images, found, input_statistics(model))
    plan = plan_of(fabric, args, images, found["train"], batches, order, say)
    if after_epoch is not None:
        plan = with_report(plan, after_epoch)
    forget_peak(fabric.device)
    training = set_up(fabric, args, model, order.steps, scaler)
    if args.resume:
        resume(fabric, args, training, say)
    args.output.mkdir(parents=True, exist_ok=True)
    fit(fabric, training, plan)
    peak, kind = peak_memory(fabric.device)

    predictions = {part: probabilities_of(fabric, training.network, batches[part]) for part in ("val", "test")}
    scores = {part: score(probabilities, labels) for part, (probabilities, labels) in predictions.items()}
    say("\n" + table(scores["test"], images.classes, f"Test on {len(found['test'])} images") + "\n")
    record = {
        "settings": settings_of(args),
        "classes": images.classes,
        "images": {part: count(images, rows) for part, rows in found.items()},
        "trainable": trainable,
        **scores,
        "best_epoch": training.best_epoch,
        "history": training.history,
        "seconds": time.perf_counter() - begun,
        "step_seconds": typical(training.step_seconds),
        "saved_bytes": kept,
        "peak_bytes": peak,
        "peak_memory": kind,
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "test_predictions": {
            "index": found["test"].tolist(),
            "label": predictions["test"][1].tolist(),
            "probabilities": predictions["test"][0].tolist(),
        },
    }
    # What is sharded is gathered by all processes together; of equal copies one is enough.
    if args.strategy == "fsdp2" or fabric.is_global_zero:
        save_adapter(args, model, record)
    if fabric.is_global_zero:
        write_results(args, images, record)
    say(f"Saved adapter.safetensors, metrics.json, predictions.csv and training.png to {args.output}")
    return record


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


def batches_of(
    fabric: Fabric,
    args: argparse.Namespace,
    images: Images,
    found: dict[str, Integers],
    statistics: tuple[list[float], list[float]],
) -> tuple[dict[str, Batches], Order]:
    """Batch the parts, for this process; only the training part is shuffled and augmented."""
    rank, world = fabric.global_rank, fabric.world_size
    labels = images.labels[found["train"]]
    order = Order(
        len(labels),
        args.batch_size,
        args.seed,
        args.accumulate,
        rank,
        world,
        balanced(labels) if args.balanced_sampler else None,
    )
    batches = {}
    for part in PARTS:
        transform = make_transform(args.image_size, *statistics, args.augment if part == "train" else "none")
        chosen = Part(images, found[part], transform)
        if part == "train":
            loader = training_batches(chosen, order, args.num_workers)
        else:
            loader = plain_batches(chosen, args.batch_size // world, args.num_workers, rank, world)
        batches[part] = cast(Batches, fabric.setup_dataloaders(loader, use_distributed_sampler=False))
    return batches, order


def plan_of(
    fabric: Fabric,
    args: argparse.Namespace,
    images: Images,
    rows: Integers,
    batches: dict[str, Batches],
    order: Order,
    say: Say,
) -> Plan:
    """Say how to train."""
    weights = class_weights(images, rows) if args.class_weights else None
    return Plan(
        batches["train"],
        order,
        torch.from_numpy(images.labels[rows]),
        batches["val"],
        None if weights is None else weights.to(fabric.device),
        args.epochs,
        args.patience,
        args.seed,
        args.save_every,
        save=lambda training: save_training(fabric, training, settings_of(args), checkpoint_file(args)),
        say=say,
        quiet=args.quiet,
    )


def with_report(plan: Plan, after_epoch: Callable[[Training], None]) -> Plan:
    """Report after each epoch, once its checkpoint is written."""

    def save(training: Training) -> None:
        plan.save(training)
        # Within an epoch there is a checkpoint too where --save-every asks for it, and no new score.
        if training.step == 0:
            after_epoch(training)

    return replace(plan, save=save)


def class_weights(images: Images, rows: Integers) -> Tensor:
    """Give (C,) weights by which every class has the same weight in the training loss."""
    counts = np.bincount(images.labels[rows], minlength=len(images.classes))
    return torch.tensor(len(rows) / (len(counts) * counts), dtype=torch.float32)


def set_up(
    fabric: Fabric, args: argparse.Namespace, model: nn.Module, steps: int, scaler: torch.amp.GradScaler | None
) -> Training:
    """Place an adapted model on the devices, and make its optimizer."""
    network = fabric.setup_module(cast(nn.Module, torch.compile(model)) if args.compile else model)
    # After FSDP2 has put its shards into the place of the parameters.
    groups = medpeft.parameter_groups(model, lr=args.lr, weight_decay=args.weight_decay)
    adamw = torch.optim.AdamW(groups)
    optimizer = cast(_FabricOptimizer, fabric.setup_optimizers(adamw))
    return Training(model, network, optimizer, warmup_cosine(adamw, args.epochs * steps), scaler)


def checkpoint_file(args: argparse.Namespace) -> Path:
    """Name the file from which a run goes on."""
    return Path(args.output) / "last.ckpt"


def resume(fabric: Fabric, args: argparse.Namespace, training: Training, say: Say) -> None:
    """Go on from a checkpoint of a run with the same settings, if there is one."""
    checkpoint = checkpoint_file(args)
    if not checkpoint.exists():
        say(f"{args.output} has no last.ckpt: beginning with epoch 1")
        return
    content = load_training(checkpoint)
    changed = changed_settings(content["settings"], settings_of(args))
    if changed:
        raise TrainerError(
            f"{checkpoint} is from a run with other settings: {'; '.join(changed)}. "
            "Resume with the same ones, or choose another --output."
        )
    restore_training(fabric, training, content)
    within = f" and {training.step} steps" if training.step else ""
    say(f"Resumed after epoch {len(training.history)}{within}")


def probabilities_of(fabric: Fabric, model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """Give the probabilities (N, C) and the labels (N,) of all batches, on the CPU."""
    logits, labels = predict(fabric, model, batches)
    return logits.softmax(1).cpu(), labels.cpu()


def save_adapter(args: argparse.Namespace, model: nn.Module, record: dict[str, Any]) -> None:
    """Write the adapter with what it takes to use it; called on every process, which gathers what is sharded."""
    mean, std = input_statistics(model)
    metadata = {
        "model": args.model,
        "pretrained": not args.no_pretrained,
        "classes": record["classes"],
        "image_size": args.image_size,
        "mean": mean,
        "std": std,
        "test_macro_f1": record["test"]["macro_f1"],
    }
    medpeft.save(model, args.output / "adapter.safetensors", metadata=metadata)


def print_line(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def no_line(text: str) -> None:
    """Print nothing."""


if __name__ == "__main__":
    sys.exit(main())
