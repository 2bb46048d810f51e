"""Memory of training beside a quantised base: bytes of the weights, and the peak of a training step.

    python benchmarks/quantised.py
    python benchmarks/quantised.py --model dit --batch 2 --skip full

A ViT-L/16 of timm and a diffusion transformer of diffusers (the size of DiT-XL/2), with random weights. Every
case has a process of its own: a step with AdamW on a CPU, and its resident memory at the peak. Needs torchao
and bitsandbytes.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

import timm
import torch
from resident import forget_peak, give_back, peak, resident
from tables import markdown, write_json
from torch import Tensor, nn

import medpeft

MODELS = ("vit", "dit")
CASES = {
    "full": ("full", ""),
    "lora": ("lora", ""),
    "lora, int8 of torchao": ("lora", "torchao"),
    "lora, 8 bits of bitsandbytes": ("lora", "8 bits"),
    "lora, 4 bits of bitsandbytes": ("lora", "4 bits"),
}


def main() -> None:
    """Measure what the command line asks for and print a table."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--model", default="vit", choices=MODELS)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--skip", action="append", default=[], choices=CASES, help="repeatable")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images a step")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="write the rows to a file, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case:
        print(json.dumps(measure(args.model, args.case, args.batch)))
        return
    rows = []
    for case in CASES:
        if case in args.skip:
            continue
        command = [sys.executable, *sys.argv, "--case", case]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(answer.stdout.splitlines()[-1]))
        print(rows[-1], file=sys.stderr)
    write_json(args.json, {"model": args.model, "batch": args.batch, "rows": rows})
    lines = [(row["case"], f"{row['weights']:,}", f"{row['peak']:,}") for row in rows]
    print(markdown(("", "weights, MiB", "peak of a step, MiB"), lines))


def measure(model_name: str, case: str, batch: int) -> dict[str, Any]:
    """Measure one case, in MiB."""
    method, bits = CASES[case]
    give_back()
    empty = resident()
    model, inputs, head = build(model_name, batch)
    quantise(model, bits, kept=head)
    medpeft.apply(model, method, head=head)
    give_back()
    weights = resident() - empty
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    model.train()
    forget_peak()
    output = model(**inputs)
    if not isinstance(output, Tensor):
        output = output.sample
    output.square().mean().backward()
    optimizer.step()
    return {"case": case, "weights": round(weights / 2**20), "peak": round((peak() - empty) / 2**20)}


def build(name: str, batch: int) -> tuple[nn.Module, dict[str, Any], str]:
    """Build a model, inputs for it, and name its head."""
    if name == "vit":
        images = torch.randn(batch, 3, 224, 224)
        return timm.create_model("vit_large_patch16_224", num_classes=5), {"x": images}, "head"
    from diffusers import DiTTransformer2DModel

    latents = torch.randn(batch, 4, 32, 32)
    times, labels = torch.arange(batch), torch.zeros(batch, dtype=torch.long)
    model: Any = DiTTransformer2DModel(num_layers=28, num_attention_heads=16, attention_head_dim=72)
    inputs = {"hidden_states": latents, "timestep": times, "class_labels": labels}
    return model, inputs, "proj_out_2"


def quantise(model: nn.Module, bits: str, kept: str) -> None:
    """Quantise every linear layer of the model's blocks."""
    if bits == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(
            model, Int8WeightOnlyConfig(), filter_fn=lambda layer, name: is_wide(layer) and name != kept
        )
        return
    if not bits:
        return
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for name, layer in list(model.named_modules()):
        if not is_wide(layer) or name == kept:
            continue
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        if bits == "8 bits":
            packed: nn.Module = Linear8bitLt(*sizes, has_fp16_weights=False)
        else:
            packed = Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
        packed.load_state_dict(layer.state_dict())
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed.to("cpu"))  # Here it packs its weight.


def is_wide(layer: nn.Module) -> bool:
    """Whether a layer is a linear one of a block."""
    return isinstance(layer, nn.Linear) and layer.in_features >= 256


if __name__ == "__main__":
    main()
