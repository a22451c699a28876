"""BD-CSPN: prototypes rectified by the rows most similar to each class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from transclip_fast.data.feature_rows import unit
from transclip_fast.data.labelled_rows import LabelledRows
from transclip_fast.graph.exact import nearest
from transclip_fast.methods.base import Answer, Grid, Method, Setting, Values
from transclip_fast.methods.dense import Dense, mean_row, softmax_
from transclip_fast.methods.task import Arrays, Task
from transclip_fast.solver.mixture import Moments


class BDCSPN(Method):
    """
    Prototype rectification: each class takes the `n_rows` queries most similar to its mean.

    Queries are shifted by the difference of the means of all labelled rows and of all queries. A
    class's new prototype is the mean of its labelled rows and its most similar shifted queries,
    weighted by exp(eps cos(row, m_k)) with m_k its labelled rows' mean. A query may join several
    classes. The answer is the nearest prototype by cosine, z = softmax(tau cos).

    As the published code of TransCLIP's comparison does, and unlike the paper, the rows that are
    answered are not the shifted ones.

    Two products. One (N, K) array, that of the answer: 10 million rows and 1,000 classes take
    40 GB.

    Parameters
    ----------
    n_rows : int
        Queries that join a class, at most N; 0 for none.
    eps : float
        Sharpness of the weights.

    References
    ----------
    Liu, Song, Qin. Prototype Rectification for Few-Shot Learning. ECCV 2020.
    """

    name = "bd-cspn"
    matrices = 1
    grid: ClassVar[Grid] = {
        "n_rows": Setting(8, tuple(range(11)), whole=True),
        "eps": Setting(10.0, (2.5, 5.0, 10.0, 20.0, 40.0)),
    }

    def learned_rows(self, arrays: Arrays, run: Mapping[str, Any]) -> int:
        joined = min(int(run["n_rows"]), len(arrays.features))
        return super().learned_rows(arrays, run) + arrays.n_classes * joined

    def solve(self, task: Task, s: Values) -> Answer:
        prototypes = rectified_prototypes(task, s.n_rows, s.eps)
        return Answer(cosine_answer(task, prototypes, task.logit_scale), 1)


def rectified_prototypes(task: Task, n_rows: int, eps: float) -> torch.Tensor:
    """The prototypes (K, d) float64 of BD-CSPN."""
    labelled, directions = task.labelled, unit(task.means)
    found = [labelled]
    if n_rows:
        shift = (labelled.features.double().mean(0) - mean_row(task.features)).float()
        shifted = task.features.mapped(lambda x: unit(x + shift), task.features.shape[1])
        ids, _ = nearest(directions.float(), shifted, n_rows)  # (K, n_rows), less if N is less
        joined = (task.features[ids] + shift).flatten(0, 1)
        labels = torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])
        found.append(LabelledRows(joined, labels))
    everything = LabelledRows.joined(found)
    rows, labels = everything.features.double(), everything.labels
    weights = (eps * (unit(rows) * directions[labels]).sum(1)).exp()
    # Moments of the weighted rows, with the weight as one more column.
    weighted = torch.cat([weights[:, None] * rows, weights[:, None]], 1)
    sums = Moments.of(weighted, labels, task.n_classes).sums
    return sums[:, :-1] / sums[:, -1:]


def cosine_answer(task: Task, prototypes: torch.Tensor, tau: float) -> torch.Tensor:
    """softmax of tau cos(x, p_k), (N, K), for prototypes (K, d)."""
    features = task.features.mapped(unit, task.features.shape[1])  # probabilities are no unit rows
    scores = Dense(features, task.n_classes).scores(tau * unit(prototypes))
    softmax_(scores.values)
    return scores.values
