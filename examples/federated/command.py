"""Train between sites that keep their images, and compare with each site alone, and all images in one place.

Offline, on patches of stained tissue that are split into three unequal sites; then on a folder with one
subfolder a class, or on a folder for each site:

    python examples/federated.py
    python examples/federated.py --data my/images --image-size 128 --rounds 12
    python examples/federated.py --site-data a/images b/images c/images

Flower simulates the sites on this machine; `flwr run` starts the same exchange on machines far apart
(docs/federated.md). It writes the adapters, rounds.csv and comparison.csv to --output.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from trainer.errors import TrainerError
from trainer.flags import spelled

import medpeft

# Before they are imported: both report their use to their makers otherwise, and medical networks are closed.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from flwr.app import ConfigRecordValues, Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from . import client
from .server import coordinate
from .settings import Settings
from .sites import Site, read_sites, together
from .training import make_model, predict, scores, train_round


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; give its exit status: 2 after bad input, 130 after an interruption."""
    words = sys.argv[1:] if given is None else list(given)
    try:
        run(parse(words))
    except (TrainerError, medpeft.MedpeftError) as error:
        print(f"federated.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def parse(words: Sequence[str]) -> Settings:
    """Read the settings of a command line."""
    parser = ArgumentParser(prog="federated.py", description=__doc__)
    parser.add_class_arguments(Settings, skip={"site_data"})
    parser.add_argument("--site_data", nargs="+", default=[], help="a folder of images for each site")
    values = dict(vars(parser.parse_args(spelled(words, Settings))))
    values["site_data"] = ",".join(str(Path(folder).resolve()) for folder in values["site_data"])
    return Settings.of(values)


def run(settings: Settings) -> pd.DataFrame:
    """Run the exchange on this machine, then the comparison; print and write the table."""
    output = Path(settings.output).resolve()
    data = str(Path(settings.data).resolve()) if settings.data else ""
    settings = replace(settings, output=str(output), data=data)
    sites, classes = read_sites(settings)
    print(describe(sites, classes), "\n", flush=True)
    simulate(settings)
    print("\n" + pd.read_csv(output / "rounds.csv").to_string(index=False, na_rep=""), "\n", flush=True)
    table = compare(settings, sites, classes)
    table.to_csv(output / "comparison.csv", index=False)
    print(table.to_string(index=False, float_format="{:.3f}".format))
    print(f"\n{output} has the adapters, rounds.csv and comparison.csv")
    return table


def describe(sites: Sequence[Site], classes: Sequence[str]) -> str:
    """Lay out how many images of every class each site trains and tests on."""
    rows = []
    for site in sites:
        row: dict[str, object] = {"site": site.name}
        for place, name in enumerate(classes):
            own = site.labels == place
            row[name] = f"{int((own & ~site.test).sum())} + {int((own & site.test).sum())}"
        rows.append(row)
    return f"Images, trained + tested on:\n{pd.DataFrame(rows).to_string(index=False)}"


def simulate(settings: Settings) -> None:
    """Run coordinator and sites on this machine, a processor and a share of the GPU for each site."""
    server = ServerApp()

    @server.main()
    def coordinator(grid: Grid, context: Context) -> None:
        coordinate(grid, settings)

    gpus = 0.0
    if torch.cuda.is_available():
        gpus = 1 / settings.sites
    config: dict[str, dict[str, ConfigRecordValues]] = {
        "client_resources": {"num_cpus": 1, "num_gpus": gpus},
        # Otherwise Ray joins whatever was started on this machine.
        "init_args": {"address": "local", "include_dashboard": False},
    }
    run_simulation(server, client.app, settings.sites, backend_config=config)


def compare(settings: Settings, sites: Sequence[Site], classes: list[str]) -> pd.DataFrame:
    """Score each site alone, the exchange, and all images in one place; at every site and all together."""
    rows = []
    for site in sites:
        model = trained(settings, site, classes)
        rows.append({"training": f"{site.name} alone", **row_of([model] * len(sites), sites, settings)})
    models = []
    for site in sites:
        model = make_model(settings, classes)
        models.append(medpeft.load(model, Path(settings.output) / "sites" / f"{site.name}.safetensors"))
    rows.append({"training": "federated", **row_of(models, sites, settings)})
    model = trained(settings, together(sites), classes)
    rows.append({"training": "pooled", **row_of([model] * len(sites), sites, settings)})
    return pd.DataFrame(rows)


def trained(settings: Settings, site: Site, classes: list[str]) -> nn.Module:
    """Train on one site alone, for as many epochs and at the same rates as in the exchange."""
    model = make_model(settings, classes)
    for number in range(1, settings.rounds + 1):
        train_round(model, site, settings, number)
    return model


def row_of(models: Sequence[nn.Module], sites: Sequence[Site], settings: Settings) -> dict[str, float]:
    """Score at each site the model that is used there, and all predictions together."""
    found: dict[str, float] = {}
    outputs: list[tuple[Tensor, Tensor]] = []
    for model, site in zip(models, sites, strict=True):
        pixels, labels = site.tested()
        outputs.append((predict(model, pixels, settings), labels))
    probabilities, labels = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    names = [site.name for site in sites]
    for name, output in zip([*names, "all"], [*outputs, (probabilities, labels)], strict=True):
        for score, value in scores(*output).items():
            found[f"{score} {name}"] = value
    return dict(sorted(found.items(), key=lambda item: item[0].split()[0], reverse=True))
