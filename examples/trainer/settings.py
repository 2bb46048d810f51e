"""Every setting of a run: its type, its default, what it means, and which go together.

jsonargparse makes the command line and the YAML file of this class.
"""

import hashlib
import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from .checks import check_data, check_run, check_task, check_values
from .errors import TrainerError
from .flags import flag, options_of, read_value
from .judging.thresholds import YOUDEN

DEFAULT = "tf_efficientnet_lite0"

# Peak learning rates that suit AdamW and a short schedule; a union takes the lowest of its parts. On breast
# ultrasound tsa learned nothing at 1e-3, oft and conv_adapter nothing at 3e-3, and lora did better at 9e-4
# than at three times that (docs/study.md). On half of the stained tissue three epochs of mona gave a
# validation macro-F1 of 0.37 at 3e-3, and of 0.76 at 3e-4.
RATES = {
    **dict.fromkeys(("full", "attention", "tsa", "oft", "conv_adapter", "mona"), 3e-4),
    "lora": 1e-3,
    "svdiff": 1e-2,
}
RATE = 3e-3

# What a run's result does not depend on.
FREE = ("output", "cache_features", "num_workers", "quiet", "no_figures", "logger", "accelerator", "export")


@dataclass(kw_only=True)
class Settings:
    """What a run depends on.

    Attributes:
        task: what is asked of an image: classify, one label; multilabel, findings that are there or not;
            ordinal, a grade; regress, a quantity; segment, which structure each pixel belongs to
        data: a folder with one subfolder a class, a table (.csv, .tsv), a MedMNIST .npz, or hf:NAME, a data
            set of Hugging Face by name or folder (default: patches of scikit-image's stained tissue)
        test_data: images of another site, in the form of `data`: the test, while `data` trains and validates
        path_column: of a table, names the image files; a suffix may be missing (default: path)
        label_column: of a table, names the class, the grade or the quantity, or of multilabel all findings as
            in Effusion|Edema (default: label)
        finding_column: of a table, for multilabel: a finding, 1 where it is there, 0 where it is not; may be
            repeated, and takes the place of --label-column
        missing: for multilabel, what an empty cell of a finding means
        uncertain: for multilabel, what -1 means
        grade: for ordinal, the grades from the lowest, where they are no numbers; may be repeated
        mask_column: of a table, for segment: names the files of the masks (default: mask)
        structure: for segment, the name of a structure, in the order of their values; may be repeated
        patient_column: of a table; one patient's images stay in one part (default: patient, if any)
        group_column: of a table, names subgroups such as sex: the test is scored for each
        volumes: read a folder of DICOM slices as one volume; without data, for segment, take a brain
        skip_broken: leave out images that cannot be read, instead of stopping
        masks: take X_mask.png beside X.png for an image too
        image_size: side in pixels
        patch_size: for segment: train on crops of that side, and predict by a window that slides
        num_workers: processes that augment; images are decoded once and kept in memory
        val_fraction: share of the images that choose the epoch
        test_fraction: share of the images that are tested on
        train_fraction: share of the training part to use, of every class; 0.1 lies within 0.25
        repeat: times that an epoch goes through the training images, for as many steps with fewer images
        k_folds: cross-validation, tested on one of K folds; 0 for none
        fold: the fold to test on, from 0
        model: a timm model, hf-hub:NAME or local-dir:PATH in timm's form, torchvision:NAME, or monai:NAME,
            which may be 3-d
        model_option: of the model, such as init_values=1e-5; may be repeated
        weights: a file of pretrained weights (.safetensors, .pth, .pt) for the model; nothing is downloaded
        input_mean: one, or as [0.5,0.4,0.3] of red, green and blue from 0 to 1 (default: the model's)
        input_std: likewise
        no_pretrained: begin with random weights
        method: a method of medpeft, or several as in bias+norm
        option: of the method, such as rank=4, in a union lora.rank=4; may be repeated
        target: layers to adapt, such as 'blocks.5.*' or attention; may be repeated (default: by method)
        exclude: layers to leave as they are; may be repeated
        depth: share of the model's blocks to adapt, from the last one: 0.25 for the last quarter
        head: name of the head, which trains as a whole (default: found)
        batchnorm: running statistics of BatchNorm (default: adapt for full, else frozen)
        epochs: at most
        patience: epochs without a better validation score before it stops
        batch_size: images of one optimizer step, over all devices and micro-batches
        accumulate: micro-batches of a step, for less memory
        lr: peak learning rate of AdamW; it warms up, then falls in a cosine (default: by method)
        weight_decay: of AdamW
        warmup: share of the steps in which the learning rate rises
        augment: flips, turns, shifts and changes of light of the training images (default: light)
        views: augmented views of each training image, which the epochs take in turn; 1 is the image itself
            (default: a new view every epoch, with --cache-features 1)
        class_weights: weight rare classes up in the loss
        balanced_sampler: draw every class equally often, with replacement
        threshold: rule for the operating point of each class, on the validation part: youden,
            sensitivity=0.95 or specificity=0.9
        coverage: share of images whose set of classes is to hold the true one (conformal prediction)
        seed: of split, head, adapters and batches
        cache_features: a folder for what the model computes before the first layer that trains: once, for
            every epoch and every later run
        feature_dtype: of these on the disk; 16 bits take half the room (default: as computed)
        accelerator: where it computes
        devices: how many; under torchrun, as many a node
        strategy: of several devices; ddp keeps the model on each, fsdp2 shards it (auto is ddp)
        precision: of the floats
        checkpoint_activations: compute activations again in the backward pass instead of keeping them
        memory: such as 6GiB: choose the depth, and whether activations are kept, by what fits into it
        compile: torch.compile the model
        logger: beside the CSV; may be repeated
        export: into the run's folder, also of a finished run: merged (plain weights), onnx, or bundle (of
            MONAI, for every task, images and NIfTI volumes); may be repeated
        output: folder of the results (default: runs/DATA-MODEL-METHOD-SEED-DIGEST)
        quiet: print nothing
        no_figures: draw nothing, which takes a second
    """

    task: Literal["classify", "multilabel", "ordinal", "regress", "segment"] = "classify"
    data: str | None = None
    test_data: str | None = None
    path_column: str | None = None
    label_column: str | None = None
    finding_column: list[str] = field(default_factory=list)
    missing: Literal["ignore", "negative"] = "ignore"
    uncertain: Literal["ignore", "negative", "positive"] = "ignore"
    grade: list[str] = field(default_factory=list)
    mask_column: str | None = None
    structure: list[str] = field(default_factory=list)
    patient_column: str | None = None
    group_column: str | None = None
    volumes: bool = False
    skip_broken: bool = False
    masks: bool = False
    image_size: int = 160
    patch_size: int | None = None
    num_workers: int = 0
    val_fraction: float = 0.15
    test_fraction: float | None = None
    train_fraction: float = 1.0
    repeat: int = 1
    k_folds: int = 0
    fold: int = 0
    model: str = DEFAULT
    model_option: dict[str, Any] = field(default_factory=dict)
    weights: Path | None = None
    input_mean: list[float] | None = None
    input_std: list[float] | None = None
    no_pretrained: bool = False
    method: str = "ssf"
    option: dict[str, Any] = field(default_factory=dict)
    target: list[str] | str | None = None
    exclude: list[str] | str | None = None
    depth: float = 1.0
    head: str | None = None
    batchnorm: Literal["frozen", "adapt"] | None = None
    epochs: int = 10
    patience: int = 5
    batch_size: int = 16
    accumulate: int = 1
    lr: float | None = None
    weight_decay: float = 0.01
    warmup: float = 0.1
    augment: Literal["none", "light", "strong"] | None = None
    views: int | None = None
    class_weights: bool = False
    balanced_sampler: bool = False
    threshold: str = YOUDEN
    coverage: float = 0.9
    seed: int = 0
    cache_features: Path | None = None
    feature_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = 1
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    checkpoint_activations: bool = False
    memory: str | None = None
    compile: bool = False
    logger: list[Literal["tensorboard", "wandb", "mlflow"]] = field(default_factory=list)
    export: list[Literal["merged", "onnx", "bundle"]] = field(default_factory=list)
    output: Path | None = None
    quiet: bool = False
    no_figures: bool = False

    def checked(self) -> "Settings":
        """Give settings with every default filled in; no image is read.

        Raises:
            TrainerError, medpeft.MedpeftError: a value makes no sense, or two do not go together.
        """
        option = options_of(self.method, self.option)
        rate = self.lr
        if rate is None:
            rate = min(RATES.get(name, RATE) for name in option)
        full = replace(
            self,
            option=option,
            lr=rate,
            test_fraction=_test_fraction(self),
            augment=_augment(self),
            model_option={name: read_value(value) for name, value in self.model_option.items()},
        )
        if full.task == "segment" and full.data is None and not full.structure:
            full.structure = ["grey matter", "white matter"] if full.volumes else ["stained"]
        check_values(full)
        check_data(full)
        check_task(full)
        check_run(full)
        if full.output is None:
            data = Path(full.data or "tissue").stem
            name = f"{data}-{full.model}-{full.method}-{full.seed}-{full.digest()}"
            full.output = Path("runs") / name.replace("/", "_").replace(":", "_")
        full.output = Path(full.output)
        # A file of settings has them as text.
        if full.weights is not None:
            full.weights = Path(full.weights)
        if full.cache_features is not None:
            full.cache_features = Path(full.cache_features)
        if full.output.exists() and not full.output.is_dir():
            raise TrainerError(f"--output {full.output} is a file. Name a folder.")
        return full

    def absolute(self) -> "Settings":
        """Give checked settings whose data and files are found from any working folder."""
        full = replace(self)
        if full.data is not None and not full.data.startswith("hf:"):
            full.data = str(Path(full.data).resolve())
        if full.test_data is not None and not full.test_data.startswith("hf:"):
            full.test_data = str(Path(full.test_data).resolve())
        if full.weights is not None:
            full.weights = full.weights.resolve()
        if full.cache_features is not None:
            full.cache_features = full.cache_features.resolve()
        return full

    def digest(self) -> str:
        """Name what the result depends on, in eight characters.

        What is at its default has no part in it: a setting of later date leaves the names of runs alone.
        """
        usual = type(self)().plain()
        changed = {k: v for k, v in self.plain().items() if k not in FREE and v != usual[k]}
        text = json.dumps(changed, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def plain(self) -> dict[str, Any]:
        """Give every setting as a plain value, for a file."""
        values = {}
        for own in fields(self):
            values[own.name] = getattr(self, own.name)
            if isinstance(values[own.name], Path):
                values[own.name] = str(values[own.name])
        return values

    def changes(self, before: dict[str, Any]) -> list[str]:
        """Describe the settings that differ from a file's in what the result depends on."""
        now, usual = json.loads(json.dumps(self.plain())), Settings().plain()
        # A setting that is younger than the file had its default.
        then = {name: before.get(name, usual[name]) for name in now}
        differing = [name for name in now if name not in FREE and then[name] != now[name]]
        return [f"{flag(name)} was {then[name]!r} and is {now[name]!r}" for name in differing]


def _test_fraction(settings: Settings) -> float:
    """Give the share of the test: 0.2, or none where the test comes from another site."""
    if settings.test_fraction is None:
        return 0.0 if settings.test_data else 0.2
    if settings.test_data and settings.test_fraction:
        raise TrainerError("--test-fraction has no use beside --test-data, which is the test. Leave one out.")
    return settings.test_fraction


def _augment(settings: Settings) -> Literal["none", "light", "strong"]:
    """Give the augmentation: of a single view of each image none, for that is the image itself."""
    augment, views = settings.augment, settings.views
    if views is None and settings.cache_features is not None:
        views = 1
    if views == 1:
        if augment in ("light", "strong"):
            raise TrainerError(
                f"--augment {augment} needs several views of each image, and --views is 1, as it is with "
                "--cache-features by default. Add --views 8, say."
            )
        return "none"
    if augment == "none" and views is not None:
        raise TrainerError(f"--views {views} of an image are all the same with --augment none.")
    return augment or "light"
