"""The average of what several sites learned, and how far it is from the average of their models.

FedAvg (McMahan et al. 2017, arXiv 1602.05629) averages parameters. A LoRA changes a weight by B·A, and the
mean of B times the mean of A is not the mean of B·A. Two ways round it:

- all sites have one A, which is frozen (FFA-LoRA, Sun et al. 2024, arXiv 2403.12313), for
  Σ wᵢ·Bᵢ·A = (Σ wᵢ·Bᵢ)·A;
- the products are averaged, and the r largest singular values of Σ wᵢ·Bᵢ·Aᵢ make a new B and A (as FlexLoRA
  does, Bai et al. 2024, arXiv 2402.11505). What is cut off is known.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medpeft.formulas.lora import LoRA

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Factors:
    """Where the two matrices of one LoRA are in a state.

    Attributes:
        down: name of A, (parts·rank, fan-in).
        up: name of B, (channels of all parts, rank).
        sizes: the channels of each part: one, or those of a fused projection that are adapted.
        rank: of each part.
    """

    down: str
    up: str
    sizes: tuple[int, ...]
    rank: int

    def parts(self, state: State) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the B (channels, rank) and A (rank, fan-in) of every part, in float64."""
        ups = state[self.up].double().split(self.sizes)
        downs = state[self.down].double().split(self.rank)
        yield from zip(ups, downs, strict=True)


def factors_of(model: nn.Module) -> list[Factors]:
    """List the LoRAs of an adapted model."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, LoRA):
            found.append(Factors(f"{name}.down", f"{name}.up", tuple(module.sizes), module.rank))
    return found


def mean(states: Sequence[State], weights: Sequence[float]) -> dict[str, Tensor]:
    """Average tensor by tensor, in float64; whole numbers are rounded.

    The variance of several sites together is more than the mean of their variances, for their means differ:
    BatchNorm's `running_var` becomes Σ wᵢ·(varᵢ + meanᵢ²) − (Σ wᵢ·meanᵢ)².
    """
    total = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in states[0].items()}
    for state, weight in zip(states, shares(weights), strict=True):
        for name, tensor in state.items():
            total[name] += weight * tensor.double()
            centre = mean_beside(name, state)
            if centre is not None:
                total[name] += weight * centre.double() ** 2
    for name in total:
        centre = mean_beside(name, total)
        if centre is not None:
            total[name] -= centre**2
    averaged = {}
    for name, tensor in states[0].items():
        value = total[name]
        if not tensor.is_floating_point():
            value = value.round()
        averaged[name] = value.to(tensor.dtype)
    return averaged


def mean_beside(name: str, state: State) -> Tensor | None:
    """Give the running mean that belongs to a running variance; None for any other name."""
    layer, _, own = name.rpartition(".")
    if own != "running_var":
        return None
    return state[f"{layer}.running_mean"]


def shares(weights: Sequence[float]) -> list[float]:
    """Scale weights so that their sum is 1."""
    return [weight / sum(weights) for weight in weights]


def refactored(
    states: Sequence[State], weights: Sequence[float], factors: Sequence[Factors]
) -> dict[str, Tensor]:
    """Average as `mean` does, but of every LoRA the product, cut to its rank: the nearest B·A there is."""
    averaged = mean(states, weights)
    for one in factors:
        ups, downs = [], []
        for parts in zip(*(one.parts(state) for state in states), strict=True):
            up, down = leading_factors(parts, shares(weights), one.rank)
            ups.append(up)
            downs.append(down)
        averaged[one.up] = torch.cat(ups).to(averaged[one.up].dtype)
        averaged[one.down] = torch.cat(downs).to(averaged[one.down].dtype)
    return averaged


def leading_factors(
    parts: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float], rank: int
) -> tuple[Tensor, Tensor]:
    """Give the B (out, rank) and A (rank, in) whose product is nearest to Σ wᵢ·Bᵢ·Aᵢ.

    The sum is [w₁B₁ … wₙBₙ]·[A₁; …; Aₙ], so an SVD of (n·rank)² numbers is enough. The rows of the new A have
    the length that they have on average at the sites: the next round learns B as fast as before.
    """
    up = torch.cat([weight * up for weight, (up, _) in zip(weights, parts, strict=True)], 1)
    down = torch.cat([down for _, down in parts])
    left, of_left = torch.linalg.qr(up)
    right, of_right = torch.linalg.qr(down.T)
    inner_left, values, inner_right = torch.linalg.svd(of_left @ of_right.T)
    kept = min(rank, len(values))
    length = down.norm(dim=1).mean()
    new_up = up.new_zeros(len(up), rank)
    new_down = down.new_zeros(rank, down.shape[1])
    new_up[:, :kept] = left @ inner_left[:, :kept] * values[:kept] / length
    new_down[:kept] = length * inner_right[:kept] @ right.T
    return new_up, new_down


def error(
    averaged: State, states: Sequence[State], weights: Sequence[float], factors: Sequence[Factors]
) -> float:
    """Compare the products B·A of an average with the average of the sites' products.

    Returns:
        ‖B·A − Σ wᵢ·Bᵢ·Aᵢ‖ / ‖Σ wᵢ·Bᵢ·Aᵢ‖, Frobenius norms over all LoRAs; 0 where there is no LoRA.
    """
    missed, whole = 0.0, 0.0
    for one in factors:
        of_sites = zip(*(one.parts(state) for state in states), strict=True)
        for (up, down), parts in zip(one.parts(averaged), of_sites, strict=True):
            exact = torch.zeros(len(up), down.shape[1], dtype=torch.float64)
            for weight, (own_up, own_down) in zip(shares(weights), parts, strict=True):
                exact += weight * own_up @ own_down
            missed += float((up @ down - exact).square().sum())
            whole += float(exact.square().sum())
    if whole == 0:
        return 0.0
    return float((missed / whole) ** 0.5)
