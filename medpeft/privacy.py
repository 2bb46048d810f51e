"""Differential privacy with Opacus: an adapted model as one layer that knows the gradient of every image.

Opacus computes the gradient of each image layer by layer, from what hooks see of a layer's input and output.
Of an adapter they do not see enough: many have two inputs, many act where nobody calls them, and some share
parameters. So the model computes these gradients itself, for whatever method. Every image gets trainable
parameters of its own, which are expanded views of the model's, and `torch.func.vmap` runs all images at
once. One ordinary backward then ends in one gradient for each image, also with dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .adapters.aside import require_acting
from .adapters.record import Adapted
from .errors import MedpeftError, listed, require

_MODE = "Opacus trains it in its default mode alone: pass grad_sample_mode='hooks', or nothing."
"""What to do in the other modes, which copy the parameters, or ask for norms of gradients alone."""


class _Pending(NamedTuple):
    """A forward whose backward has not come yet: its output, and the parameters of every image."""

    output: Tensor
    parameters: list[Tensor]


class Private(nn.Module):
    """An adapted model as Opacus trains it: one layer whose parameters are all that trains.

    Made by `medpeft.private`. It has no state of its own: `model` is the adapted model, for `medpeft.save`
    and all other calls.

    Examples:
        >>> import medpeft, torch
        >>> model = medpeft.apply(torch.nn.Sequential(torch.nn.Linear(4, 2)), "bias", head=None)
        >>> medpeft.private(model).model is model
        True

    Attributes:
        model: The adapted model. It is not registered, so that Opacus does not look into it.
    """

    model: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["model"] = model
        self._pending: _Pending | None = None
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.register_parameter(_registered(name), parameter)
        super().train(model.training)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run the model; in training under Opacus so that the gradient of every image can be had.

        Args:
            inputs: Tensors of which each has one entry an image along its first axis.

        Raises:
            MedpeftError: see `medpeft.private`; or in training, the call is within `medpeft.disabled`,
                `scaled` or `merged`, where what trains does not act as it is.
        """
        trained = self._trained()
        output: Tensor
        if not self.training or not torch.is_grad_enabled() or not _is_watched(trained):
            output = self.model(*inputs)
            return output
        require_acting(Adapted.of(self.model), "Differentially private training")
        require(
            self._pending is None,
            "The output of the forward before was not used in a backward. In differentially private training "
            "every forward is followed by its backward: evaluate in eval mode or under torch.no_grad(). "
            "After a step that was broken off, call train(), which gives its forward up.",
        )
        for tensor in inputs:
            require(
                isinstance(tensor, Tensor) and tensor.ndim > 0 and len(tensor) == len(inputs[0]),
                "The inputs of a differentially private model are tensors with one entry an image each.",
            )
        self._pending = self._run_each(trained, inputs)
        return self._pending.output.detach().requires_grad_()

    def _trained(self) -> dict[str, nn.Parameter]:
        """Map what trains by its name in the model.

        Raises:
            MedpeftError: it is not what is registered here, so the caller works on other values.
        """
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        same = len(trained) == len(self._parameters)
        for name, parameter in trained.items():
            same = same and self._parameters.get(_registered(name)) is parameter
        require(
            same,
            "Other parameters train than when medpeft.private was called, or other tensors are in their "
            f"place: call medpeft.private after everything else that changes the model. {_MODE}",
        )
        return trained

    def _run_each(self, trained: dict[str, nn.Parameter], inputs: tuple[Tensor, ...]) -> _Pending:
        """Run the model on each image with parameters of its own."""
        images = len(inputs[0])
        parameters: dict[str, Tensor] = {}
        for name, parameter in trained.items():
            own = parameter.detach().expand(images, *parameter.shape)  # (…) → (B, …), without a copy
            parameters[name] = own.requires_grad_()
        if images == 0:  # Drawn at random, a batch can be empty; vmap and some models cannot.
            with torch.no_grad():
                alone = [tensor.new_zeros(1, *tensor.shape[1:]) for tensor in inputs]
                output = _require_tensor(self.model(*alone))[:0]
            return _Pending(output, list(parameters.values()))

        def run(own: dict[str, Tensor], *image: Tensor) -> Tensor:
            alone = tuple(tensor[None] for tensor in image)  # (C, H, W) → (1, C, H, W)
            return _require_tensor(torch.func.functional_call(self.model, own, alone))[0]

        # A CPU's faster kernel of attention has no rule for vmap, and would run image by image. On a GPU the
        # plain one is taken too, so that the gradients are those of the same formula everywhere.
        with sdpa_kernel(SDPBackend.MATH):
            output = torch.func.vmap(run, randomness="different")(parameters, *inputs)
        return _Pending(output, list(parameters.values()))

    def gradients(self, backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        """Compute the gradient of every image, (B, …), by parameter, from that of the output, (B, …)."""
        pending, self._pending = self._pending, None
        assert pending is not None  # Opacus asks once for each forward, and refuses one that was given up.
        own = pending.parameters
        if len(backprops) == 0:
            gradients: Any = [torch.zeros_like(tensor) for tensor in own]
        else:
            gradients = torch.autograd.grad(pending.output, own, backprops, materialize_grads=True)
        return dict(zip(self.parameters(), gradients, strict=True))

    def train(self, mode: bool = True) -> Private:
        """Switch the model between training and evaluation; a forward without a backward is given up."""
        super().train(mode)
        self.model.train(mode)
        self._give_up()
        return self

    def _give_up(self) -> None:
        """Forget a forward whose backward did not come, or not to its end, and what Opacus noted of it."""
        self._pending = None
        for name in ("activations", "max_batch_len"):
            self.__dict__.pop(name, None)
        for parameter in self.parameters():
            parameter.__dict__.pop("_current_grad_sample", None)
            if "_forward_counter" in parameter.__dict__:
                parameter.__dict__["_forward_counter"] = 0

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Private:
        """Convert or move the model; torch puts the new values into the same parameters."""
        self.model._apply(fn, recurse)
        return self


def private(model: nn.Module) -> Private:
    """Make an adapted model one that Opacus' `PrivacyEngine.make_private` can train, whatever the method.

    The optimizer may be built from either, since both have the same parameters. Train what
    `make_private` returns; save, check and merge `model` itself. Needs the extra `medpeft[private]`.

    Args:
        model: A model after `apply`, with everything that is to train. It takes tensors whose first axis is
            that of the images, and returns one such tensor.

    Returns:
        A module that computes what the model computes.

    Raises:
        MedpeftError: nothing was applied or trains; BatchNorm adapts to the images of a batch; Opacus is not
            installed. In training: a forward without a backward, or an output that is not one tensor.

    Examples:
        >>> import medpeft, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> private = medpeft.private(medpeft.apply(model, "lora", rank=2, target="0", head="2"))
        >>> sum(parameter.numel() for parameter in private.parameters())
        42
    """
    record = Adapted.of(model).record
    if record.statistics:
        raise MedpeftError(
            f"The BatchNorm statistics {listed(record.statistics, most=1)} adapt to all images of a batch, "
            "so no image has a gradient of its own, and they are not private: apply with batchnorm='frozen'."
        )
    require(any(p.requires_grad for p in model.parameters()), "Nothing trains: see medpeft.report(model).")
    try:
        from opacus.grad_sample.utils import register_grad_sampler, register_norm_sampler
    except ImportError as error:
        raise MedpeftError(
            f"medpeft.private needs Opacus ({error}): pip install 'medpeft[private]'."
        ) from error
    register_grad_sampler(Private)(_sample_gradients)
    register_norm_sampler(Private)(_refuse_norms)
    return Private(model)


def _sample_gradients(
    module: Private, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Answer Opacus, which asks for the gradients of every image in the backward of a module."""
    return module.gradients(backprops)


def _refuse_norms(
    module: Private, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Raise `MedpeftError` where ghost clipping asks for the norms of gradients alone."""
    raise MedpeftError(_MODE)


def _registered(name: str) -> str:
    """Name under which a parameter of the model is registered; torch allows no dots."""
    return f"model/{name.replace('.', '/')}"


def _is_watched(trained: dict[str, nn.Parameter]) -> bool:
    """Whether Opacus collects gradients of every image now."""
    return any(hasattr(parameter, "grad_sample") for parameter in trained.values())


def _require_tensor(output: Any) -> Tensor:
    """Return the model's output for one image if it is one tensor with one entry.

    Raises:
        MedpeftError: it is something else.
    """
    if isinstance(output, Tensor) and output.ndim > 0 and len(output) == 1:
        return output
    raise MedpeftError(
        f"The model returns {type(output).__name__} in place of one tensor with an entry an image, (B, …): "
        "put it into a module that returns its logits, and apply to that module."
    )
