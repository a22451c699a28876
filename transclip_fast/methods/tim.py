"""TIM by alternating directions: information between rows and their labels, maximised."""

from __future__ import annotations

from typing import ClassVar

import torch

from transclip_fast.methods.base import Answer, Grid, Method, Setting, Values
from transclip_fast.methods.bd_cspn import cosine_answer
from transclip_fast.methods.dense import Dense, in_blocks
from transclip_fast.methods.task import Task

SMALLEST = 1e-30  # of a class's mass in float32


class TIM(Method):
    """
    TIM-ADM: c CE(shots) - H(mean_n p_n) + b mean_n H(p_n), minimised over prototypes w.

    p_n = softmax_k of tau (x_n.w_k - |w_k|^2 / 2), w the means of the labelled rows at first. A
    step finds q from p^(1 + b), each class divided by the root of its sum, rows scaled to 1; and
    then w_k <- (c' (Y^T S + w P_S^T 1 - P_S^T S) + r (Q^T X + w P^T 1 - P^T X)) /
    (c' Y^T 1 + r Q^T 1), with c' = c / (1 + b) and r = M / N. The answer is the nearest w by
    cosine, z = softmax(tau cos).

    That is TIM_ADM_bis of the published code of TransCLIP's comparison, which its runner calls; the
    TIM_ADM beside it takes tau cos(x_n, w_k) as logits in its steps, too.

    The marginal entropy H(mean p) assumes that all classes are equally frequent: on others, or
    where few of the classes occur, TIM loses much. The number of steps matters in single cases.
    The published search tries 125 settings.

    150 steps of one score and one class sum. One (N, K) array and that of the answer: a million
    rows and 1,000 classes take 8 GB; 100,000 rows are the most that is practical.

    Parameters
    ----------
    tau : float
    shots_weight, entropy_weight : float
        c and b.
    max_iter : int

    References
    ----------
    Boudiaf et al. Transductive Information Maximization for Few-Shot Learning. NeurIPS 2020.
    """

    name = "tim-adm"
    balanced = True
    learned_arrays = 4
    grid: ClassVar[Grid] = {
        "tau": Setting(15.0, (5.0, 10.0, 15.0, 30.0, 60.0)),
        "shots_weight": Setting(0.1, (0.025, 0.05, 0.1, 0.2, 0.4)),
        "entropy_weight": Setting(0.1, (0.025, 0.05, 0.1, 0.2, 0.4)),
        "max_iter": Setting(150, whole=True),
    }

    def solve(self, task: Task, s: Values) -> Answer:
        rows, moments, w = task.labelled.features.double(), task.moments, task.means
        shots_weight = s.shots_weight / (1 + s.entropy_weight)
        ratio = len(rows) / len(task.features)
        dense = Dense(task.features, task.n_classes)
        scores = dense.new_scores()
        for step in range(s.max_iter):
            dense.scores(s.tau * w, -s.tau / 2 * w.square().sum(1), out=scores)
            masses = _to_differences(scores.values, 1 + s.entropy_weight)
            sums, counts = dense.class_sums(scores.values)
            p = (s.tau * (rows @ w.T - w.square().sum(1) / 2)).softmax(1)
            of_shots = moments.sums - p.T @ rows + w * p.sum(0)[:, None]
            of_rows = sums + w * masses[:, None]
            total = shots_weight * moments.counts + ratio * (counts + masses)
            w = (shots_weight * of_shots + ratio * of_rows) / total[:, None]
            task.progress(step + 1, s.max_iter)
        return Answer(cosine_answer(task, w, s.tau), s.max_iter)


def _to_differences(values: torch.Tensor, power: float) -> torch.Tensor:
    """Scores (N, K) to q - p, in place; returns the sums of p over the rows, (K,) float64."""

    def to_p(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        p = torch.softmax(values[rows], 1, out=values[rows])
        return p.sum(0, dtype=torch.float64), (p**power).sum(0, dtype=torch.float64)

    masses, powers = (torch.stack(x).sum(0) for x in zip(*in_blocks(values, to_p), strict=True))
    roots = powers.clamp_min(SMALLEST).sqrt().float()

    def to_difference(rows: slice) -> None:
        q = values[rows] ** power / roots
        values[rows] = q.div_(q.sum(1, keepdim=True)).sub_(values[rows])

    in_blocks(values, to_difference)
    return masses
