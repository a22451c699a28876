"""Steps of Adam on prototypes whose gradient has a closed form."""

from __future__ import annotations

from collections.abc import Callable

import torch

from transclip_fast.methods.dense import in_blocks

SMALLEST = 1e-12  # of a probability in a logarithm

# Derivative of the entropy of a distribution by its entries, less what is the same for all.
Slope = Callable[[torch.Tensor], torch.Tensor]


def shannon_slope(p: torch.Tensor) -> torch.Tensor:
    """That of -sum p log p."""
    return -p.clamp_min(SMALLEST).log()


def alpha_slope(alpha: float) -> Slope:
    """That of (1 - sum p^alpha) / (alpha - 1); alpha 1 is Shannon's entropy."""
    if alpha == 1:
        return shannon_slope
    return lambda p: -alpha / (alpha - 1) * p ** (alpha - 1)


def to_logit_gradients(
    p: torch.Tensor, slope: Slope, weight: float, of_mean: torch.Tensor | None = None
) -> None:
    """
    Probabilities (N, K) to the gradient, by the logits, of weight mean_n H(p_n) - H(mean_n p_n).

    `slope` is that of H, and `of_mean` (K,) the mean of p; the second term is left out without it.
    In place.
    """
    common = None if of_mean is None else slope(of_mean).float()

    def part(rows: slice) -> None:
        block = p[rows]
        g = weight * slope(block)
        if common is not None:
            g -= common
        g -= (block * g).sum(1, keepdim=True)
        p[rows] = block * g / len(p)

    in_blocks(p, part)


def to_label_gradients(p: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Probabilities (M, K) to the gradient, by the logits, of the mean cross-entropy of labels (M,).

    In place; returned.
    """
    p[torch.arange(len(p), device=p.device), labels] -= 1
    return p.div_(len(p))


class Adam:
    """Adam with its usual constants: torch's takes seconds to import."""

    def __init__(self, start: torch.Tensor, rate: float) -> None:
        self._point, self._rate, self._steps = start, rate, 0
        self._mean, self._square = torch.zeros_like(start), torch.zeros_like(start)

    def step(self, gradient: torch.Tensor) -> torch.Tensor:
        """The point after a step against the gradient there, in float64."""
        self._steps += 1
        self._mean = 0.9 * self._mean + 0.1 * gradient
        self._square = 0.999 * self._square + 0.001 * gradient.square()
        root = (self._square / (1 - 0.999**self._steps)).sqrt() + 1e-8
        self._point = self._point - self._rate * self._mean / (1 - 0.9**self._steps) / root
        return self._point
