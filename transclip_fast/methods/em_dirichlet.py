"""EM-Dirichlet and Hard EM-Dirichlet: a mixture of Dirichlet densities of zero-shot."""

from __future__ import annotations

from typing import ClassVar

import torch

from transclip_fast.methods.base import Answer, Grid, Method, Setting, Values
from transclip_fast.methods.dense import Dense, in_blocks
from transclip_fast.methods.dirichlet import fit_dirichlet
from transclip_fast.methods.task import PROBABILITY_SCALE, Task
from transclip_fast.solver.mixture import Moments

SMALLEST = 1e-15  # of a class's mass and of its share


class EMDirichlet(Method):
    """
    EM of a mixture of K Dirichlet densities over F = softmax(30 x T^T), from z = F.

    With g_k the mean of log F under z_k, with shots of class k counted in, alpha_k solves
    psi(alpha_kj) - psi(sum_j alpha_kj) = g_kj, by majorise-minimise steps; and
    z = softmax_k(log Dirichlet(F | alpha_k) + w v_k), v_k = log(mean_n z_nk) + 1. A class without
    mass keeps its alpha.

    log F = 30 x T^T less a number a row, so that the products have d columns where the published
    code makes an (N, K, K) array. It stops the steps of all classes at once, after a multiple of
    50, here each class stops by itself after one of 10. It sets w to K / 5, or K divided by the
    classes of a batch, rounded down, for batches of few classes; in StatA's comparison it is 0,
    which on whole data sets is better, too.

    Two (N, K) arrays, and (K, K) float64 ones: a million rows and 1,000 classes take 9 GB, and
    3,000 classes are the most that is practical.

    Parameters
    ----------
    share_weight : float
        w.
    max_iter : int

    References
    ----------
    Martin et al. Transductive Zero-Shot and Few-Shot CLIP. CVPR 2024.
    """

    name = "em-dirichlet"
    kinds = ("probabilities",)
    every_class = False
    hard = False
    grid: ClassVar[Grid] = {
        "share_weight": Setting(0.0),
        "max_iter": Setting(20, least=1, whole=True),
    }

    def solve(self, task: Task, s: Values) -> Answer:
        texts = PROBABILITY_SCALE * task.class_texts.double()
        dense = Dense(task.rows, task.n_classes)
        z, normaliser = dense.start(texts)
        scores = dense.new_scores()
        centre = normaliser.double().mean()
        rest = normaliser - centre.float()  # log F = 30 x T^T - centre - rest
        known, known_counts = _of_shots(task)
        alpha = torch.ones_like(known)
        for step in range(s.max_iter):
            sums, counts = dense.class_sums(z.values)
            lost = weighted_sum(z.values, rest)
            logs = sums @ texts.T - centre * counts[:, None] - lost[:, None] + known
            counts = counts + known_counts
            present = counts > SMALLEST
            alpha[present] = fit_dirichlet(alpha[present], logs[present] / counts[present, None])
            excess = alpha - 1
            totals = excess.sum(1)
            offset = torch.lgamma(alpha.sum(1)) - torch.lgamma(alpha).sum(1) - centre * totals
            if s.share_weight:
                shares = z.counts() / len(z)
                offset = offset + s.share_weight * ((shares + SMALLEST).log() + 1)
            dense.scores(excess @ texts, offset, out=scores)
            self._assign(scores.values, rest, (totals - totals.mean()).float(), z.values)
            task.progress(step + 1, s.max_iter)
        return Answer(z.values, s.max_iter)

    def _assign(
        self, scores: torch.Tensor, rest: torch.Tensor, slopes: torch.Tensor, z: torch.Tensor
    ) -> None:
        """z <- softmax, or argmax, of the scores (N, K) less rest (N,) times slopes (K,)."""

        def part(rows: slice) -> None:
            block = scores[rows].addcmul_(rest[rows, None], slopes, value=-1)
            if self.hard:
                z[rows].zero_().scatter_(1, block.argmax(1, keepdim=True), 1.0)
            else:
                torch.softmax(block, 1, out=z[rows])

        in_blocks(z, part)


class HardEMDirichlet(EMDirichlet):
    """EM-Dirichlet with z one-hot after every step, of which there are 10; see `EMDirichlet`."""

    name = "hard-em-dirichlet"
    hard = True
    grid: ClassVar[Grid] = {**EMDirichlet.grid, "max_iter": Setting(10, least=1, whole=True)}


def weighted_sum(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Z^T w (K,) float64 of (N, K) and (N,)."""

    def part(rows: slice) -> torch.Tensor:
        return values[rows].double().T @ weights[rows].double()

    return torch.stack(in_blocks(values, part)).sum(0)


def _of_shots(task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of log F (K, K) and number (K,) of the shots of each class, float64."""
    if task.shots is None:
        moments = Moments.zero(task.n_classes, task.n_classes, task.device)
    else:
        logits = PROBABILITY_SCALE * task.shots.features.double() @ task.class_texts.double().T
        moments = Moments.of(logits.log_softmax(1), task.shots.labels, task.n_classes)
    return moments.sums, moments.counts
