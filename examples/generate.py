r"""Generate images from prompts with one adapter or several, side by side.

    python examples/generate.py --pipeline runs/tiny-pipeline-tissue-32 \
        --adapter runs/*tiny*/adapter.safetensors --prompt "colon, strong staining"

Every adapter, and the pipeline without one, starts from the same noise. It writes each image and
comparison.png, with a row for each adapter, to --output.
"""

import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

try:
    from diffusion.data import to_pixels
    from diffusion.figures import draw_pictures
    from diffusion.pipelines import generate, image_size, open_pipeline
    from diffusion.settings import read_command
    from jsonargparse.typing import NonNegativeFloat, PositiveInt
    from lightning.fabric import Fabric
    from torch import Tensor, nn
    from torchvision.transforms.functional import to_pil_image
    from trainer.errors import TrainerError
except ModuleNotFoundError as error:
    sys.exit(f"generate.py: {error.name} is not installed. Run: pip install -e '.[diffusion]'")

import medpeft


@dataclass(kw_only=True)
class Settings:
    """What to generate."""

    pipeline: str
    """The folder of diffusers that was adapted, or its name on the Hub."""
    prompt: list[str]
    adapter: list[Path] = field(default_factory=list)
    images: PositiveInt = 4
    """Of each prompt and adapter."""
    merge: bool = False
    """Fold the adapters into the weights first, where they can be: faster."""
    base: bool = True
    """Generate without an adapter too."""
    image_size: PositiveInt | None = None
    """Side in pixels; by default the pipeline's."""
    inference_steps: PositiveInt = 25
    """Of DDIM."""
    guidance: NonNegativeFloat = 2.0
    """Of the text, 1 for none."""
    seed: int = 0
    """Of the noise."""
    output: Path = Path("runs/generated")
    """Where the images go."""


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; give its exit status."""
    try:
        run(read_settings(given))
    except (TrainerError, medpeft.MedpeftError) as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 2
    return 0


def read_settings(given: Sequence[str] | None) -> Settings:
    """Read the command line; the shell makes several files of a pattern."""
    adapter = {"nargs": "*", "type": Path, "default": [], "help": "files of text_to_image.py, a row each"}
    prompt = {"nargs": "+", "required": True, "help": "texts, a column each"}
    return read_command(Settings, __doc__, given, adapter=adapter, prompt=prompt)


def run(settings: Settings) -> dict[str, Tensor]:
    """Generate, and write images and figure; give the images (P · n, 3, H, W), uint8, of each adapter.

    Raises:
        TrainerError, medpeft.MedpeftError: the pipeline or every adapter does not fit.
    """
    pipeline = open_pipeline(settings.pipeline)
    device = Fabric(accelerator="auto", devices=1).device
    pipeline.to(device)
    size, title = settings.image_size or image_size(pipeline), Path(settings.pipeline).name
    prompts = [prompt for prompt in settings.prompt for _ in range(settings.images)]
    images = {}
    for name, unet in unets(settings, pipeline.unet):
        pipeline.unet = unet.to(device)
        options = {"steps": settings.inference_steps, "guidance": settings.guidance}
        found = generate(pipeline, prompts, seed=settings.seed, size=size, **options)
        images[name] = to_pixels(found)
        write_images(images[name], settings.output / name.replace(" ", "-"), settings.images)
        print(f"{name}: {len(prompts)} images", flush=True)
    if not images:
        raise TrainerError(f"No --adapter fits {title}, and --base is false: nothing was generated.")
    draw_pictures(
        images, f"{title}, seed {settings.seed}", settings.output / "comparison.png", settings.prompt
    )
    print(f"Saved comparison.png and the images to {settings.output}")
    return images


def unets(settings: Settings, base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Give the UNet without and with each adapter, named by its method, and folder where that comes twice."""
    if settings.base:
        yield "no adapter", base
    methods = ["+".join(medpeft.inspect(file).methods) for file in settings.adapter]
    for i, (method, file) in enumerate(zip(methods, settings.adapter, strict=True)):
        name = method
        if methods.count(method) > 1:
            name = f"{method} {Path(file).parent.name} {i + 1}"
        try:
            unet = medpeft.load(copy.deepcopy(base), file)
        except medpeft.CheckpointError as error:
            # A pattern of the shell also finds adapters of other models.
            print(f"{file} is left out: {error}", file=sys.stderr)
            continue
        yield name, medpeft.merge(unet) if settings.merge else unet


def write_images(images: Tensor, folder: Path, each: int) -> None:
    """Write images as PNG, named by the number of their prompt and of themselves, both from 1."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        to_pil_image(image).save(folder / f"prompt-{i // each + 1:02}-{i % each + 1:03}.png")


if __name__ == "__main__":
    sys.exit(main())
