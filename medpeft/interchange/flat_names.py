"""Names of layers as kohya's files write them: the model's, or the original ones, with underscores for dots.

"down_blocks_0_attentions_0_proj_in" does not say where its dots were. So every layer of the model is written
in this way, and a name from a file is looked up among them. Layers have further names there:

- those of the original implementation of Stable Diffusion, by which SDXL's files name the layers of the UNet;
- those below `text_model`, where a text encoder of transformers 5 has no module of this name any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from ..architecture.layers import kind_of

# Layers of a residual block, and those around the blocks: diffusers' names and the original ones.
_IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_AROUND = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}

# What a name that is not in the model may be a name of.
_LAYOUTS = {
    "input_blocks": "the original names of Stable Diffusion's UNet",
    "middle_block": "the original names of Stable Diffusion's UNet",
    "output_blocks": "the original names of Stable Diffusion's UNet",
    "double_blocks": "the original names of Flux",
    "single_blocks": "the original names of Flux",
    "joint_blocks": "the original names of Stable Diffusion 3",
    "down_blocks": "diffusers' names of a UNet",
    "transformer_blocks": "diffusers' names of a transformer",
    "text_model": "the names of a CLIP text encoder",
}


def flat(name: str) -> str:
    """Write a name as kohya's files do."""
    return name.replace(".", "_")


def spelling(model: nn.Module, name: str) -> str:
    """Write the name of a layer for a file, where a text encoder's layers lie below `text_model`."""
    if _lacks_text_model(model):
        name = f"text_model.{name}"
    return flat(name)


def layers_by_key(model: nn.Module) -> dict[str, list[str]]:
    """List the layers that a name in a file may mean; more than one where the model's own names collide."""
    layers: dict[str, list[str]] = {}
    original = dict(_original_places(model))
    for name, module in model.named_modules():
        if not kind_of(module):
            continue
        for key in {flat(name), spelling(model, name), *_original(name, original)}:
            layers.setdefault(key, []).append(name)
    return layers


def layout_of(keys: Iterable[str]) -> str:
    """Name the layout by which names in a file go; "" if it is not known."""
    for key in keys:
        for piece, layout in _LAYOUTS.items():
            if piece in key:
                return layout
    return ""


def _lacks_text_model(model: nn.Module) -> bool:
    """Whether the model is a CLIP text encoder without the module `text_model` of earlier releases."""
    return {"embeddings", "encoder", "final_layer_norm"} <= set(model._modules)


def _original(name: str, places: dict[str, str]) -> Iterator[str]:
    """Yield the original name of a layer of a UNet, if it has one."""
    words = name.split(".")
    for length in range(len(words), 0, -1):
        place = places.get(".".join(words[:length]))
        if place is None:
            continue
        rest = ".".join(words[length:])
        if ".resnets." in f".{name}":
            rest = _IN_RESNET.get(rest, rest)
        yield flat(f"{place}.{rest}".rstrip("."))
        return


def _original_places(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield blocks and layers of diffusers' UNet with their original names; nothing of another model."""
    down, up = model._modules.get("down_blocks"), model._modules.get("up_blocks")
    if down is None or up is None:
        return
    yield from _AROUND.items()
    number = 1
    for i, block in enumerate(down.children()):
        for j in range(len(getattr(block, "resnets", ()))):
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{number}.0"
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{number}.1"
            number += 1
        if getattr(block, "downsamplers", None):
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for i, block in enumerate(up.children()):
        for j in range(len(getattr(block, "resnets", ()))):
            yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{number}.0"
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{number}.1"
            number += 1
        if getattr(block, "upsamplers", None):
            place = 1 + hasattr(block, "attentions")
            yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{number - 1}.{place}.conv"
