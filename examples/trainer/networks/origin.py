"""Where pretrained weights come from, and under which licence, as far as timm says."""

from typing import Any

from torch import nn

from ..settings import Settings

UNKNOWN = "not known to this program; look where they come from"


def licence_of(settings: Settings, model: nn.Module) -> str:
    """Give the licence of the pretrained weights, in words."""
    if settings.no_pretrained:
        return "none, they began at random"
    if settings.weights:
        return UNKNOWN
    return str(_config(model).get("license") or UNKNOWN)


def origin_of(settings: Settings, model: nn.Module) -> str:
    """Say where the weights come from."""
    if settings.no_pretrained:
        return f"random weights of {settings.model} (seed {settings.seed})"
    if settings.weights:
        return f"the file {settings.weights.name}"
    config = _config(model)
    tag, page = config.get("tag"), config.get("hf_hub_id") or config.get("url")
    text = settings.model
    if tag and tag not in text:
        text += f".{tag}"
    if page:
        text += f" ({page})"
    return text


def weights_of(settings: Settings, model: nn.Module) -> dict[str, str]:
    """Give `origin` and `licence` of the weights that training began with."""
    return {"origin": origin_of(settings, model), "licence": licence_of(settings, model)}


def _config(model: nn.Module) -> dict[str, Any]:
    found = getattr(model, "pretrained_cfg", None)
    return dict(found) if isinstance(found, dict) else {}
