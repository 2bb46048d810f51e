"""Milliseconds before and after training: import, apply, save, load, swap, merge, remove.

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
from tables import markdown, write_json
from torch import nn

import medpeft

Times = dict[str, float]
"""Milliseconds by name of the call."""


def main() -> None:
    """Measure what the command line asks for and print a table."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm architecture")
    parser.add_argument("--method", action="append", help="repeatable (default: lora, ssf, bias, svdiff)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", metavar="FILE", help="write the rows to a file, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = f"{args.threads} threads, torch {torch.__version__}"
    print(f"{args.model}, {machine}, median of {args.repeats}, milliseconds\n")
    print(f"import medpeft, torch imported already: {import_time(args.repeats):.0f}")
    print(f"apply lora to vit_huge_patch14_224 on the meta device: {time_on_meta(args.repeats):.0f}\n")
    rows = {method: measure(args, method) for method in args.method or ("lora", "ssf", "bias", "svdiff")}
    if "vit" in args.model:
        rows |= measure_peft(args)
    write_json(args.json, {"model": args.model, "where": machine, "rows": rows})
    print(table(rows))


def table(rows: dict[str, Times]) -> str:
    """Lay out the times by method."""
    columns = list(next(iter(rows.values())))
    lines = []
    for method, times in rows.items():
        lines.append([method, *(f"{times[column]:,.0f}" for column in columns)])
    return markdown(["", *columns], lines)


def import_time(repeats: int) -> float:
    """Measure `import medpeft` in fresh processes that have torch already."""
    code = "import torch, time; t = time.perf_counter(); import medpeft; print(time.perf_counter() - t)"
    seconds = []
    for _ in range(repeats):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(float(run.stdout))
    return 1e3 * statistics.median(seconds)


def time_on_meta(repeats: int) -> float:
    """Measure the Python that applying LoRA to a ViT-H takes."""
    times = []
    for _ in range(repeats):
        with torch.device("meta"):
            model = timm.create_model("vit_huge_patch14_224", num_classes=3)
        times.append(timed(lambda model=model: medpeft.apply(model, "lora")))
    return statistics.median(times)


def timed(call: Callable[[], object]) -> float:
    """Measure the milliseconds of a call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def medians(rounds: list[Times]) -> Times:
    """Take the median of every call over the rounds."""
    middle = {}
    for name in rounds[0]:
        middle[name] = statistics.median(times[name] for times in rounds)
    return middle


def measure(args: argparse.Namespace, method: str) -> Times:
    """Measure everything around training with one method."""
    torch.manual_seed(0)
    state = timm.create_model(args.model, num_classes=3).state_dict()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.safetensors"
        rounds = [one_round(args, method, state, file) for _ in range(args.repeats)]
        size = file.stat().st_size
    return {**medians(rounds), "file, KiB": size / 1024}


def one_round(args: argparse.Namespace, method: str, state: dict[str, Any], file: Path) -> Times:
    """Measure each call once."""
    model = timm.create_model(args.model, num_classes=3).to(args.device)
    fresh = timm.create_model(args.model, num_classes=3).to(args.device)
    model.load_state_dict(state)
    fresh.load_state_dict(state)
    times = {}
    times["apply"] = timed(lambda: medpeft.apply(model, method))
    times["save"] = timed(lambda: medpeft.save(model, file))
    times["load into a fresh base"] = timed(lambda: medpeft.load(fresh, file))
    times["swap in place"] = timed(lambda: medpeft.load(model, file))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        times["merge"] = timed(lambda: medpeft.merge(fresh))
    times["remove"] = timed(lambda: medpeft.remove(model))
    return times


def measure_peft(args: argparse.Namespace) -> dict[str, Times]:
    """Measure the same with Hugging Face's peft; nothing if it is not installed."""
    try:
        import peft
    except ImportError:
        return {}
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=r".*\.qkv", modules_to_save=["head"])
    with tempfile.TemporaryDirectory() as folder:
        rounds = [_peft_round(peft, args, config, folder) for _ in range(args.repeats)]
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    return {"peft's lora on qkv": {**medians(rounds), "file, KiB": size / 1024}}


def _peft_round(peft: Any, args: argparse.Namespace, config: Any, folder: str) -> Times:
    """Measure each call of peft once."""
    base = timm.create_model(args.model, num_classes=3).to(args.device)
    fresh = timm.create_model(args.model, num_classes=3).to(args.device)
    models: list[nn.Module] = []

    def load() -> None:
        models.append(peft.PeftModel.from_pretrained(fresh, folder))

    def swap() -> None:
        peft.set_peft_model_state_dict(models[1], peft.load_peft_weights(folder))

    times = {}
    times["apply"] = timed(lambda: models.append(peft.get_peft_model(base, config)))
    model: Any = models[0]
    times["save"] = timed(lambda: model.save_pretrained(folder))
    times["load into a fresh base"] = timed(load)
    loaded: Any = models[1]
    times["swap in place"] = timed(swap)
    times["merge"] = timed(lambda: loaded.merge_and_unload())
    times["remove"] = timed(lambda: model.unload())
    return times


if __name__ == "__main__":
    main()
