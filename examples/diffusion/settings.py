"""The settings of `text_to_image.py`: a field is a flag, `--batch_size 8`, and a line of `--config`."""

import hashlib
import json
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import jsonargparse
import yaml
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveInt,
)
from trainer.errors import TrainerError

# Peak learning rates of AdamW for a UNet of Stable Diffusion's size; a union takes the lowest of its parts.
RATES = {"full": 1e-5, "attention": 1e-5, "bias": 1e-3, "bitfit": 1e-3, "norm": 1e-3, "svdiff": 1e-3}
# The tiny UNet is thirty times narrower, and trained for minutes.
TINY_RATES = {"full": 1e-3, "attention": 1e-3, "bias": 2e-2, "bitfit": 2e-2, "norm": 2e-2, "svdiff": 5e-2}
RATE, TINY_RATE = 1e-4, 1e-2  # of other methods
# What may change when a run goes on.
FREE = {
    "output",
    "cache",
    "svd_cache",
    "tiny_folder",
    "inception_weights",
    "save_every",
    "sample_every",
    "prompt",
}
FREE |= {"inference_steps", "guidance", "score_samples"}

Names = list[str] | str | None
T = TypeVar("T")


@dataclass(kw_only=True)
class Settings:
    """How to adapt, draw and score."""

    data: Path | None = None
    """Folder of images with metadata.jsonl or metadata.csv (file_name, text, perhaps label and patient), or
    with one subfolder a class; by default patches of stained tissue."""
    caption: str = "a medical image, {}"
    """Text of a class, whose name takes the place of {}."""
    patient_column: str = "patient"
    """Column whose images stay in one part of the split."""
    tokens: tuple[int, int] | None = None
    """Keep images whose text has so many tokens; [7,77] in the study (Dutt et al., arXiv 2305.08252)."""
    image_size: PositiveInt | None = None
    """Side in pixels; by default the pipeline's, and 32 for the tiny one."""
    held_out: OpenUnitInterval = 0.25
    """Share of the images that scores compare with."""
    new_class: Names = None
    """Class or classes to adapt to; by default all, with the tiny pipeline those that it has not seen."""

    pipeline: str | None = None
    """Folder of diffusers with Stable Diffusion or SDXL, or its name on the Hub; by default a tiny one."""
    tiny_folder: Path | None = None
    """Where the tiny pipeline is kept; by default beside the output."""
    tiny_steps: PositiveInt = 1500
    """Steps that pretrain its UNet; its autoencoder takes two fifths of them."""
    method: str = "lora"
    """full, attention, bias, norm, bias+norm, bias+norm+attention, lora, svdiff; or any other of medpeft."""
    option: dict[str, Any] = field(default_factory=dict)
    """Options of the method, such as --option.rank=4, in a union --option.lora='{rank: 4}'."""
    target: Names = None
    """Layers to adapt."""
    svd_cache: Path | None = None
    """Keep the decompositions of svdiff in this folder, for the next start."""

    steps: PositiveInt = 500
    """Optimizer steps."""
    batch_size: PositiveInt = 16
    """Images on each device."""
    lr: OpenUnitInterval | None = None
    """Peak rate of AdamW; by default one for the method."""
    weight_decay: NonNegativeFloat = 0.01
    """Of AdamW."""
    snr_gamma: NonNegativeFloat = 5.0
    """Bound of min-SNR weighting, 0 for none."""
    drop_text: ClosedUnitInterval = 0.1
    """Share of images that train without their text, which guidance needs."""
    ema: OpenUnitInterval = 0.99
    """Decay of the moving average of the trainable weights."""
    precision: Literal["32", "bf16", "16"] = "32"
    """16 and bf16 compute in half precision."""
    gradient_checkpointing: bool = False
    """Compute activations anew in backward: less memory, slower."""
    devices: PositiveInt = 1
    """GPUs, or processes on a CPU."""
    seed: NonNegativeInt = 0
    """Of split, adapters, batches and pictures."""
    output: Path | None = None
    """Where results go, and an interrupted run goes on; by default runs/DATA-PIPELINE-METHOD-SEED-DIGEST."""
    cache: Path | None = None
    """Where latents go; by default latents beside the output."""
    save_every: PositiveInt = 250
    """Steps between checkpoints."""

    prompt: Names = None
    """Text or texts of the pictures; by default one of each class."""
    sample_every: PositiveInt = 250
    """Steps between pictures."""
    inference_steps: PositiveInt = 25
    """Of DDIM."""
    guidance: NonNegativeFloat = 2.0
    """Of the text, 1 for none."""
    score_samples: NonNegativeInt = 0
    """Compare so many generated images, at most as many as are held out, with real ones by FID and KID."""
    inception_weights: Path | None = None
    """torch-fidelity's weights of Inception-v3 for FID."""

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """The options by method, as `medpeft.apply` takes them."""
        found: dict[str, dict[str, Any]] = {name.strip(): {} for name in self.method.split("+")}
        for name, value in self.option.items():
            if name in found and isinstance(value, dict):
                # jsonargparse leaves the values of inner dictionaries as text.
                found[name] |= {key: yaml.safe_load(str(item)) for key, item in value.items()}
            elif len(found) > 1:
                raise TrainerError(f"--option.{name} is of which? Write --option.{next(iter(found))}.{name}.")
            else:
                found[self.method][name] = value
        if "attention" in found:
            # The study's "attention" is the whole of the UNet's `attentions`.
            found["attention"].setdefault("scope", "block")
        return found

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        known, other = (RATES, RATE) if self.pipeline else (TINY_RATES, TINY_RATE)
        usual = min(known.get(name, other) for name in self.methods)
        return self.lr or usual

    @property
    def folder(self) -> Path:
        """Where the results go."""
        digest = hashlib.sha256(json.dumps(self.determining).encode()).hexdigest()[:8]
        model = Path(self.pipeline or "tiny").name
        return self.output or Path("runs") / f"{self._data}-{model}-{self.method}-{self.seed}-{digest}"

    @property
    def latents(self) -> Path:
        """Where latents go."""
        return self.cache or self.folder.parent / "latents"

    def tiny(self, size: int) -> Path:
        """Where the tiny pipeline of a size is kept."""
        return self.tiny_folder or self.folder.parent / f"tiny-pipeline-{self._data}-{size}"

    @property
    def plain(self) -> dict[str, Any]:
        """All as plain values."""
        return {**json.loads(json.dumps(asdict(self), default=str)), "lr": self.rate}

    @property
    def determining(self) -> dict[str, Any]:
        """What the trained adapter depends on."""
        return {name: value for name, value in self.plain.items() if name not in FREE}

    @property
    def _data(self) -> str:
        return (self.data or Path("tissue")).stem


