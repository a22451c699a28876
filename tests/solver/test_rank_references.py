"""Processes that share the rows, against the float64 reference."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import pytest

from tests import reference
from tests.conftest import balanced, make_problem
from tests.ranks import on_ranks
from transclip_fast import TransCLIP
from transclip_fast.graph.build import build_graph

pytestmark = pytest.mark.usefixtures("one_thread")

N_ROWS = 1100  # three parts


def fitted(features, graph, cases):
    """z of own rows, the means and gamma, of a fit with each of the arrays."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for values, arrays in cases:
            model = TransCLIP(device="cpu", **values).fit(features, graph=graph, **arrays)
            found.append((model.label_distributions_, model.means_, model.gamma_))
    return found


@pytest.fixture(scope="module")
def problem():
    """Features, their graph, settings and arrays of fits, and the reference of each."""
    features, text, labels = make_problem(n=N_ROWS, k=5, noise=0.06)
    rows = balanced(labels, 4)
    support, labels = features[rows], labels[rows]
    exact = [array.astype(np.float64) for array in (features, text, support)]
    shots = {"text_features": text, "support_features": support, "support_labels": labels}
    few_shot = partial(reference.few_shot, *exact, labels)
    cases = [({"gamma": gamma}, shots) for gamma in reference.GAMMAS]
    expected = [few_shot(gamma=gamma) for gamma in reference.GAMMAS]
    cases.append(({}, {**shots, "validation_features": support, "validation_labels": labels}))
    expected.append(few_shot(validation=(exact[2], labels)))
    logits = 20 * features @ text.T
    log_y = reference.log_softmax(logits.astype(np.float64))
    solved = reference.solve(exact[0], log_y)
    for arrays in ({"prior_logits": logits}, {"prior": np.exp(log_y).astype(np.float32)}):
        cases.append(({}, arrays))
        expected.append(solved)
    return features, build_graph(features, 3), cases, expected


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_gamma_and_given_priors(problem, size):
    *arguments, expected = problem
    ranks = on_ranks(size, fitted, *arguments)
    for case, run in enumerate(expected):
        z = np.concatenate([rank[case][0] for rank in ranks])
        np.testing.assert_allclose(z, run.z, rtol=0, atol=2e-5)
        np.testing.assert_array_equal(z.argmax(1), run.z.argmax(1))
        for rank in ranks:
            np.testing.assert_allclose(rank[case][1], run.means, rtol=0, atol=2e-6)
            assert rank[case][2] == run.gamma
