"""Transductive fine-tuning of the prototypes."""

from __future__ import annotations

from typing import ClassVar

import torch

from transclip_fast.methods.base import Answer, Grid, Method, Setting, Values
from transclip_fast.methods.dense import Dense, in_blocks
from transclip_fast.methods.gradients import (
    Adam,
    shannon_slope,
    to_label_gradients,
    to_logit_gradients,
)
from transclip_fast.methods.task import Task

SMALLEST = 1e-12  # of a squared distance


class TransductiveFinetuning(Method):
    """
    Minimises CE(shots) + mean_n H(p_n), p_n = softmax_k(-tau |x_n - w_k|), by Adam on w.

    w are the means of the labelled rows at first, and the answer is the nearest of them by
    distance, z = p. As the published code of TransCLIP's comparison does, and unlike the paper,
    only the prototypes change, not the network: at most 40 steps of 5e-5 in each coordinate, so
    that the answer is nearly that of the means.

    The gradient by w_k is tau sum_n G_nk (x_n - w_k) / |x_n - w_k|, with G that by the logits: a
    class sum. 25 steps of one score and one class sum. Two (N, K) arrays: a million rows and 1,000
    classes take 8 GB.

    Parameters
    ----------
    tau : float
    max_iter : int
    rate : float
        Of Adam.

    References
    ----------
    Dhillon et al. A Baseline for Few-Shot Image Classification. ICLR 2020.
    """

    name = "transductive-finetuning"
    learned_arrays = 4
    grid: ClassVar[Grid] = {
        "tau": Setting(1.0, (0.25, 0.5, 1.0, 2.0, 4.0)),
        "max_iter": Setting(25, (10, 15, 20, 25, 30, 35, 40), whole=True),
        "rate": Setting(5e-5),
    }

    def solve(self, task: Task, s: Values) -> Answer:
        rows, labels, w = task.labelled.features.double(), task.labelled.labels, task.means
        dense = Dense(task.features, task.n_classes)
        norms = torch.cat([task.features[b].square().sum(1) for b in task.features.blocks()])
        scores, p = dense.new_scores(), dense.new_scores().values
        distances, adam = scores.values, Adam(w, s.rate)

        def to_p(rows: slice) -> None:
            d = distances[rows].add_(norms[rows, None]).clamp_min_(SMALLEST).sqrt_()
            torch.softmax(-s.tau * d, 1, out=p[rows])

        def to_weights(rows: slice) -> None:
            p[rows] /= distances[rows]

        for step in range(s.max_iter + 1):
            dense.products(-2 * w, w.square().sum(1), out=scores)
            in_blocks(distances, to_p)
            if step == s.max_iter:
                break
            to_logit_gradients(p, shannon_slope, 1.0)
            in_blocks(p, to_weights)
            sums, counts = dense.class_sums(p)
            of_shots = torch.cdist(rows, w)
            errors = to_label_gradients((-s.tau * of_shots).softmax(1), labels)
            errors = torch.where(of_shots > 0, errors / of_shots, 0.0)
            total = counts + errors.sum(0)
            w = adam.step(s.tau * (sums + errors.T @ rows - w * total[:, None]))
            task.progress(step + 1, s.max_iter)
        return Answer(p, s.max_iter)
