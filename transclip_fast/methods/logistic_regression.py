"""Logistic regression of the labelled rows; the other rows do not take part."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn.functional import cross_entropy

from transclip_fast.methods.base import Grid, Method, Setting, Settings, Solution
from transclip_fast.methods.dense import Dense, softmax_
from transclip_fast.methods.task import Task

MAX_ITERATIONS = 1000
GRADIENT_TOLERANCE = 1e-7  # largest entry of the gradient of the mean loss at the minimum


class LogisticRegression(Method):
    """
    Minimises c sum_s CE(s W^T + b, y_s) + |W|^2 / 2 over the labelled rows s, by L-BFGS.

    CLIP's linear probe: each row is labelled by itself. Its published search starts at seven values
    of c and goes on between the best; here the seven are the grid.

    One product and one (N, K) array: 10 million rows and 1,000 classes take 40 GB.

    Parameters
    ----------
    c : float
        Inverse strength of the penalty.

    References
    ----------
    Radford et al. Learning Transferable Visual Models From Natural Language Supervision. 2021.
    """

    name = "logistic-regression"
    kinds = ("shots", "texts", "both", "probabilities")
    matrices = 1
    grid: ClassVar[Grid] = {
        "c": Setting(0.316, (1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6), least=1e-12)
    }

    def solve(self, task: Task, s: Settings) -> Solution:
        rows, labels = task.labelled.rows.double(), task.labelled.labels
        weights = torch.zeros(task.n_classes, rows.shape[1] + 1, dtype=torch.float64)
        weights = weights.to(task.device).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [weights],
            max_iter=MAX_ITERATIONS,
            tolerance_grad=GRADIENT_TOLERANCE,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            logits = rows @ weights[:, :-1].T + weights[:, -1]
            penalty = weights[:, :-1].square().sum() / (2 * s.c * len(rows))
            loss: torch.Tensor = cross_entropy(logits, labels) + penalty
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        with torch.enable_grad():
            optimizer.step(closure)  # type: ignore[no-untyped-call]
        found = weights.detach()
        scores = Dense(task.features, task.n_classes).scores(found[:, :-1], found[:, -1])
        task.progress(1, 1)
        return Solution(softmax_(scores.values), int(optimizer.state[weights]["n_iter"]))
