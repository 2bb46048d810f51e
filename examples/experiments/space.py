"""Where a search looks: the trainer's rates and augmentation, and whatever the method itself declares."""

import argparse
from collections.abc import Mapping
from typing import Any

from ray import tune
from trainer.flags import make_parser

import medpeft

from .cells import shapes_of

DECAYS = (0.0, 0.001, 0.01, 0.1)


def search_space(args: argparse.Namespace, given: set[str]) -> dict[str, Any]:
    """Give what Ray Tune draws from.

    Args:
        args: of the trainer. An option of the method that they fix is not searched.
        given: names of the trainer's flags that the user set; they are not searched either.

    Returns:
        By name: `lr` from a tenth to tenfold of the trainer's, `weight_decay`, `augment`, and `METHOD.OPTION` for each
        option for which the method declares values worth trying.
    """
    space: dict[str, Any] = {
        "lr": tune.loguniform(args.lr / 10, args.lr * 10),
        "weight_decay": tune.choice(DECAYS),
        "augment": tune.choice(_choices_of("augment")),
    }
    space = {name: domain for name, domain in space.items() if name not in given}
    return space | {name: tune.choice(values) for name, values in medpeft.search_space(args.option).items()}


def defaults(args: argparse.Namespace, space: Mapping[str, Any]) -> dict[str, Any]:
    """Give the point that the trainer would take without a search.

    Raises:
        TrainerError, medpeft.MedpeftError: the method does not fit the model.
    """
    planned = medpeft.plan(
        shapes_of(args.model, args.image_size), args.option, target=args.target, batchnorm=args.batchnorm
    )
    options = {
        f"{name}.{key}": value for name, own in planned.record.methods.items() for key, value in own.items()
    }
    return {name: options[name] if name in options else getattr(args, name) for name in space}


def as_flags(point: Mapping[str, Any]) -> list[str]:
    """Spell a point as flags of the trainer."""
    flags = []
    for name, value in point.items():
        flag = f"--option={name}={value}" if "." in name else f"--{name.replace('_', '-')}={value}"
        flags.append(flag)
    return flags


def _choices_of(name: str) -> list[Any]:
    action = next(action for action in make_parser("")._actions if action.dest == name)
    return list(action.choices or [])