def listed(names: Names) -> list[str] | None:
    """Make a list of one name."""
    return [names] if isinstance(names, str) else names


class _Help(RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """Keeps the lines of the description."""


def read_command(
    kind: type[T], description: str | None, given: Sequence[str] | None, **others: dict[str, Any]
) -> T:
    """Read the settings of a kind from the command line.

    Args:
        kind: a dataclass; its fields and their docstrings make the flags.
        description: shown by `--help`.
        given: the arguments, None for those of the process.
        others: how `add_argument` is to declare some of the fields.

    Raises:
        TrainerError: an argument is unknown, or its value cannot be meant.
    """
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(description=description, formatter_class=_Help, exit_on_error=False)
    parser.add_argument(
        "--config", action="config", help="YAML file of settings, such as settings.yaml of a run"
    )
    for name, options in others.items():
        parser.add_argument(f"--{name}", **options)
    parser.add_class_arguments(kind, skip=set(others))
    try:
        values = vars(parser.parse_args(given))
    except ArgumentError as error:
        raise TrainerError(f"{error} See --help.") from error
    values.pop("config")
    for name, value in values.items():
        # Numbers within bounds are of jsonargparse's own types, which no checkpoint can hold.
        if isinstance(value, float):
            values[name] = float(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            values[name] = int(value)
    return kind(**values)
