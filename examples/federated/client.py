"""The site's side of Flower: train on what lies here, and send what training changed."""

from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from trainer.errors import TrainerError

import medpeft

from .exchange import Terms, put
from .messages import arrays_of, record_of
from .settings import Settings
from .sites import Site, read_site, read_sites
from .training import make_model, predict, save, scores, train_round

LOCAL = "local"  # what stays at the site between two messages, in Flower's state of the node

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train for one round, from what all sites have in common and what is kept here."""
    settings, site, classes, _ = read_message(message, context)
    model = received(message, context, settings, classes)
    loss = train_round(model, site, settings, int(str(message.content["config"]["server-round"])))
    arrays, terms = medpeft.state(model, numpy=True), Terms.of(model, settings)
    sent = {name: arrays[name] for name in terms.sent}
    context.state[LOCAL] = record_of({name: arrays[name] for name in set(arrays) - set(terms.shared)})
    metrics = MetricRecord({"num-examples": int((~site.test).sum()), "loss": loss})
    about = ConfigRecord({"site": site.name, "base": terms.base})
    content = RecordDict({"arrays": record_of(sent), "metrics": metrics, "about": about})
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test what the exchange gave, with what is kept here; write the site's adapter, and send the scores."""
    settings, site, classes, folder = read_message(message, context)
    model = received(message, context, settings, classes)
    save(model, folder / "sites" / f"{site.name}.safetensors", classes, settings)
    pixels, labels = site.tested()
    found = scores(predict(model, pixels, settings), labels)
    metrics = MetricRecord({"num-examples": len(labels), **found})
    content = RecordDict({"metrics": metrics, "about": ConfigRecord({"site": site.name})})
    return Message(content, reply_to=message)


def read_message(message: Message, context: Context) -> tuple[Settings, Site, list[str], Path]:
    """Give the settings, this site's images, the names of the classes, and the folder for its results.

    A real site says itself where its images are and where to write, when its node starts; on one machine
    Flower numbers the sites, and the settings say so.

    Raises:
        TrainerError: the node lacks something, or its images cannot be read.
    """
    values = {name: value for name, value in message.content["config"].items() if name != "server-round"}
    settings, node = Settings.of(values), context.node_config
    if "data" in node:
        for name in ("site", "output"):
            if name not in node:
                raise TrainerError(f"The node has no {name!r}. Start it with --node-config '{name}=\"…\"'.")
        site, classes = read_site(str(node["site"]), str(node["data"]), settings)
        return settings, site, classes, Path(str(node["output"]))
    if "partition-id" not in node:
        raise TrainerError("The node has no 'data'. Start it with --node-config 'data=\"/a/folder\" …'.")
    sites, classes = read_sites(settings)
    return settings, sites[int(node["partition-id"])], classes, Path(settings.output)


def received(message: Message, context: Context, settings: Settings, classes: list[str]) -> nn.Module:
    """Build the model with what came and what was kept here."""
    model = make_model(settings, classes)
    parts = [arrays_of(message.content["arrays"])]
    if LOCAL in context.state:
        parts.append(arrays_of(context.state[LOCAL]))
    put(model, *parts)
    return model
