"""Choose how many blocks are adapted, and whether activations are kept, by what fits into a memory."""

from dataclasses import replace

import torch

import medpeft

from ..errors import TrainerError
from ..flags import read_bytes
from ..settings import Settings
from .model import where_adapted, without_memory
from .names import MONAI

LESS = (0.5, 0.25)  # of the blocks, where the depth that is asked for does not fit
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def within_memory(settings: Settings, memory: str) -> tuple[Settings, str]:
    """Choose the deepest way to train by the method that fits into a memory; the forecast computes nothing.

    Args:
        settings: checked. Their depth is the most that is tried.
        memory: such as 6GiB.

    Returns:
        The settings with the choice, and what to say of it.

    Raises:
        TrainerError: nothing fits.
        medpeft.MedpeftError: the method does not fit the model.
    """
    found = _forecast(settings, read_bytes(memory))
    best = found.best
    if best is None:
        raise TrainerError(
            f"Nothing fits into --memory {memory}:\n\n{found}\n\nRaise --accumulate, or take a smaller "
            "--batch-size or --image-size."
        )
    chosen = replace(
        settings,
        depth=best.keywords["depth"],
        checkpoint_activations=settings.checkpoint_activations or best.checkpointing,
    )
    words = f"--depth {chosen.depth}"
    if chosen.checkpoint_activations:
        words += " --checkpoint-activations"
    size = f"{best.peak_bytes / 2**20:,.0f} MiB"
    note = f"--memory {memory}: {words}; tensors of a step take {size} at most, by the forecast"
    return chosen, note


def _forecast(settings: Settings, count: int) -> medpeft.Fits:
    model, filled = without_memory(settings)
    images = settings.batch_size // (settings.accumulate * settings.devices)
    where = {name: value for name, value in where_adapted(settings, model, filled).items() if value}
    selections = [{**where, "depth": depth} for depth in (settings.depth, *LESS) if depth <= settings.depth]
    kind = AUTOCAST.get(settings.precision)
    problem: medpeft.MedpeftError | None = None
    # Whether the data are volumes is known once they are read.
    for dimensions in (3, 2) if settings.model.startswith(MONAI) else (2,):
        example = torch.empty(images, 3, *[settings.image_size] * dimensions, device="meta")
        try:
            with torch.autocast("cpu", kind, enabled=kind is not None):
                return medpeft.fits(model, example, count, methods=[settings.option], selections=selections)
        except medpeft.MedpeftError as error:
            problem = problem or error
    assert problem is not None
    raise problem
