"""StatA against loops over rows and classes in float64."""

import numpy as np
import pytest
import torch

from bench.rivals import stata
from bench.rivals.baseline import nearest
from tests.reference import knn_weights, log_prior, log_softmax, unit


def sweep_by_loops(features, means, variances, log_y, affinity, z, sweeps, weight):
    score = log_y.copy()
    for i in range(len(features)):
        for k in range(len(means)):
            distance = ((features[i] - means[k]) ** 2 / variances[k]).sum()
            score[i, k] -= weight * 0.5 * (distance + np.log(variances[k]).sum())
    for _ in range(sweeps):
        z = np.exp(log_softmax(score + affinity @ z))
    return z


def by_loops(features, prototypes, *, steps=10, sweeps=5, tau=100.0, weight=1 / 50):
    n, d = features.shape
    classes = range(len(prototypes))
    w = knn_weights(features, features, 3, True, False)
    affinity = (w + w.T) / 6
    log_y = log_prior(features, prototypes, tau)
    z = np.exp(log_y)
    anchor = np.zeros(d)
    for i in range(n):
        for k in classes:
            anchor += z[i, k] * (features[i] - prototypes[k]) ** 2 / n
    means, variances = prototypes.copy(), [anchor.copy() for _ in classes]
    z = sweep_by_loops(features, means, variances, log_y, affinity, z, sweeps, weight)
    for _ in range(steps):
        counts = np.bincount(z.argmax(1), minlength=len(prototypes))
        for k in classes:
            share = counts[k] / (1 + counts[k])
            mean = sum(z[i, k] * features[i] for i in range(n)) / z[:, k].sum()
            mixed = share * unit(mean[None])[0] + (1 - share) * prototypes[k]
            means[k] = unit(mixed[None])[0]
            own = sum(z[i, k] * (features[i] - means[k]) ** 2 for i in range(n)) / z[:, k].sum()
            variances[k] = share * own + (1 - share) * (anchor + (prototypes[k] - means[k]) ** 2)
        z = sweep_by_loops(features, means, variances, log_y, affinity, z, sweeps, weight)
    return z


@pytest.mark.parametrize("steps", [0, 1, 10])
def test_against_loops(steps, problem):
    features, prototypes, _ = problem(n=40, k=5, d=12)
    rows, texts = (unit(x.astype(float)) for x in (features, prototypes))
    inputs = torch.from_numpy(rows), torch.from_numpy(texts)
    found = stata.solve(*inputs, nearest(inputs[0]), max_iter=steps)
    np.testing.assert_allclose(found.numpy(), by_loops(rows, texts, steps=steps), atol=1e-9)


def test_float32_gives_the_same_labels(problem):
    features, prototypes, _ = problem(n=200, k=8, d=24)
    found = []
    for dtype in (torch.float32, torch.float64):
        rows, texts = (torch.from_numpy(x).to(dtype) for x in (features, prototypes))
        found.append(stata.solve(rows, texts, nearest(rows)))
    assert (found[0].argmax(1) == found[1].argmax(1)).all()
    assert (found[0] - found[1]).abs().max() < 1e-3


def test_a_class_without_rows_stays_at_its_text():
    rows = torch.nn.functional.normalize(torch.eye(2, 8).repeat(10, 1) + 0.01, dim=1)
    texts = torch.eye(3, 8)
    z = stata.solve(rows, texts, nearest(rows))
    assert torch.isfinite(z).all()
    assert z[:, 2].max() < 1e-6
