"""What could change a result unnoticed: torch's settings, sizes of numbers, shared memory."""

import numpy as np
import pytest
import torch

from transclip_fast import InputError, NeighborGraph, TransCLIP, build_graph


@pytest.mark.parametrize("candidates", [None, 28])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_another_default_type_changes_no_bit(problem, candidates, dtype):
    features, prototypes, labels = problem(n=300, k=40, noise=0.1)
    known = np.where(np.arange(300) % 9, -1, labels)

    def fit():
        form = "dense" if candidates is None else "sparse"
        model = TransCLIP(device="cpu", assignments=form, candidates=candidates)
        return model.fit(features, prototypes, known_labels=known)

    expected = fit()
    try:
        torch.set_default_dtype(dtype)
        found = fit()
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("transduction_", "calibrated_confidences_", "outlier_score_", "objective_"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


LARGE = {
    "kl_weight": {"kl_weight": 1e30, "logit_scale": 1e30},
    "likelihood_weight": {"likelihood_weight": 1e38},
    "similarities": {},
}


@pytest.mark.filterwarnings("ignore:graph. says")
@pytest.mark.parametrize("backend", ["dense", "torch", "numba"])
@pytest.mark.parametrize("name", LARGE)
def test_scores_beyond_float32_are_no_labels(problem, name, backend):
    features, prototypes, _ = problem(n=200)
    graph = build_graph(features)
    if name == "similarities":
        graph = NeighborGraph(graph.neighbors, np.float32(3e38) * graph.similarities)
    form = {"dense": {"assignments": "dense"}}.get(
        backend, {"assignments": "sparse", "backend": backend}
    )
    with pytest.raises(InputError, match=r"^the scores .* are too large for float32: lower "):
        TransCLIP(device="cpu", **LARGE[name], **form).fit(features, prototypes, graph=graph)


def test_what_is_written_to_the_attributes_changes_no_prediction(problem):
    features, prototypes, _ = problem()
    model = TransCLIP(device="cpu", class_cost=True).fit(features, prototypes)
    before = model.predict_proba(features)
    for name in ("means_", "variances_", "class_costs_"):
        getattr(model, name)[:] = 7
    np.testing.assert_array_equal(model.predict_proba(features), before)
