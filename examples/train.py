"""Fine-tune a pretrained model on medical images with any medpeft method.

Offline, on patches of stained tissue; then on your own folder with one subfolder a class:

    python examples/train.py --method ssf
    python examples/train.py --method lora --option rank=4 --data my/images

It uses a GPU if there is one, stops when the validation macro-F1 no longer rises, and writes
adapter.safetensors, metrics.json, predictions.csv and two figures to --output.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import timm
import torch
from lightning.fabric import Fabric
from trainer.batches import Batches
from trainer.calibration import fit_temperature
from trainer.checkpoint import Training, load_training, restore_training
from trainer.cost import forget_peak, peak_memory, saved_bytes, typical
from trainer.devices import make_fabric
from trainer.errors import TrainerError
from trainer.flags import changed_settings, make_parser, parse, settings_of
from trainer.images import Images
from trainer.loop import Plan, Say, fit, predict
from trainer.metrics import score, score_subgroups, subgroup_table, table
from trainer.preparation import (
    Run,
    adapted_model,
    batches_of,
    checkpoint_file,
    images_of,
    parts_of,
    plan_of,
    prepare,
    set_up,
)
from trainer.reliability import draw_reliability, scaled, titled
from trainer.results import count, describe, save_adapter, write_results

import medpeft


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
    prepared = prepare(fabric, args, model, images, found, say)
    record = {
        "settings": settings_of(args),
        "classes": images.classes,
        "images": {part: count(images, rows) for part, rows in found.items()},
        "broken_images": images.broken,
        "trainable": trainable,
        "saved_bytes": kept,
        **train(fabric, args, prepared, scaler, say, after_epoch),
        "seconds": time.perf_counter() - begun,
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
    }
    conclude(fabric, args, prepared, record, say)
    return record


def train(
    fabric: Fabric,
    args: argparse.Namespace,
    prepared: Run,
    scaler: torch.amp.GradScaler | None,
    say: Say,
    after_epoch: Callable[[Training], None] | None,
) -> dict[str, Any]:
    """Train from the start or the last checkpoint; give how it went, what it cost, and the scores."""
    batches, order = batches_of(fabric, args, prepared)
    forget_peak(fabric.device)
    training = set_up(fabric, args, prepared, order.steps, scaler)
    if args.resume:
        resume(fabric, args, training, say)
    args.output.mkdir(parents=True, exist_ok=True)
    plan = plan_of(fabric, args, prepared, batches, order, say)
    fit(fabric, training, plan if after_epoch is None else with_report(plan, after_epoch))
    peak, kind = peak_memory(fabric.device)
    return {
        "step_seconds": typical(training.step_seconds),
        "peak_bytes": peak,
        "peak_memory": kind,
        "best_epoch": training.best_epoch,
        "history": training.history,
        **evaluate(fabric, args, prepared, training, batches),
    }


def conclude(
    fabric: Fabric, args: argparse.Namespace, prepared: Run, record: dict[str, Any], say: Say
) -> None:
    """Print the scores and write everything that a run leaves."""
    tested = len(prepared.found["test"])
    say("\n" + table(record["test"], record["classes"], f"Test on {tested} images") + "\n")
    if "test_subgroups" in record:
        say(subgroup_table(record["test_subgroups"]) + "\n")
    # What is sharded is gathered by all processes together; of equal copies one is enough.
    if args.strategy == "fsdp2" or fabric.is_global_zero:
        save_adapter(args, prepared, record)
    if fabric.is_global_zero:
        write_results(args, prepared.images, record)
    say(f"Saved the adapter, the metrics and the predictions to {args.output}")


def with_report(plan: Plan, after_epoch: Callable[[Training], None]) -> Plan:
    """Report after each epoch, once its checkpoint is written."""

    def save(training: Training) -> None:
        plan.save(training)
        # Within an epoch there is a checkpoint too where --save-every asks for it, and no new score.
        if training.step == 0:
            after_epoch(training)

    return replace(plan, save=save)


def evaluate(
    fabric: Fabric, args: argparse.Namespace, prepared: Run, training: Training, batches: dict[str, Batches]
) -> dict[str, Any]:
    """Fit the temperature on the validation part, and score that part and the test at it."""
    logits = {part: predict(fabric, training.network, batches[part]) for part in ("val", "test")}
    temperature = fit_temperature(*logits["val"])
    found: dict[str, Any] = {"temperature": temperature}
    for part, (values, labels) in logits.items():
        found[part] = score(scaled(values, temperature), labels.cpu())
        found[part]["ece_uncalibrated"] = score(scaled(values, 1), labels.cpu())["ece"]
    values, labels = logits["test"][0], logits["test"][1].cpu()
    probabilities = scaled(values, temperature)
    rows = prepared.found["test"]
    if prepared.images.subgroups is not None:
        subgroups = [prepared.images.subgroups[i] for i in rows]
        found["test_subgroups"] = score_subgroups(probabilities, labels, subgroups)
    found["test_predictions"] = {
        "index": rows.tolist(),
        "label": labels.tolist(),
        "probabilities": probabilities.tolist(),
    }
    if fabric.is_global_zero and not args.no_figures:
        panels = {
            titled("as trained", found["test"]["ece_uncalibrated"]): scaled(values, 1),
            titled(f"temperature {temperature:.2f}", found["test"]["ece"]): probabilities,
        }
        draw_reliability(panels, labels, args.output / "reliability.png")
    return found


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


def print_line(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def no_line(text: str) -> None:
    """Print nothing."""


if __name__ == "__main__":
    sys.exit(main())
