"""The coordinator's side of Flower: send, check what arrives, average, and say how exact the average is."""

import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn
from trainer.errors import TrainerError

import medpeft

from .averaging import error, factors_of, mean, refactored
from .exchange import Terms, accept, put
from .messages import Arrays, arrays_of, record_of, site_of
from .settings import Settings
from .sites import named, read_sites
from .training import make_model, save

LOG = logging.getLogger("flwr")

# What a site's message can be wrong in.
FAULTS = (medpeft.MedpeftError, TrainerError, TypeError, ValueError, EOFError, KeyError)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run an exchange, as `flwr run` starts it."""
    coordinate(grid, Settings.of(context.run_config))


def coordinate(grid: Grid, settings: Settings) -> None:
    """Run all rounds; write the common adapter, and what came of every round and at every site.

    Raises:
        TrainerError: the settings make no sense, or a round has too few sites.
    """
    classes = named(settings)
    if not classes:
        _, classes = read_sites(settings)
    model = make_model(settings, classes)
    strategy = Exchange(model, settings)
    config = ConfigRecord(settings.message())
    while len(list(grid.get_node_ids())) < settings.sites:
        time.sleep(1)
    start = record_of(strategy.shared())
    strategy.start(grid, start, settings.rounds, settings.timeout, config, config)
    folder = Path(settings.output)
    save(model, folder / "adapter.safetensors", classes, settings)
    pd.DataFrame(strategy.rounds).to_csv(folder / "rounds.csv", index=False)
    pd.DataFrame(strategy.tested).to_csv(folder / "sites.csv", index=False)


class Exchange(FedAvg):
    """FedAvg that knows adapters: what arrives is checked, a LoRA is averaged as the settings say.

    A site whose state is refused, or that failed, is left out of that round, by name in the log and in
    rounds.csv; it takes part in the next. With fewer than `least` sites the round fails, and the exchange
    ends.

    Args:
        model: adapted; it holds the common state.
        settings: of the exchange.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        least = settings.least
        super().__init__(min_train_nodes=least, min_evaluate_nodes=least, min_available_nodes=least)
        self.model, self.settings, self.terms = model, settings, Terms.of(model, settings)
        self.rounds: list[dict[str, Any]] = []
        self.tested: list[dict[str, Any]] = []

    def summary(self) -> None:
        """Log what is special."""
        LOG.info("Average: %s; local: %s", self.settings.average, self.settings.local or "nothing")

    def shared(self) -> Arrays:
        """Give the common state."""
        state = medpeft.state(self.model, numpy=True)
        return {name: state[name] for name in self.terms.shared}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Average what the sites sent, as far as it is in order.

        Raises:
            TrainerError: of too few sites it is.
        """
        before = medpeft.state(self.model)
        arrived: dict[str, tuple[float, float, dict[str, Tensor]]] = {}
        refused = []
        for reply in sorted(replies, key=site_of):
            name = site_of(reply)
            try:
                if name in arrived:
                    raise TrainerError("another node has this name.")
                arrived[name] = self.checked(reply)
            except FAULTS as fault:
                refused.append(f"{name}: {fault}")
                LOG.warning("Round %d leaves out site %s", server_round, refused[-1])
        put(self.model, before)
        if len(arrived) < self.settings.least:
            raise TrainerError(
                f"Round {server_round} fails: {len(arrived)} sites are in order, and --least is "
                f"{self.settings.least}. {' '.join(refused)}"
            )
        weights = [weight for weight, _, _ in arrived.values()]
        errors = self.average([state for _, _, state in arrived.values()], weights)
        loss = sum(weight * own for weight, own, _ in arrived.values()) / sum(weights)
        names = {"sites": " ".join(arrived), "refused": "; ".join(refused)}
        self.rounds.append({"round": server_round, **names, "loss": loss, **errors})
        return record_of(self.shared()), MetricRecord({"loss": loss, **errors})

    def checked(self, reply: Message) -> tuple[float, float, dict[str, Tensor]]:
        """Give the weight, the loss and the state that a site sent.

        Raises:
            any of `FAULTS`: it failed, or what it sent is not in order.
        """
        if reply.has_error():
            raise TrainerError(reply.error.reason)
        content = reply.content
        metrics, about = content.metric_records["metrics"], content.config_records["about"]
        weight, loss = float(str(metrics["num-examples"])), float(str(metrics["loss"]))
        arrays = arrays_of(content.array_records["arrays"])
        return weight, loss, accept(self.model, self.terms, arrays, str(about["base"]), weight)

    def average(self, states: list[dict[str, Tensor]], weights: list[float]) -> dict[str, float]:
        """Bring the average into the model; give its error, and that of the mean of A and B."""
        factors = factors_of(self.model)
        averaged = plain = mean(states, weights)
        if self.settings.average == "products":
            averaged = refactored(states, weights, factors)
        put(self.model, averaged)
        return {
            "error_of_mean": error(plain, states, weights, factors),
            "error": error(averaged, states, weights, factors),
        }

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask for a test after the last round alone: a test that is looked at in every round chooses one."""
        if server_round < self.settings.rounds:
            return []
        return super().configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Keep the scores of every site; there is no mean of them, for sites differ in size and classes."""
        for reply in sorted(replies, key=site_of):
            if reply.has_error():
                LOG.warning("The test at %s failed: %s", site_of(reply), reply.error.reason)
                continue
            self.tested.append({"site": site_of(reply), **reply.content.metric_records["metrics"]})
        return None
