"""Logistic regression of the labelled rows; the other rows do not take part."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from scipy.optimize import minimize

from transclip_fast.methods.base import Answer, Grid, Method, Setting, Values
from transclip_fast.methods.dense import Dense, softmax_
from transclip_fast.methods.gradients import to_label_gradients
from transclip_fast.methods.task import Task

MAX_ITERATIONS = 1000
GRADIENT_TOLERANCE = 1e-8  # largest entry of the gradient of the mean loss at the minimum


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
    matrices = 1
    class_arrays = 32  # of which L-BFGS keeps 25
    learned_arrays = 4
    grid: ClassVar[Grid] = {
        "c": Setting(0.316, (1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6), least=1e-12)
    }

    def solve(self, task: Task, s: Values) -> Answer:
        rows, labels = task.labelled.features.cpu().double(), task.labelled.labels.cpu()
        shape = task.n_classes, rows.shape[1] + 1  # the last column is b

        def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
            """The loss over c M, and its gradient."""
            parameters = torch.from_numpy(flat).view(shape)
            weights, offset = parameters[:, :-1], parameters[:, -1]
            log_p = (rows @ weights.T + offset).log_softmax(1)
            errors, penalty = to_label_gradients(log_p.exp(), labels), 1 / (s.c * len(rows))
            cross = -log_p.gather(1, labels[:, None]).mean()
            value = cross + penalty * weights.square().sum() / 2
            gradient = torch.cat([errors.T @ rows + penalty * weights, errors.sum(0)[:, None]], 1)
            return float(value), gradient.flatten().numpy()

        start = np.zeros(shape[0] * shape[1])
        options = {"maxiter": MAX_ITERATIONS, "gtol": GRADIENT_TOLERANCE, "ftol": 0.0}
        found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
        parameters = torch.from_numpy(found.x).view(shape).to(task.device)
        scores = Dense(task.features, task.n_classes).scores(parameters[:, :-1], parameters[:, -1])
        task.progress(1, 1)
        softmax_(scores.values)
        return Answer(scores.values, int(found.nit))
