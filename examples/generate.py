r"""Generate images from prompts with one adapter or several, side by side.

    python examples/generate.py --pipeline runs/tiny-pipeline-tissue-32 --adapter runs/*/adapter.safetensors \
        --prompt "immunohistochemistry of the colon, strong staining"

Every adapter, and the pipeline without one, starts from the same noise. It writes each image and comparison.png, with a row for
each adapter, to --output.
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusion.captions import to_pixels
from diffusion.figures import draw_comparison
from diffusion.pipelines import generate, image_size, open_pipeline
from lightning.fabric import Fabric
from PIL import Image
from torch import Tensor, nn
from trainer.errors import TrainerError

import medpeft

BASE = "no adapter"


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; give its exit status."""
    try:
        run(parse(given))
    except (TrainerError, medpeft.MedpeftError) as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 2
    return 0


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags.

    Raises:
        TrainerError: a number is below 1.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--pipeline", required=True, help="the folder of diffusers that was adapted, or its name on the Hub")
    add(
        "--adapter",
        type=Path,
        nargs="*",
        default=[],
        metavar="FILE",
        help="adapter.safetensors of text_to_image.py; several",
    )
    add("--prompt", action="append", required=True, metavar="TEXT", help="may be repeated: a column each")
    add("--images", type=int, default=4, metavar="N", help="of each prompt and adapter (default: 4)")
    add(
        "--merge",
        action="store_true",
        help="fold the adapters into the weights first, where they can be: faster",
    )
    add("--no-base", action="store_true", help="leave out the pipeline without an adapter")
    add("--image-size", type=int, metavar="PX", help="side in pixels (default: the pipeline's)")
    add("--inference-steps", type=int, default=25, metavar="N", help="of DDIM (default: 25)")
    add("--guidance", type=float, default=2.0, metavar="W", help="of the text, 1 for none (default: 2)")
    add("--seed", type=int, default=0, help="of the noise (default: 0)")
    add(
        "--output", type=Path, default=Path("runs/generated"), metavar="DIR", help="(default: runs/generated)"
    )
    args = parser.parse_args(given)
    for name in ("images", "inference_steps"):
        if getattr(args, name) < 1:
            raise TrainerError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1.")
    if args.no_base and not args.adapter:
        raise TrainerError("--no-base without an --adapter leaves nothing to generate with.")
    return args


def run(args: argparse.Namespace) -> dict[str, Tensor]:
    """Generate, and write images and figure; give the images (P · n, 3, H, W), uint8, of each adapter.

    Raises:
        TrainerError, medpeft.MedpeftError: the pipeline or an adapter does not fit.
    """
    fabric = Fabric(accelerator="auto", devices=1)
    pipeline = open_pipeline(args.pipeline)
    names = labels(args.adapter)
    base = pipeline.unet
    adapted: dict[str, Path | None] = {} if args.no_base else {BASE: None}
    adapted |= dict(zip(names, args.adapter, strict=True))
    images = {}
    for name, file in adapted.items():
        pipeline.unet = base if file is None else with_adapter(base, file, merge=args.merge)
        images[name] = draw(args, pipeline, fabric.device)
        write_images(images[name], args.output / name.replace(" ", "-"), args.images)
        print(f"{name}: {len(images[name])} images", flush=True)
    draw_comparison(
        images, args.prompt, f"{Path(args.pipeline).name}, seed {args.seed}", args.output / "comparison.png"
    )
    print(f"Saved comparison.png and the images to {args.output}")
    return images


def labels(files: Sequence[Path]) -> list[str]:
    """Name each adapter by its method, and by its folder or its place too where a method comes twice."""
    methods = ["+".join(medpeft.inspect(file).methods) for file in files]
    named = [
        f"{m} {file.parent.name}" if methods.count(m) > 1 else m
        for m, file in zip(methods, files, strict=True)
    ]
    return [f"{name} {i + 1}" if named.count(name) > 1 else name for i, name in enumerate(named)]


def with_adapter(base: nn.Module, file: Path, *, merge: bool) -> nn.Module:
    """Give a copy of the UNet with an adapter, merged where that is asked for."""
    unet = medpeft.load(copy.deepcopy(base), file)
    return medpeft.merge(unet) if merge else unet


def draw(args: argparse.Namespace, pipeline: Any, device: torch.device) -> Tensor:
    """Generate `--images` of each prompt in turn."""
    prompts = [prompt for prompt in args.prompt for _ in range(args.images)]
    images = generate(
        pipeline,
        prompts,
        seed=args.seed,
        size=args.image_size or image_size(pipeline),
        steps=args.inference_steps,
        guidance=args.guidance,
        device=device,
    )
    return to_pixels(images)


def write_images(images: Tensor, folder: Path, each: int) -> None:
    """Write images as PNG, named by the number of their prompt and of themselves, both from 1."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        file = folder / f"prompt-{i // each + 1:02}-{i % each + 1:03}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)


if __name__ == "__main__":
    sys.exit(main())
