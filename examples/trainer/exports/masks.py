"""Answers that are a mask an image, written in the geometry of its file."""

from ..files.mask_files import mask_type
from ..tasks.segment import SLIDING, Segment
from .answers import Answer, Config, described_tensor


class Segmentations(Answer):
    """The structure of each pixel, by the values of the training's masks."""

    task_name = "Segmentation of images"

    @property
    def task(self) -> Segment:
        """The task, which knows the values and the patch."""
        assert isinstance(self.trained.task, Segment)
        return self.trained.task

    def output(self) -> Config:
        """Give one logit for background and structures, for every pixel."""
        channels = ["background", *self.task.names]
        return described_tensor("image", "labels", self.trained.network_shape, channels, self.patched())

    def patched(self) -> bool:
        """Say whether the network sees patches of the images."""
        return self.task.slides(self.trained.preprocessing.input_shape)

    def inferer(self) -> Config:
        """Give the window that slides over images that are larger than the patches."""
        if not self.patched():
            return super().inferer()
        return {"_target_": "SlidingWindowInferer", "roi_size": list(self.trained.network_shape), **SLIDING}

    def postprocessing(self) -> list[Config]:
        """Bring the logits to the pixels of the file, take the largest, and save its value."""
        values = self.task.details["values"]
        return [
            # `ToInputd.inverse` interpolates the logits (`on_grid`), and the inverse of the order moves them.
            {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image"},
            {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
            {
                "_target_": "MapLabelValued",
                "keys": "pred",
                "orig_labels": list(range(len(values) + 1)),
                "target_labels": [0, *values],
                "dtype": "$numpy.int32",
            },
            self._saving(),
        ]

    def _saving(self) -> Config:
        suffix = ".png"
        if self.trained.takes_volumes:
            suffix = ".nii.gz"
        return {
            "_target_": "SaveImaged",
            "keys": "pred",
            "output_dir": "@output_dir",
            "data_root_dir": "@dataset_dir",
            "output_postfix": "",
            "output_ext": suffix,
            "output_dtype": f"$numpy.{mask_type(self.task.details['values']).name}",
            "separate_folder": False,
            "resample": False,
            "print_log": False,
        }

    def what_is_written(self) -> str:
        """Say what the masks hold."""
        meanings = ["0 background"]
        for name, value in zip(self.task.names, self.task.details["values"], strict=True):
            meanings.append(f"{value} {name}")
        return f"Each image gets a mask of its name, on its own pixels: {', '.join(meanings)}."

    def what_the_network_gives(self) -> str:
        """Say what the channels are."""
        return (
            "a logit for the background and each structure, at every pixel of its input: the largest counts"
        )
