"""What a command of the experiments answers to the shell."""

import sys
from collections.abc import Callable, Sequence

from trainer.errors import TrainerError

import medpeft


def exit_status(name: str, run: Callable[[Sequence[str] | None], int], given: Sequence[str] | None) -> int:
    """Run a command line; give what it gives, 2 after bad input and 130 after an interruption, each with its message."""
    try:
        return run(given)
    except (TrainerError, medpeft.MedpeftError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130
