"""The baseline is TransCLIP, so that beating it means something."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.common import make_problem
from bench.rivals.baseline import nearest, solve
from bench.rivals.published import available, published_solver, zero_shot

GOLDEN = os.environ.get("TRANSCLIP_GOLDEN")


@pytest.mark.skipif(not GOLDEN, reason="TRANSCLIP_GOLDEN names no folder of golden features")
@pytest.mark.parametrize("backbone", ["rn50", "vit-b-32", "vit-l-14"])
def test_baseline_equals_the_published_run(backbone):
    data = np.load(Path(GOLDEN) / f"whurs19_clip_{backbone}.npz")
    features, prototypes = (
        torch.from_numpy(data[name]).float() for name in ("image_features", "text_features")
    )
    z = solve(features, prototypes, nearest(features)).numpy()
    expected = data["official_assignments"]
    assert np.abs(z - expected).max() <= 2e-4
    assert np.array_equal(z.argmax(1), expected.argmax(1))


def test_nearest_drops_self_by_id_and_is_exact_across_blocks():
    features = torch.from_numpy(make_problem(50, 5, 16).features)
    features[7] = features[3]  # a twin is a neighbour, the row itself is not
    neighbors, similarities = nearest(features, 3, block=16)
    cosine = (features @ features.T).fill_diagonal_(-torch.inf)
    torch.testing.assert_close(similarities, cosine.topk(3).values)
    torch.testing.assert_close(cosine.gather(1, neighbors), similarities)
    assert (neighbors != torch.arange(50)[:, None]).all()
    assert (neighbors[7, 0], neighbors[3, 0]) == (3, 7)


def test_identical_rows_and_empty_classes_stay_finite():
    features = torch.nn.functional.normalize(torch.ones(20, 8), dim=1)
    prototypes = torch.eye(8)[:5]
    z = solve(features, prototypes, nearest(features))
    assert torch.isfinite(z).all()
    torch.testing.assert_close(z.sum(1), torch.ones(20))


@pytest.mark.skipif(not available(), reason="TRANSCLIP_OFFICIAL names no checkout")
def test_published_code_runs_here_and_is_left_as_it_was():
    problem = make_problem(300, 20, 64)
    features, prototypes = map(torch.from_numpy, (problem.features, problem.prototypes))
    before = torch.Tensor.cuda, torch.nn.Module.cuda
    with published_solver(on_cpu=True) as module:
        accuracy = module.cls_acc
    z, seconds = zero_shot(features, prototypes)
    assert (torch.Tensor.cuda, torch.nn.Module.cuda) == before
    assert module.cls_acc is not accuracy
    assert seconds.keys() == {"knn", "solve"}
    assert (z - solve(features, prototypes, nearest(features))).abs().max() <= 2e-4
