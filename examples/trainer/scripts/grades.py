"""Grades from the outputs of a network: output k says, of images above grade k - 1, whether they are above k.

Shi, Cao & Raschka, Deep neural networks for rank-consistent ordinal regression based on conditional
probabilities, 2021, equations 4 to 6.
"""

import torch
from torch import Tensor


def above_each(logits: Tensor) -> Tensor:
    """Give the probabilities (N, K - 1) of lying above each grade, falling from left to right."""
    return torch.sigmoid(logits).cumprod(1)


def grades_of(logits: Tensor) -> Tensor:
    """Give the predicted grades (N,): how many of them an image lies above, more likely than not."""
    return (above_each(logits) > 0.5).sum(1)


def probabilities_of(logits: Tensor) -> Tensor:
    """Give the probability (N, K) of each grade."""
    above = above_each(logits)
    certain, never = torch.ones_like(above[:, :1]), torch.zeros_like(above[:, :1])
    # P(grade k) = P(above k - 1) - P(above k)
    return torch.cat([certain, above], 1) - torch.cat([above, never], 1)


def grade_and_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Give for one image (K - 1,) its grade and, at a temperature, the probability of each: (1 + K,).

    A temperature is to change how sure a prediction is, and not the prediction, which was scored without one:
    a product of probabilities can cross 0.5 where they change, so the grade is that of the logits themselves.
    """
    # (K - 1,) → (1, K - 1)
    single = logits[None]
    return torch.cat([grades_of(single), probabilities_of(single / temperature)[0]])
