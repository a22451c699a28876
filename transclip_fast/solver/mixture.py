"""The Gaussian mixture: one mean a class, one diagonal covariance for all (paper, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from transclip_fast.data.feature_rows import UnitRows
from transclip_fast.ops.blocks import blocks
from transclip_fast.parallel import parallel_map

COVARIANCES = ("diagonal", "isotropic")
# Times 1/d. One real backbone reaches a variance of 4.5e-7; a larger floor changes labels.
VARIANCE_FLOOR = 1e-6
# Below this mass, float32 entries of z are so close to underflow that their mean is noise.
MASS_FLOOR = 1e-30
CLASS_ENTRIES = 1 << 15  # of a float64 (K, d) array, 256 KiB: a core's cache holds a few of them
THREADED_CLASS_BLOCKS = 64  # of so many entries: fewer are computed sooner than handed out

Returned = TypeVar("Returned")


@dataclass(frozen=True)
class Moments:
    """
    Weighted sums over rows: all that the means, the variance and the objective need of them.

    `counts` (K,) is sum_i z_ik, `sums` (K, d) is Z^T F, `squares` (d,) is sum_i f_id^2, all
    float64.
    """

    counts: torch.Tensor
    sums: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def zero(cls, n_classes: int, dim: int, device: torch.device) -> Moments:
        """Moments of no rows."""
        counts = torch.zeros(n_classes, dtype=torch.float64, device=device)
        return cls(counts, counts.new_zeros(n_classes, dim), counts.new_zeros(dim))

    @classmethod
    def of(cls, rows: torch.Tensor, labels: torch.Tensor, n_classes: int) -> Moments:
        """Moments of rows (M, d) with one-hot labels, of classes (M,)."""
        order = labels.argsort(stable=True)
        counts = torch.bincount(labels, minlength=n_classes)
        rows = rows[order].double()
        sums = torch.segment_reduce(rows, "sum", lengths=counts, axis=0)  # (K, d)
        return cls(counts.double(), sums, rows.square().sum(0))

    def with_dropped(self, whole: Moments) -> Moments:
        """
        Add the mass that sparse rows dropped, to the classes as the kept mass is shared.

        The sums take it in place, as they are large. `whole` has the moments of all rows, as of one
        class. Without what was dropped the kept mass and the squares belong to different sets of
        rows, and the variance is wrong by tens of percent.
        """
        share = self.counts / self.counts.sum()
        counts = self.counts + share * (whole.counts - self.counts.sum())
        sums = self.sums.addr_(share, whole.sums[0] - self.sums.sum(0))
        return Moments(counts, sums, self.squares)

    def take(self, classes: torch.Tensor) -> Moments:
        """Of some classes (K',), the only ones with mass."""
        return Moments(self.counts[classes], self.sums[classes], self.squares)

    def dot(self, weights: torch.Tensor) -> torch.Tensor:
        """sum_ik z_ik f_i . weights_k of weights (K, d), a float64 scalar."""

        def part(classes: slice) -> torch.Tensor:
            return (weights[classes] * self.sums[classes]).sum()

        return torch.stack(by_classes(part, weights)).sum()

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.counts + other.counts, self.sums + other.sums, self.squares + other.squares
        )

    def __mul__(self, weight: float) -> Moments:
        return Moments(self.counts * weight, self.sums * weight, self.squares * weight)


