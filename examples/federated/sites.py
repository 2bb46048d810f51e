"""The images of every site: one data set split into unequal sites, or a folder for each."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor
from torchvision.transforms import v2
from trainer.data.rows import Images, read_images
from trainer.data.sources import rows_of
from trainer.errors import TrainerError
from trainer.files.images import Integers

from .settings import Settings

FOLDS = 5  # one of them is the test; so a site needs as many patients of each class
DRAWS = 1000  # of a split, until every site has them


@dataclass(frozen=True)
class Site:
    """The images of one site.

    Attributes:
        name: of the site.
        pixels: (N, 3, S, S), uint8.
        labels: (N,), positions among the classes of the exchange.
        test: (N,), whether an image is only tested on. No patient is on both sides.
    """

    name: str
    pixels: Tensor
    labels: Tensor
    test: Tensor

    def training(self) -> tuple[Tensor, Tensor]:
        """Give the pixels and labels that are trained on."""
        return self.pixels[~self.test], self.labels[~self.test]

    def tested(self) -> tuple[Tensor, Tensor]:
        """Give the pixels and labels that are tested on."""
        return self.pixels[self.test], self.labels[self.test]


def together(sites: Sequence[Site]) -> Site:
    """Pool the images of several sites; their parts stay as they are."""
    pixels = torch.cat([site.pixels for site in sites])
    labels = torch.cat([site.labels for site in sites])
    return Site("pooled", pixels, labels, torch.cat([site.test for site in sites]))


@lru_cache(maxsize=4)
def read_sites(settings: Settings) -> tuple[list[Site], list[str]]:
    """Read the images of all sites on one machine; give them with the names of the classes.

    Raises:
        TrainerError: the data cannot be read, or are too few for so many sites.
    """
    folders = (settings.site_data or settings.data).split(",")
    found = [read(folder, settings) for folder in folders]
    classes = named(settings) or sorted({name for images in found for name in images.classes})
    names = [chr(ord("A") + place) for place in range(settings.sites)]
    if settings.site_data:
        members = [np.arange(len(images)) for images in found]
    else:
        members = share_out(found[0], settings)
        found = found * settings.sites
    sites = []
    for name, images, own in zip(names, found, members, strict=True):
        sites.append(site_of(name, images, own, classes, settings))
    return sites, classes


@lru_cache(maxsize=1)
def read_site(name: str, folder: str, settings: Settings) -> tuple[Site, list[str]]:
    """Read the images of a site at that site.

    Raises:
        TrainerError: the data cannot be read, or the coordinator names no classes.
    """
    classes = named(settings)
    if not classes:
        raise TrainerError("Sites far apart need the names of the classes, in one order: set 'classes'.")
    images = read(folder, settings)
    return site_of(name, images, np.arange(len(images)), classes, settings), classes


def read(folder: str, settings: Settings) -> Images:
    """Read a folder as train.py does, or its default data."""
    training = settings.training(folder or None)
    return read_images(rows_of(training.data, training), training)


def named(settings: Settings) -> list[str]:
    """List the classes that the settings name."""
    return [name.strip() for name in settings.classes.split(",") if name.strip()]


def site_of(name: str, images: Images, own: Integers, classes: list[str], settings: Settings) -> Site:
    """Bring the images of a site to one form, and set a fifth of its patients apart for the test.

    Raises:
        TrainerError: it has a class that the others do not know, or too few patients of one.
    """
    for unknown in set(images.classes) - set(classes):
        raise TrainerError(f"Site {name} has the class {unknown!r}, and the exchange {', '.join(classes)}.")
    places = torch.tensor([classes.index(known) for known in images.classes])
    labels, groups = places[images.targets[torch.from_numpy(own)]], images.groups[own]
    for label in labels.unique().tolist():
        patients = len(np.unique(groups[labels.numpy() == label]))
        if patients < FOLDS:
            raise TrainerError(
                f"Site {name} has {patients} patients of {classes[label]}, and needs {FOLDS}. Add some, take "
                "fewer --sites, or, where one data set is split, a larger --concentration."
            )
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=settings.seed)
    _, tested = next(folds.split(labels, labels, groups))
    test = torch.zeros(len(labels), dtype=torch.bool)
    test[torch.from_numpy(tested)] = True
    to_form = v2.Compose([v2.Resize((settings.image_size, settings.image_size)), v2.RGB()])
    return Site(name, to_form(images.pixels[torch.from_numpy(own)]), labels, test)


def share_out(images: Images, settings: Settings) -> list[Integers]:
    """Give the positions of each site's images: sites of unequal size, with unequal shares of the classes.

    The sites' sizes are as 1 : 1/2 : 1/3 …; of every class each has a share that is drawn from a Dirichlet
    distribution around it (as in Hsu et al. 2019, arXiv 1909.06335). A patient is of the class of most of the
    images.

    Raises:
        TrainerError: in no draw every site has enough patients of every class.
    """
    rng = np.random.default_rng(settings.seed)
    sizes = 1 / np.arange(1, settings.sites + 1)
    labels = images.targets.numpy()
    groups = np.unique(images.groups)
    own_class = np.array([np.bincount(labels[images.groups == group]).argmax() for group in groups])
    for _ in range(DRAWS):
        site_of_group = np.zeros(len(groups), dtype=np.int64)
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(own_class == label))
            bounds = rng.dirichlet(settings.concentration * sizes / sizes.sum()).cumsum()[:-1]
            parts = np.split(members, (bounds * len(members)).round().astype(int))
            for site, part in enumerate(parts):
                site_of_group[part] = site
        counts = np.zeros((settings.sites, len(images.classes)))
        np.add.at(counts, (site_of_group, own_class), 1)
        if counts.min() >= FOLDS:
            of_image = site_of_group[np.searchsorted(groups, images.groups)]
            return [np.flatnonzero(of_image == site) for site in range(settings.sites)]
    raise TrainerError(
        f"In {DRAWS} draws no split has {FOLDS} patients of every class at each of {settings.sites} sites. "
        "Take fewer --sites, or a larger --concentration."
    )
