"""What comes before and after training: import, apply, save, load, swap, merge, remove, in milliseconds, beside peft's.

python benchmarks/start.py
python benchmarks/start.py --model vit_large_patch16_224 --method lora --method ssf
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import medpeft


def main() -> None:
    """Measure what the command line asks for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm architecture")
    parser.add_argument("--method", action="append", help="repeatable (default: lora, ssf, bias, svdiff)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.model}, {args.threads} threads, torch {torch.__version__}, median of {args.repeats}, milliseconds\n")
    print(f"import medpeft, torch imported already: {import_time(args.repeats):.0f}")
    print(f"apply lora to vit_huge_patch14_224 on the meta device: {on_meta(args.repeats):.0f}\n")
    rows = [measure(args, method) for method in args.method or ("lora", "ssf", "bias", "svdiff")]
    rows += [row for row in [with_peft(args)] if row]
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |\n|---|" + "--:|" * (len(columns) - 1))
    for row in rows:
        print("| " + " | ".join(_text(row.get(column)) for column in columns) + " |")


def import_time(repeats: int) -> float:
    """Milliseconds of `import medpeft` in a fresh process that has torch already."""
    code = "import torch, time; t = time.perf_counter(); import medpeft; print(time.perf_counter() - t)"
    run = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(repeats)]
    return 1e3 * statistics.median(float(done.stdout) for done in run)


def on_meta(repeats: int) -> float:
    """Milliseconds of Python that applying LoRA to a ViT-H takes."""
    found = []
    for _ in range(repeats):
        with torch.device("meta"):
            model = timm.create_model("vit_huge_patch14_224", num_classes=3)
        found.append(timed(lambda model=model: medpeft.apply(model, "lora")))
    return statistics.median(found)


def timed(call: Callable[[], object]) -> float:
    """Milliseconds of a call."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def measure(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """Median milliseconds of everything around training with one method."""
    torch.manual_seed(0)
    state = timm.create_model(args.model, num_classes=3).state_dict()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.safetensors"
        rounds = [one_round(args, method, state, file) for _ in range(args.repeats)]
        size = file.stat().st_size
    row = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    return {"": method, **row, "file, KiB": size / 1024}


def one_round(args: argparse.Namespace, method: str, state: dict[str, Any], file: Path) -> dict[str, float]:
    """Milliseconds of each call."""
    models = [timm.create_model(args.model, num_classes=3) for _ in range(2)]
    for model in models:
        model.load_state_dict(state)
    model, fresh = models
    found = {"apply": timed(lambda: medpeft.apply(model, method)), "save": timed(lambda: medpeft.save(model, file))}
    found["load into a fresh base"] = timed(lambda: medpeft.load(fresh, file))
    found["swap in place"] = timed(lambda: medpeft.load(model, file))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found["merge"] = timed(lambda: medpeft.merge(fresh))
    found["remove"] = timed(lambda: medpeft.remove(model))
    return found


def with_peft(args: argparse.Namespace) -> dict[str, Any] | None:
    """The same with Hugging Face's peft, where it is installed and the model is a ViT."""
    try:
        import peft
    except ImportError:
        return None
    if "vit" not in args.model:
        return None
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=r".*\.qkv", modules_to_save=["head"])
    with tempfile.TemporaryDirectory() as folder:
        rounds = [_peft_round(peft, args, config, folder) for _ in range(args.repeats)]
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    row = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    return {"": "peft's lora on qkv", **row, "file, KiB": size / 1024}


def _peft_round(peft: Any, args: argparse.Namespace, config: Any, folder: str) -> dict[str, float]:
    first, second = (timm.create_model(args.model, num_classes=3) for _ in range(2))
    held: list[nn.Module] = []
    found = {"apply": timed(lambda: held.append(peft.get_peft_model(first, config)))}
    model: Any = held[0]
    found["save"] = timed(lambda: model.save_pretrained(folder))
    found["load into a fresh base"] = timed(lambda: held.append(peft.PeftModel.from_pretrained(second, folder)))
    loaded: Any = held[1]
    found["swap in place"] = timed(lambda: peft.set_peft_model_state_dict(loaded, peft.load_peft_weights(folder)))
    found["merge"] = timed(lambda: loaded.merge_and_unload())
    found["remove"] = timed(lambda: model.unload())
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else f"{value:,.0f}"


if __name__ == "__main__":
    main()
