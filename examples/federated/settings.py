"""Every setting of an exchange: what the coordinator decides, and sends to the sites with every message."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from trainer.errors import TrainerError
from trainer.flags import flag, options_of
from trainer.settings import DEFAULT
from trainer.settings import Settings as Training

LOCAL = ("head", "batchnorm")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an exchange depends on. Lists are texts with commas, since Flower's settings hold no lists.

    Attributes:
        data: on one machine: a folder with one subfolder a class, which is split into sites (default:
            patches of scikit-image's stained tissue)
        site_data: on one machine: a folder of that form for each site
        classes: their names, in the order of the model's outputs (default: those of the data)
        sites: how many take part
        concentration: of the Dirichlet distribution by which the classes fall to the sites: the larger, the
            more alike they are
        image_size: side in pixels
        model: as for train.py
        no_pretrained: begin with random weights
        method: a method of medpeft
        option: of the method, such as rank=8,alpha=16 (default: for lora, rank=4)
        average: mean, of every parameter apart; products, of LoRA's B·A, cut to the rank; or frozen_a, the
            mean where all sites have one A, which is not trained
        local: what stays at its site: head, batchnorm, or both as head,batchnorm
        batchnorm: running statistics of BatchNorm
        rounds: of training at the sites and averaging
        epochs: of a round
        batch_size: images of a step
        lr: learning rate of AdamW in the first round; it falls in a cosine over the rounds (default: 0, by
            method)
        weight_decay: of AdamW
        augment: flips, turns, shifts and changes of light of the training images
        timeout: seconds that a round waits for the sites
        least: a round fails with fewer sites than that
        seed: of the split into sites and parts, the head, the adapters, the order of images
        output: folder of the results
    """

    data: str = ""
    site_data: str = ""
    classes: str = ""
    sites: int = 3
    concentration: float = 5.0
    image_size: int = 64
    model: str = DEFAULT
    no_pretrained: bool = False
    method: str = "lora"
    option: str = ""
    average: Literal["mean", "products", "frozen_a"] = "products"
    local: str = ""
    batchnorm: Literal["frozen", "adapt"] = "frozen"
    rounds: int = 5
    epochs: int = 1
    batch_size: int = 16
    lr: float = 0.0
    weight_decay: float = 0.01
    augment: Literal["none", "light", "strong"] = "light"
    timeout: float = 3600.0
    least: int = 2
    seed: int = 0
    output: str = "runs/federated"

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Settings":
        """Read what Flower brought: the settings of a run, or of a message.

        Raises:
            TrainerError: they are not all settings, or make no sense.
        """
        try:
            return cls(**values).checked()
        except TypeError as error:
            raise TrainerError(f"The settings are not those of this example: {error}") from error

    def checked(self) -> "Settings":
        """Fill in the folders' number of sites; raise a TrainerError for what makes no sense."""
        settings = self
        if self.site_data:
            settings = replace(self, sites=len(self.site_data.split(",")))
        for name in ("sites", "least", "rounds", "epochs", "batch_size"):
            if getattr(settings, name) < 1:
                raise TrainerError(f"{flag(name)} is {getattr(settings, name)}; it must be at least 1.")
        if settings.least > settings.sites:
            raise TrainerError(f"--least is {settings.least}, and there are {settings.sites} sites.")
        for name in settings.kept:
            if name not in LOCAL:
                raise TrainerError(
                    f"--local has {name!r}, and only {' and '.join(LOCAL)} can stay at a site."
                )
        if settings.average != "mean" and settings.method != "lora":
            raise TrainerError(
                f"--average {settings.average} is for --method lora alone. Take --average mean for "
                f"{settings.method}."
            )
        if settings.average == "products" and settings.options["lora"].get("dora"):
            raise TrainerError(
                "--average products averages B·A, and DoRA's norm is no part of it. Take --average mean."
            )
        return settings

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        """The options of the method by its name."""
        given = {}
        for pair in filter(None, (self.option or "").split(",")):
            name, _, value = pair.partition("=")
            given[name] = value
        if self.method == "lora":
            given = {"rank": "4", **given}
        options = options_of(self.method, given)
        if self.average == "frozen_a":
            options["lora"]["freeze_a"] = True
        return options

    @property
    def kept(self) -> list[str]:
        """What stays at its site."""
        return [name for name in self.local.split(",") if name]

    def training(self, data: str | None = None) -> Training:
        """Give what train.py's code needs to read images and to build the model."""
        return Training(
            data=data,
            model=self.model,
            no_pretrained=self.no_pretrained,
            image_size=self.image_size,
            method=self.method,
            option=self.options,
            batchnorm=self.batchnorm,
            lr=self.lr or None,
            seed=self.seed,
            output=None,
        ).checked()

    def message(self) -> dict[str, Any]:
        """Give the settings as Flower sends them."""
        return asdict(self)
