"""
The class cost: a charge for each class in use, where few of the K classes occur.

TransCLIP takes all classes to be about equally frequent. Where few of them occur, the others take
rows away from these. Here each class of mass n_k = sum_i z_ik adds w beta n_k / (n_k + beta) to L,
a soft count of the classes in use. It is concave in n, so its tangent at the n of the step before
bounds it from above (majorise-minimise): a constant per class in the score.

All of it is decided without labels. y_hat is what zero-shot predicts; a text that is too soft, as
of a small logit scale, also spreads over classes that do not occur. So it is sharpened to y_hat^T,
T >= 1 the least with which its mean confidence is the share of neighbours that have the same
zero-shot label: that is about how often zero-shot is right. With K_eff(z) = exp(H(mean_i z_i)), the
classes over which z spreads, "auto" charges for classes where K_eff(y_hat^T) < 0.8 K. What they
cost depends on K_eff of z after some sweeps from y_hat^T alone. With r = min(1, N / 8 K_eff), 1
where a class in use has 8 rows or more:

    w = (1 - K_eff / 0.8 K)^(2 - r) (60 + 60 r) d / 512 nats,  beta = max(1, 0.05 N / K_eff) rows.

A weak text spreads over few classes, too, where all of them occur; the cost then merges classes. So
down to K_eff = 0.25 K "auto" solves without and with it, and keeps the labels with the larger

    share of neighbours that have the same label + 0.1 H(class sizes).

So a nat of entropy may part at most a tenth of the neighbours: where a cost merges classes of
images, its lack parts fewer; where few occur and its lack splits them, it parts more. The solve
with a cost comes second, and ends after four steps if it is behind by more than 0.01.

`bench.accuracy.wild` measures it where few of the classes occur, and where all of them do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

FEW_CLASSES = 0.8  # share of the classes over which y_hat spreads where "auto" begins to charge
SURELY_FEW = 0.25  # share below which "auto" charges without solving both ways
AGREEMENT_OF_A_NAT = 0.1  # share of the neighbours that may be parted for a nat of entropy
LEAD = 0.01  # of the solve without a cost, in plausibility, that one with it does not make up for
CLASS_SHARE = 0.05  # of the rows of a mean class: beta, which costs half the most
DIM = 512  # of features for which nats are stated; they grow with d
NATS = 60.0  # of an unused class
NATS_OF_FULL_CLASSES = 60.0  # that are added where a mean class has FULL_CLASS_ROWS rows
FULL_CLASS_ROWS = 8
SHARPEST = 16.0  # T at most: confidences are near 1 then
PRECISION = 1e-7  # of T and of the mean confidence: float32's rounding


def effective_classes(counts: torch.Tensor) -> float:
    """K_eff, exp of the entropy of the shares of the classes; `counts` (K,) >= 0."""
    return float(torch.special.entr(counts / counts.sum()).sum().exp())


def agreement(labels: torch.Tensor, neighbor_labels: torch.Tensor) -> float:
    """Share of the neighbours (S, k) with the label of their row (S,); -1 where there is none."""
    same = neighbor_labels == labels[:, None]
    return float(same[neighbor_labels >= 0].double().mean())


def sharpness(log_y_hat: torch.Tensor, confidence: float) -> float:
    """T, at least 1, with which y_hat^T of the rows (S, K) has the mean `confidence`."""

    gaps = log_y_hat - log_y_hat.amax(1, keepdim=True)
    powers = torch.empty_like(gaps)

    def excess(power: float) -> float:
        """By how much the mean of a row's largest y_hat^T is above the confidence."""
        torch.mul(gaps, power, out=powers).exp_()
        return float(powers.sum(1).reciprocal().mean(dtype=torch.float64)) - confidence

    low, high = 1.0, SHARPEST
    below = excess(low)
    if not below < 0:
        return low
    above, side = excess(high), 0.0
    # Regula falsi; an end that stays twice counts half (Illinois), so that both ends move.
    while above > 0 and high - low > PRECISION * low:
        power = (low * above - high * below) / (above - below)
        found = excess(power)
        if abs(found) < PRECISION:
            return power
        stays = 0.5 if found * side > 0 else 1.0
        if found < 0:
            low, below, above = power, found, above * stays
        else:
            high, above, below = power, found, below * stays
        side = found
    return high


def is_charged(class_cost: bool | str, effective: float, n_classes: int, *, few_shot: bool) -> bool:
    """Whether classes in use cost something: the parameter, and what "auto" stands for."""
    if class_cost == "auto":
        return not few_shot and effective < FEW_CLASSES * n_classes
    return bool(class_cost)


def is_undecided(
    class_cost: bool | str, effective: float, n_classes: int, *, few_shot: bool
) -> bool:
    """Whether "auto" solves without and with a cost, and keeps the more plausible labels."""
    charged = is_charged(class_cost, effective, n_classes, few_shot=few_shot)
    return class_cost == "auto" and charged and effective >= SURELY_FEW * n_classes


def may_be_undecided(class_cost: bool | str, *, few_shot: bool) -> bool:
    """Whether `is_undecided` for some K_eff."""
    return is_undecided(class_cost, SURELY_FEW, 1, few_shot=few_shot)


def plausibility(shared: float, sizes: torch.Tensor) -> float:
    """By which "auto" chooses: `shared` of the neighbours, if any, have one label; `sizes` (K,)."""
    shared = 0.0 if math.isnan(shared) else shared
    return shared + AGREEMENT_OF_A_NAT * math.log(effective_classes(sizes))


@dataclass(frozen=True)
class ClassCost:
    """
    L gets sum_k weight beta n_k / (n_k + beta), for the mass n_k of each class.

    Parameters
    ----------
    weight : float
        w, nats by which the score of a class without mass is lowered.
    beta : float
        Rows.
    """

    weight: float
    beta: float

    @classmethod
    def of(cls, effective: float, n_rows: int, n_classes: int, dim: int) -> ClassCost:
        """The cost for N rows of d dimensions whose y_hat spreads over `effective` classes."""
        full = min(1.0, n_rows / (FULL_CLASS_ROWS * effective))
        few = max(0.0, 1 - effective / (FEW_CLASSES * n_classes)) ** (2 - full)
        nats = (NATS + NATS_OF_FULL_CLASSES * full) * dim / DIM
        return cls(few * nats, max(1.0, CLASS_SHARE * n_rows / effective))

    def total(self, counts: torch.Tensor) -> torch.Tensor:
        """The term of L, a float64 scalar, at the masses (K,)."""
        return self.weight * self.beta * (counts / (counts + self.beta)).sum()

    def tangent(self, counts: torch.Tensor) -> torch.Tensor:
        """Its derivative (K,): what each class's score loses."""
        return self.weight * (self.beta / (counts + self.beta)).square()