@dataclass(frozen=True)
class Mixture:
    """Means mu (K, d) and variances sigma^2 (d,), float64."""

    means: torch.Tensor
    variances: torch.Tensor

    @classmethod
    def start(
        cls,
        log_weights: torch.Tensor,
        rows: torch.Tensor,
        features: UnitRows,
        shots: Moments | None = None,
    ) -> Mixture:
        """
        Each class at its 8 most confident rows, or at its labelled shots; sigma^2 = 1/d.

        Parameters
        ----------
        log_weights, rows : Tensor (8, K), (8, K) int64
            The largest log y_hat of each class, largest first, and their rows.
        shots : Moments, optional
            Of the support rows; a class without shots starts as in zero-shot.
        """
        # A unit mean does not depend on the scale of its weights: the largest is set to 1, so that
        # they cannot all underflow. A class excluded from all rows weighs its rows equally.
        largest = log_weights[:1]
        relative = torch.where(largest.isfinite(), log_weights - largest, 0)
        weights = relative.double().exp()
        means = torch.zeros(
            rows.shape[1], features.shape[1], dtype=torch.float64, device=features.device
        )
        for weight, row in zip(weights, rows, strict=True):
            means += weight[:, None] * features[row]
        if shots is not None:
            means = torch.where((shots.counts > 0)[:, None], shots.sums, means)
        d = features.shape[1]
        return cls(_unit(means), means.new_full((d,), 1 / d))

    def to(self, device: torch.device) -> Mixture:
        """The same on another device."""
        return Mixture(self.means.to(device), self.variances.to(device))

    def update_means(self, moments: Moments, *, unit: bool = True) -> Mixture:
        """mu_k <- unit(sum_i z_ik f_i), or the plain mean; a class without mass keeps its mean."""
        means = torch.empty_like(self.means)

        def part(classes: slice) -> None:
            sums, counts = moments.sums[classes], moments.counts[classes, None]
            new = _unit(sums) if unit else sums / counts
            torch.where(counts > MASS_FLOOR, new, self.means[classes], out=means[classes])

        by_classes(part, means)
        return replace(self, means=means)

    def update_variance(self, moments: Moments, *, covariance: str = "diagonal") -> Mixture:
        """
        sigma^2 <- sum_ik z_ik (f_i - mu_k)^2 / sum_ik z_ik, in closed form from the moments.

        Rows of z sum to 1, hence sum_ik z_ik f_i^2 = sum_i f_i^2. The means are the new ones.
        """
        spread = self._spread(moments) / moments.counts.sum()
        variances = spread.clamp_min(VARIANCE_FLOOR / len(spread))
        if covariance == "isotropic":
            variances = variances.mean().expand_as(variances).contiguous()
        return replace(self, variances=variances)

    def linear_score(self, classes: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """
        g_ik = f_i . weights_k + offset_k up to a constant per row, which the softmax drops.

        Returns
        -------
        weights : Tensor (n, d) float64
            mu_k / sigma^2 of the `classes`.
        offset : Tensor (n,) float64
            -1/2 sum_d mu_kd^2 / sigma_d^2.
        """
        means = self.means[classes]
        weights = means / self.variances
        return weights, -0.5 * torch.linalg.vecdot(weights, means)

    def log_likelihood(self, moments: Moments) -> torch.Tensor:
        """sum_ik z_ik (g_ik - 1/2 sum_d log sigma_d^2), constants dropped; float64 scalar."""
        mahalanobis = (self._spread(moments) / self.variances).sum()
        return -0.5 * (mahalanobis + moments.counts.sum() * self.variances.log().sum())

    def _spread(self, moments: Moments) -> torch.Tensor:
        """sum_ik z_ik (f_id - mu_kd)^2, (d,)."""

        def part(classes: slice) -> torch.Tensor:
            means, counts = self.means[classes], moments.counts[classes, None]
            halves = torch.addcmul(moments.sums[classes], means, counts, value=-0.5)
            return halves.mul_(means).sum(0)

        return moments.squares - 2 * torch.stack(by_classes(part, self.means)).sum(0)


def by_classes(task: Callable[[slice], Returned], array: torch.Tensor) -> list[Returned]:
    """The results of `task` on consecutive classes, whose rows of `array` (K, d) fit a cache."""
    n_classes, dim = array.shape
    size = max(1, CLASS_ENTRIES // dim) if array.device.type == "cpu" else n_classes
    parts = list(blocks(n_classes, size))
    if len(parts) < THREADED_CLASS_BLOCKS:
        return [task(part) for part in parts]
    return parallel_map(task, parts, array.device)


def _unit(rows: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / norms.clamp_min(torch.finfo(rows.dtype).tiny)
