"""Fine-tune a pretrained model on medical images with any medpeft method.

Offline, on patches of stained tissue; then on your own folder with one subfolder a class:

    python examples/train.py --method ssf
    python examples/train.py --method lora --option rank=4 --data my/images

It uses a GPU if there is one, stops when the validation macro-F1 no longer rises, and writes
adapter.safetensors, metrics.json and training.png to --output.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from lightning.fabric import Fabric
from torch import nn
from trainer.batches import Batches, Part, make_batches, make_transform
from trainer.config import write_config
from trainer.cost import forget_peak, peak_memory, saved_bytes, typical
from trainer.errors import TrainerError
from trainer.figure import draw_training
from trainer.flags import changed_settings, make_parser, parse, settings_of
from trainer.images import Images, Integers
from trainer.loop import Training, fit, load_training, predict, restore_training, save_training, warmup_cosine
from trainer.metrics import score, table, without_nan
from trainer.models import build_model, input_statistics
from trainer.predictions import write_predictions
from trainer.sources import read_data
from trainer.split import PARTS, divided_groups, split
from trainer.subset import training_subset

import medpeft


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; give its exit status."""
    try:
        run(parse(make_parser(__doc__), given))
    except (TrainerError, medpeft.MedpeftError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. Go on after the last whole epoch with --resume.", file=sys.stderr)
        return 130
    return 0


def run(args: argparse.Namespace, images: Images | None = None) -> dict[str, Any]:
    """Train, test and save; give what metrics.json holds, and the test's predictions.

    Args:
        args: the flags, from `parse`.
        images: what `images_of(args)` gave before, so that several runs read the data once.

    Raises:
        TrainerError, medpeft.MedpeftError: data, model, method or flags do not fit.
    """
    start = time.perf_counter()
    say = no_line if args.quiet else print_line
    fabric = Fabric(accelerator="auto", devices=1)
    if images is None:
        images = images_of(args)
    found = split(images, args.seed, args.val_fraction, args.test_fraction)
    found["train"] = training_subset(images, found["train"], args.train_fraction, args.seed)
    say(describe(images, found))

    fabric.seed_everything(args.seed, workers=True, verbose=False)
    model = adapted_model(args, len(images.classes))
    say(f"\n{medpeft.report(model)}\n")

    batches = batches_of(fabric, args, images, found, input_statistics(model))
    forget_peak(fabric.device)
    training = train(fabric, args, model, batches, class_weights(args, images, found["train"]), say)
    peak, kind = peak_memory(fabric.device)
    predictions = {part: probabilities_of(training.model, batches[part]) for part in ("val", "test")}
    scores = {part: score(probabilities, labels) for part, (probabilities, labels) in predictions.items()}
    say("\n" + table(scores["test"], images.classes, f"Test on {len(found['test'])} images") + "\n")
    record = {
        "settings": settings_of(args),
        "classes": images.classes,
        "images": {part: count(images, rows) for part, rows in found.items()},
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        **scores,
        "best_epoch": training.best_epoch,
        "history": training.history,
        "seconds": time.perf_counter() - start,
        "step_seconds": typical(training.step_seconds),
        "saved_bytes": saved_bytes(model, args.batch_size, args.image_size),
        "peak_bytes": peak,
        "peak_memory": kind,
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "test_predictions": {
            "index": found["test"].tolist(),
            "label": predictions["test"][1].tolist(),
            "probabilities": predictions["test"][0].tolist(),
        },
    }
    write_results(args, model, images, record)
    say(f"Saved adapter.safetensors, metrics.json, predictions.csv and training.png to {args.output}")
    return record


def images_of(args: argparse.Namespace) -> Images:
    """Read the data that the flags name; several runs may share them."""
    return read_data(args.data, args.image_size, args.patient_column, args.quiet)


def probabilities_of(model: nn.Module, batches: Batches) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the probabilities (N, C) and the labels (N,) of all batches, on the CPU."""
    logits, labels = predict(model, batches)
    return logits.softmax(1).cpu(), labels.cpu()


def adapted_model(args: argparse.Namespace, classes: int) -> nn.Module:
    """Build the model and apply the method to it."""
    model = build_model(args.model, classes, args.image_size, not args.no_pretrained)
    # Convolutions on a CPU take a third less time with channels last.
    model = model.to(memory_format=torch.channels_last)
    return medpeft.apply(model, args.option, target=args.target, batchnorm=args.batchnorm, seed=args.seed)


def batches_of(
    fabric: Fabric,
    args: argparse.Namespace,
    images: Images,
    found: dict[str, Integers],
    statistics: tuple[list[float], list[float]],
) -> dict[str, Batches]:
    """Batch the parts; only the training part is shuffled and augmented."""
    batches = {}
    for part in PARTS:
        training = part == "train"
        transform = make_transform(args.image_size, *statistics, augment=training)
        chosen = Part(images, found[part], transform)
        loader = make_batches(chosen, args.batch_size, args.num_workers, shuffle=training)
        batches[part] = cast(Batches, fabric.setup_dataloaders(loader))
    return batches


def class_weights(args: argparse.Namespace, images: Images, rows: Integers) -> torch.Tensor | None:
    """Give (C,) weights by which every class has the same weight in the training loss."""
    if not args.class_weights:
        return None
    counts = np.bincount(images.labels[rows], minlength=len(images.classes))
    return torch.tensor(len(rows) / (len(counts) * counts), dtype=torch.float32)


def train(
    fabric: Fabric,
    args: argparse.Namespace,
    model: nn.Module,
    batches: dict[str, Batches],
    weights: torch.Tensor | None,
    say: Callable[[str], None],
) -> Training:
    """Train an adapted model, from the start or from the last epoch that was saved."""
    groups = medpeft.parameter_groups(model, lr=args.lr, weight_decay=args.weight_decay)
    optimizer = torch.optim.AdamW(groups)
    schedule = warmup_cosine(optimizer, args.epochs * len(batches["train"]))
    on_device, stepped = fabric.setup(model, optimizer)
    training = Training(on_device, stepped, schedule)
    checkpoint = args.output / "last.ckpt"
    args.output.mkdir(parents=True, exist_ok=True)
    if args.resume:
        resume(args, training, checkpoint, say)

    def after_epoch(training: Training) -> None:
        save_training(training, settings_of(args), checkpoint)
        say(epoch_line(training))

    fit(
        fabric,
        training,
        batches["train"],
        batches["val"],
        nn.CrossEntropyLoss(weights).to(fabric.device),
        epochs=args.epochs,
        patience=args.patience,
        seed=args.seed,
        after_epoch=after_epoch,
        quiet=args.quiet,
    )
    return training


def resume(args: argparse.Namespace, training: Training, checkpoint: Path, say: Callable[[str], None]) -> None:
    """Go on from a checkpoint of a run with the same settings, if there is one."""
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
    restore_training(training, content)
    say(f"Resumed after epoch {len(training.history)}")


def write_results(args: argparse.Namespace, model: nn.Module, images: Images, record: dict[str, Any]) -> None:
    """Write the adapter, the settings, the metrics, the predictions and the figure."""
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
    kept = {key: value for key, value in record.items() if key != "test_predictions"}
    text = json.dumps(without_nan(kept), indent=2, allow_nan=False)
    (args.output / "metrics.json").write_text(text + "\n")
    write_config({k: v for k, v in record["settings"].items() if k != "config"}, args.output / "config.yaml")
    found = record["test_predictions"]
    names = [images.names[i] if images.names else str(i) for i in found["index"]]
    labels = [images.classes[label] for label in found["label"]]
    write_predictions(args.output / "predictions.csv", names, images.classes, torch.tensor(found["probabilities"]), labels)
    draw_training(
        record["history"],
        record["best_epoch"],
        record["test"]["confusion_matrix"],
        record["classes"],
        f"{args.method} on {args.model}: test macro-F1 {record['test']['macro_f1']:.3f}",
        args.output / "training.png",
    )


def count(images: Images, rows: Integers) -> dict[str, int]:
    """Count the images of each class among some rows."""
    counts = np.bincount(images.labels[rows], minlength=len(images.classes))
    return dict(zip(images.classes, counts.tolist(), strict=True))


def describe(images: Images, found: dict[str, Integers]) -> str:
    """Lay out how many images of each class are in each part."""
    width = max(len(name) for name in [*images.classes, "images"])
    lines = [f"{'images':<{width}}" + "".join(f"{part:>8}" for part in PARTS)]
    counts = {part: count(images, rows) for part, rows in found.items()}
    lines += [f"{name:<{width}}" + "".join(f"{counts[part][name]:>8}" for part in PARTS) for name in images.classes]
    if divided := divided_groups(images, found):
        lines.append(
            f"Warning: {divided} groups (exact copies, or one patient's images) fall into more "
            "than one part of the split that the data bring, so its scores flatter the model."
        )
    return "\n".join(lines)


def epoch_line(training: Training) -> str:
    """Sum up the last epoch in one line."""
    epoch, last = len(training.history), training.history[-1]
    kept = "  *" if training.best_epoch == epoch else ""
    return (
        f"epoch {epoch:>3}  train loss {last['train_loss']:.4f}  val loss {last['val_loss']:.4f}  "
        f"val macro-F1 {last['val_macro_f1']:.4f}  {last['seconds']:5.1f} s{kept}"
    )


def print_line(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def no_line(text: str) -> None:
    """Print nothing."""


if __name__ == "__main__":
    sys.exit(main())
