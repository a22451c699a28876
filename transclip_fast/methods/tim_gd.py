"""TIM by gradient descent, and alpha-TIM."""

from __future__ import annotations

from typing import ClassVar

from transclip_fast.methods.base import Answer, Grid, Method, Setting, Values
from transclip_fast.methods.dense import Dense, softmax_
from transclip_fast.methods.gradients import (
    Adam,
    alpha_slope,
    to_label_gradients,
    to_logit_gradients,
)
from transclip_fast.methods.task import Task


class TIMGD(Method):
    """
    TIM-GD: the loss of `TIM`, c CE(shots) - H(mean_n p_n) + b mean_n H(p_n), by Adam on w.

    p_n = softmax_k of tau (x_n.w_k - |w_k|^2 / 2) as in the paper; the code of TransCLIP's
    comparison takes tau cos(x_n, w_k). The gradient by w_k is tau (sum_n G_nk x_n - w_k sum_n
    G_nk), with G that by the logits: a class sum, without automatic differentiation. The answer is
    z = p.

    It assumes equally frequent classes, as `TIM` does. 1,000 steps of one score and one class sum.
    One (N, K) array; 10,000 rows and 1,000 classes are practical.

    Parameters
    ----------
    tau : float
    shots_weight, entropy_weight : float
        c and b.
    alpha : float
        a of the entropies, as in `AlphaTIM`; 1 is Shannon's H, that of TIM-GD.
    rate : float
        Of Adam.
    max_iter : int

    References
    ----------
    Boudiaf et al. Transductive Information Maximization for Few-Shot Learning. NeurIPS 2020.
    """

    name = "tim-gd"
    balanced = True
    matrices = 1
    learned_arrays = 4
    grid: ClassVar[Grid] = {
        "tau": Setting(15.0),
        "shots_weight": Setting(0.1),
        "entropy_weight": Setting(0.1),
        "alpha": Setting(1.0),
        "rate": Setting(1e-4),
        "max_iter": Setting(1000, whole=True),
    }

    def solve(self, task: Task, s: Values) -> Answer:
        rows, labels, w = task.labelled.features.double(), task.labelled.labels, task.means
        slope = alpha_slope(s.alpha)
        dense = Dense(task.features, task.n_classes)
        scores, adam = dense.new_scores(), Adam(w, s.rate)
        for step in range(s.max_iter + 1):
            half = w.square().sum(1) / 2
            values = dense.scores(s.tau * w, -s.tau * half, out=scores).values
            mean = softmax_(values)
            if step == s.max_iter:
                break
            to_logit_gradients(values, slope, s.entropy_weight, mean)
            sums, counts = dense.class_sums(values)
            errors = to_label_gradients((s.tau * (rows @ w.T - half)).softmax(1), labels)
            errors *= s.shots_weight
            total = counts + errors.sum(0)
            w = adam.step(s.tau * (sums + errors.T @ rows - w * total[:, None]))
            task.progress(step + 1, s.max_iter)
        return Answer(scores.values, s.max_iter)


class AlphaTIM(TIMGD):
    """
    `TIMGD` with H_a(p) = (1 - sum_k p_k^a) / (a - 1) for both entropies, and weights 1.

    It tolerates classes of different frequencies better than TIM does.

    Parameters
    ----------
    alpha : float
        a; the others are those of `TIMGD`.

    References
    ----------
    Veilleux et al. Realistic Evaluation of Transductive Few-Shot Learning. NeurIPS 2021.
    """

    name = "alpha-tim"
    balanced = False
    grid: ClassVar[Grid] = {
        **TIMGD.grid,
        "shots_weight": Setting(1.0),
        "entropy_weight": Setting(1.0),
        "alpha": Setting(7.0, (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)),
    }
