"""Write the golden files: `python tests/golden/write.py`. Each is in the folder of the first schema that can say it.

Files that exist are left alone: that old ones stay readable is what they are there to show.
"""

from pathlib import Path

import torch
from model import base_of, example, fill
from safetensors.torch import load_file, save_file

import medpeft

HERE = Path(__file__).parent

CASES = {
    **{name: (name, {}) for name in medpeft.methods()},
    "bn_adapting": ("bn", {"batchnorm": "adapt"}),
    "conv_adapter_authors": ("conv_adapter", {"place": "authors", "activation": "backbone"}),
    "convpass_around": ("convpass", {"windows": "around"}),
    "fact_tucker": ("fact", {"rank": 2, "form": "tucker"}),
    "lst": ("lst", {"reduction": 2}),
    "lora_dora": ("lora", {"rank": 2, "dora": True}),
    "lora_everywhere": (
        {"lora": {"rank": 2, "alpha": 8, "rslora": True, "parts": "qkvo"}, "bias": {}},
        {"target": "*"},
    ),
    "lora_pissa": ("lora", {"rank": 2, "init": "pissa", "target": "linear"}),
    "svdiff_kept": ("svdiff", {"keep_svd": True, "norms": True}),
    "no_head": ("ssf", {"head": None}),
}

OF_SCHEMA_2 = {
    "lora_by_place": (
        {"lora": {"rank": {"*.qkv": 3, "*": 2}, "alpha": {"*.fc1": 4}, "parts": {"*.qkv": "v"}}},
        {"target": "linear"},
    ),
}


def write(folder, cases):
    """One file a case, and the outputs of all in `outputs.safetensors`."""
    folder.mkdir(exist_ok=True)
    outputs = folder / "outputs.safetensors"
    found = load_file(outputs) if outputs.exists() else {}
    for case, (method, options) in cases.items():
        if case in found:
            continue
        model = medpeft.apply(base_of(case), method, seed=3, **options).eval()
        changed = {name for name, p in model.named_parameters() if p.requires_grad}
        changed |= {name for name, _ in model.named_buffers() if options.get("batchnorm") == "adapt"}
        with torch.no_grad():
            before = {name: t.clone() for name, t in model.state_dict().items()}
            fill(model, start=7, only=changed)
            for name, tensor in model.state_dict(keep_vars=True).items():
                if name in changed and tensor.is_floating_point():
                    tensor.copy_(before[name] + 0.25 * tensor)
            found[case] = model(example())
        medpeft.save(
            model, folder / f"{case}.safetensors", metadata={"classes": ["a", "b", "c"], "case": case}
        )
    save_file(found, outputs)


if __name__ == "__main__":
    write(HERE / "schema1", CASES)
    write(HERE / "schema2", OF_SCHEMA_2)
