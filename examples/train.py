"""Fine-tune a pretrained model on medical images with any medpeft method.

Offline, on patches of stained tissue; then on your own folder with one subfolder a class:

    python examples/train.py --method ssf
    python examples/train.py --method lora --option rank=4 --data my/images

It uses a GPU if there is one, stops when the validation macro-F1 no longer rises, and writes
adapter.safetensors, metrics.json, predictions.csv and figures to --output. The same command goes on after an
interruption, and gives the result that it has once it is finished.
"""

import os
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser
from trainer.errors import TrainerError
from trainer.flags import spelled
from trainer.run import run
from trainer.settings import Settings

import medpeft


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; give its exit status: 2 after bad input, 130 after an interruption."""
    words = sys.argv[1:] if given is None else list(given)
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        run(parse(words))
    except (TrainerError, medpeft.MedpeftError) as error:
        if first:
            print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if first:
            print("Interrupted. The same command goes on after the last whole epoch.", file=sys.stderr)
        return 130
    return 0


def make_parser() -> ArgumentParser:
    """Declare a flag for every setting, and one for a YAML file of them."""
    parser = ArgumentParser(prog="train.py", description=__doc__)
    parser.add_argument("--config", action="config", help="a YAML file of settings; flags after it win")
    parser.add_class_arguments(Settings)
    return parser


def parse(words: Sequence[str]) -> Settings:
    """Read the settings of a command line."""
    args = make_parser().parse_args(spelled(words, Settings))
    values = dict(vars(args))
    del values["config"]
    return Settings(**values)


if __name__ == "__main__":
    sys.exit(main())
