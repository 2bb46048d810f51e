"""Fine-tune with differential privacy: what is released tells next to nothing about any one training image.

python examples/private.py my/images      # without a folder: patches of stained tissue, offline

Images, model and split are those of `finetune.py`. Opacus (Yousefpour et al. 2021, arXiv 2109.12298) cuts the
gradient of every image to one length and adds noise to their sum (Abadi et al. 2016, arXiv 1607.00133).
"""

import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from finetune import BATCH_SIZE, DEVICE, SEED, evaluate, make_model, open_images, split, tissue_patches
from opacus import PrivacyEngine
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder

import medpeft

METHOD = "ssf"  # any of medpeft.methods(); the fewer numbers train, the less noise there is in all
EPOCHS = 10  # every one spends privacy
RATE = 3e-2
LENGTH = 1.0  # to which the gradient of every image is cut
NOISE = 1.1  # the noise's standard deviation, in units of that length: more noise, smaller ε
DELTA = 1e-3  # ε holds but for this probability, which should be well below one over the number of images
ADAPTER = Path("runs/private/adapter.safetensors")

# torch says so of every module whose input needs no gradient, and Opacus' hooks are meant for that.
warnings.filterwarnings("ignore", "Full backward hook is firing")
# Reproducible noise is fit for an example. For a release: PrivacyEngine(secure_mode=True), and no seed.
warnings.filterwarnings("ignore", "Secure RNG turned off")
warnings.filterwarnings("ignore", "Optimal order is the largest alpha")  # ε is then a little too high.


def main(folder: Path) -> None:
    """Adapt a model, train it privately, and test it."""
    torch.manual_seed(SEED)
    model = make_model(len(ImageFolder(folder).classes))
    images = open_images(folder, model)
    rows, _, test_rows = split(images)
    medpeft.apply(model.to(DEVICE), METHOD)
    print(medpeft.report(model), "\n")
    private = medpeft.private(model).train()
    engine = PrivacyEngine()
    trained, optimizer, loader = engine.make_private(
        module=private,
        optimizer=torch.optim.AdamW(medpeft.parameter_groups(model, lr=RATE)),
        data_loader=DataLoader(Subset(images, rows), BATCH_SIZE),  # Opacus draws its batches at random.
        noise_multiplier=NOISE,
        max_grad_norm=LENGTH,
    )
    for epoch in range(EPOCHS):
        private.train()
        for batch, labels in loader:
            loss = F.cross_entropy(trained(batch.to(DEVICE)), labels.to(DEVICE))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss:.3f}")
    ADAPTER.parent.mkdir(parents=True, exist_ok=True)
    medpeft.save(model, ADAPTER)
    f1, auroc = evaluate(model, DataLoader(Subset(images, test_rows), BATCH_SIZE))
    print(f"\ntest macro-F1 {f1:.3f}, AUROC {auroc:.3f}; {ADAPTER}: {ADAPTER.stat().st_size / 1024:.0f} KiB")
    print(f"ε = {engine.get_epsilon(DELTA):.2f} at δ = {DELTA:g}, for one of {len(rows)} training images")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else tissue_patches(Path("runs/private/images")))
