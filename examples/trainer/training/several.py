"""Several copies of what trains in a model, on one frozen trunk that is computed once for all of them."""

import warnings

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap


class Several(nn.Module):
    """Copies of an adapted model that have nothing of their own but what trains.

    `torch.func.vmap` runs the model on the tensors of all copies at once: what none of them reaches, it
    computes once, and the rest for each. Where the model draws at random, all copies get the same.

    Args:
        model: after `medpeft.apply`; its own trainable tensors stay as they are.
        count: of the copies, which begin alike.

    Attributes:
        names: of what trains in the model.
        copies: for each copy these tensors, in the same order.
        running: the copies that a forward runs.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__()
        self.model = model
        trained = self.trained()
        self.names = list(trained)
        self.copies = nn.ModuleList()
        for _ in range(count):
            self.copies.append(nn.ParameterList([own.detach().clone() for own in trained.values()]))
        self.running = list(range(count))

    def forward(self, images: Tensor) -> Tensor:
        """Give the outputs (K, B, …) of the running copies for images (B, …)."""
        tensors: dict[str, list[Tensor]] = {name: [] for name in self.names}
        for number in self.running:
            for name, own in self.own(number).items():
                tensors[name].append(own)
        stacked = {}
        for name, several in tensors.items():
            stacked[name] = torch.stack(several)  # K of (…) → (K, …)

        def run(own: dict[str, Tensor]) -> Tensor:
            output: Tensor = functional_call(self.model, own, (images,))
            return output

        with warnings.catch_warnings():
            # Of attention's kernel for CPUs, which it runs once for each copy. That is what it takes, and the
            # trunk, which runs once, keeps the kernel.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            outputs: Tensor = vmap(run, randomness="same")(stacked)
        return outputs

    def own(self, number: int) -> dict[str, Tensor]:
        """Give what trains in a copy, by its name in the model."""
        return dict(zip(self.names, self.copies[number].parameters(), strict=True))

    def trained(self) -> dict[str, nn.Parameter]:
        """Give what trains in the model itself, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def put(self, values: dict[str, Tensor]) -> None:
        """Write values into what trains in the model itself."""
        for name, parameter in self.trained().items():
            parameter.copy_(values[name])
