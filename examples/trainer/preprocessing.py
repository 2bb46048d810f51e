"""How a file becomes the model's input: it travels in the adapter's metadata, and `predict.py` repeats it."""

from dataclasses import asdict, dataclass
from typing import Any

from torchvision.transforms import v2

from .batches import make_transform
from .errors import TrainerError


@dataclass(frozen=True)
class Preprocessing:
    """Decode to 8 bit (`images.py`), resize to the stored size (bicubic), then to the input, and normalise.

    Attributes:
        stored: height and width at which images were kept in memory.
        image_size: the side of the model's input.
        mean: of red, green and blue, of values in [0, 1].
        std: likewise.
    """

    stored: tuple[int, int]
    image_size: int
    mean: list[float]
    std: list[float]

    def transform(self) -> v2.Transform:
        """From the stored uint8 pixels (C, H, W) to the input, without augmentation."""
        return make_transform(self.image_size, self.mean, self.std)

    def to_metadata(self) -> dict[str, Any]:
        """Give plain values for a file's header."""
        return {**asdict(self), "stored": list(self.stored)}

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any], source: object) -> "Preprocessing":
        """Read what `to_metadata` gave, under "preprocessing".

        Raises:
            TrainerError: the metadata are not those of a run of train.py.
        """
        try:
            found = metadata["preprocessing"]
            height, width = found["stored"]
            return cls((height, width), found["image_size"], list(found["mean"]), list(found["std"]))
        except (KeyError, TypeError, ValueError) as error:
            raise TrainerError(
                f"{source} does not say how images become input: its metadata have no whole 'preprocessing'. "
                "Take an adapter that train.py wrote."
            ) from error
