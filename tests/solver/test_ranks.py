"""Processes that share the rows of a solve: the same bits for any number of them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy import sparse

from tests.conftest import make_problem, unit
from tests.ranks import on_ranks
from transclip_fast import InputError, NeighborGraph, TransCLIP
from transclip_fast.graph.build import build_graph
from transclip_fast.ops.exchange import Exchange, Partition
from transclip_fast.ops.ranked import RankedBackend, RankedRows
from transclip_fast.ops.torch_backend import TorchOps
from transclip_fast.ranks import Ranks, current_ranks
from transclip_fast.types import Affinity, Assignments, Truncation

pytestmark = pytest.mark.usefixtures("one_thread")

N_ROWS = 2100  # five parts: three ranks have two or one of them, six ranks at most one
SIZES = (1, 3, 6)
ROWS = ("transduction_", "zero_shot_labels_", "outlier_score_", "zero_shot_confidences_")
WHOLE = ("means_", "variances_", "objective_", "n_iter_", "gamma_", "truncation_")


def fitted(problem, graph, values, arrays):
    """The attributes of a fit, those of rows first."""
    features, text = problem
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = TransCLIP(device="cpu", **values).fit(
            features, text_features=text, graph=graph, **arrays
        )
    z = model.label_distributions_
    z = z.toarray() if sparse.issparse(z) else z
    return [z, *(getattr(model, name) for name in ROWS)], [getattr(model, n) for n in WHOLE]


def all_fitted(problem, graph, cases):
    return [fitted(problem, graph, *case) for case in cases]


def joined_rows(ranks, case):
    return [np.concatenate(parts) for parts in zip(*(rank[case][0] for rank in ranks), strict=True)]


def cases_of(features, text, labels):
    """Settings and arrays of fits."""
    rng = np.random.default_rng(1)
    shots = np.repeat(np.arange(len(text)), 4)
    support, validation = (
        unit(text[shots] + 0.1 * rng.normal(size=(len(shots), text.shape[1]))) for _ in range(2)
    )
    shown = {"support_features": support, "support_labels": shots}
    tried = {"validation_features": validation, "validation_labels": shots}
    logits = 20 * features @ text.T
    known = np.where(rng.random(N_ROWS) < 0.1, labels, -1)
    listed = sparse.csr_array(np.eye(len(text))[labels])
    lists = {"assignments": "sparse", "backend": "numba"}
    return [
        ({}, {}),
        ({"assignments": "sparse", "backend": "torch", "graph_mode": "directed"}, {}),
        ({**lists, "tol": 1e-3}, {}),
        ({**lists, "class_cost": True}, {"known_labels": known}),
        ({}, {**shown, **tried}),
        ({**lists, "gamma": 0.2}, shown),
        ({}, {"support_features": support[:7], "support_labels": shots[:7]}),
        ({}, {"prior_logits": logits, "known_labels": known}),
        (
            {**lists, "rank": 3, "candidates": 5},
            {"prior": listed},
        ),
    ]


def test_any_number_of_ranks_gives_the_same_bits():
    features, text, labels = make_problem(n=N_ROWS, k=9, noise=0.06)
    graph, cases = build_graph(features, 3), cases_of(features, text, labels)
    alone = all_fitted((features, text), graph, cases)
    first = None
    for size in SIZES:
        ranks = on_ranks(size, all_fitted, (features, text), graph, cases)
        for case, (rows, whole) in enumerate(alone):
            found = joined_rows(ranks, case)
            np.testing.assert_array_equal(found[1], rows[1])
            np.testing.assert_allclose(found[0], rows[0], atol=1e-4 if cases[case][0] else 1e-5)
            np.testing.assert_allclose(found[3], rows[3], atol=1e-6)
            for rank in ranks:
                np.testing.assert_allclose(rank[case][1][0], whole[0], atol=1e-5)
                assert rank[case][1][3:5] == whole[3:5]
        bits = [(joined_rows(ranks, case), ranks[0][case][1]) for case in range(len(cases))]
        first = first or bits
        for (rows, whole), (same_rows, same_whole) in zip(bits, first, strict=True):
            for x, y in zip([*rows, *whole], [*same_rows, *same_whole], strict=True):
                np.testing.assert_equal(x, y)


def test_golden_rows_on_two_ranks(golden_dir):
    with np.load(golden_dir / "whurs19_clip_vit-b-32.npz", allow_pickle=False) as file:
        golden = dict(file)
    features, text = golden["image_features"], golden["text_features"]
    ranks = on_ranks(2, fitted, (features, text), build_graph(features, 3), {}, {})
    z = np.concatenate([rows[0] for rows, _ in ranks])
    np.testing.assert_allclose(z, golden["official_assignments"], atol=1e-4)
    np.testing.assert_array_equal(z.argmax(1), golden["official_assignments"].argmax(1))


def hub(n_rows):
    """Everyone's only neighbour is row 0, whose own is the last row."""
    neighbors = np.zeros((n_rows, 1), np.int64)
    neighbors[0] = n_rows - 1
    return NeighborGraph(neighbors, np.full((n_rows, 1), 0.5, np.float32))


def odd_problems():
    """Fits whose ranks have very uneven work, or none."""
    few, crowd = make_problem(n=3, k=4, d=8), make_problem(n=10_500, k=4, d=8)
    return [
        fitted(few[:2], hub(3), {"n_neighbors": 1}, {}),
        fitted(crowd[:2], hub(10_500), {"n_neighbors": 1, "inner_iter": 2}, {}),
    ]


def refused(change, changed=(1,)):
    """The error of a fit of which some ranks have something else."""
    features, text, _ = make_problem(n=600, k=4, d=8)
    values, arrays = {"device": "cpu", "n_neighbors": 1}, {"X": features, "text_features": text}
    if current_ranks().rank in changed:
        change(values, arrays)
    try:
        TransCLIP(**values).fit(**{"graph": hub(600)} | arrays)
    except InputError as error:
        return str(error)
    return "none"


def other_features(values, arrays):
    arrays["X"] = arrays["X"][::-1].copy()


def other_parameters(values, arrays):
    values["gamma"] = 0.5


def other_graph(values, arrays):
    graph = hub(600)
    graph.neighbors[2] = 1
    arrays["graph"] = graph


def damaged(values, arrays):
    arrays["X"] = arrays["X"].copy()
    arrays["X"][599, 2] = np.nan


def bytes_sent():
    """Bytes that ranks say they sent, and what their docstring says; for a sweep and a sum."""
    found, ranks = [], current_ranks()
    partition = Partition(2100, ranks)
    own, exchange = partition.rows, Exchange(partition)
    n_own = own.stop - own.start
    features = RankedRows(np.ones((2100, 5), np.float32), "X", torch.device("cpu"), exchange)
    # Row 7 is a neighbour of every row, that of the first rank.
    columns = exchange.set_halo(torch.full((n_own,), 7))
    offsets = torch.arange(n_own + 1)
    affinity = Affinity(offsets, columns, torch.ones(n_own))
    halos = 0 if ranks.rank else ranks.size - 1
    for truncation, row_bytes in ((None, 4 * 6), (Truncation(3, 3), 4 + 8 * 2)):
        z = Assignments.empty(n_own, 6, truncation, torch.device("cpu"))
        z.values[:, :2] = 0.5
        ops = RankedBackend(TorchOps, exchange)(affinity)
        z, exchange.sent = ops.room(z), 0
        ops.energies(z)
        sums_of_two = joins(partition) * 16 + (0 if ranks.rank else 16 * (ranks.size - 1))
        found.append((exchange.sent, halos * row_bytes + sums_of_two))
        exchange.sent = 0
        ops.class_sums(z, features)
        times = joins(partition) + (0 if ranks.rank else ranks.size - 1)
        found.append((exchange.sent, 8 * 7 * 6 * times))
    return found


def joins(partition, low=0, high=None):
    """How many of a rank's subtrees join one of another rank: what it sends up the tree."""
    high = partition.n_parts if high is None else high
    if high - low < 2:
        return 0
    middle = (low + high) // 2
    owners = partition.owner(low), partition.owner(middle)
    sends = owners[0] != owners[1] == partition.ranks.rank
    return sends + joins(partition, low, middle) + joins(partition, middle, high)


def several_checks():
    refusals = [refused(change) for change in (other_features, other_parameters, other_graph)]
    return odd_problems(), bytes_sent(), refusals, refused(damaged, range(4))


def test_uneven_work_bytes_and_refusals():
    alone = odd_problems()
    ranks = on_ranks(4, several_checks)
    for problem, (rows, whole) in enumerate(alone):
        parts = [rank[0][problem][0] for rank in ranks]
        found = [np.concatenate(part) for part in zip(*parts, strict=True)]
        np.testing.assert_array_equal(found[1], rows[1])
        np.testing.assert_allclose(found[0], rows[0], atol=1e-4)
        np.testing.assert_allclose(ranks[0][0][problem][1][0], whole[0], atol=1e-5)
    assert [len(rank[0][0][0][0]) for rank in ranks] == [3, 0, 0, 0]
    assert "X: row 599 contains NaN" in ranks[2][3]  # the rank that has the row
    assert all("another rank ended early" in ranks[rank][3] for rank in (0, 1, 3))
    for _, sent, refusals, _ in ranks:
        assert all(found == expected for found, expected in sent)
        for name, refusal in zip(("features", "parameters", "graph"), refusals, strict=True):
            assert f"{name}: rank 1 has other ones than rank 0" in refusal


@pytest.mark.parametrize("n_rows", [1, 511, 512, 513, 8192, 8193, 100_000, 5_000_001])
@pytest.mark.parametrize("size", [1, 2, 3, 64, 100])
def test_every_part_has_one_owner(n_rows, size):
    partitions = [Partition(n_rows, Ranks(rank, size)) for rank in range(size)]
    rows = [partition.rows for partition in partitions]
    assert rows[0].start == 0
    assert rows[-1].stop == n_rows
    assert [part.stop for part in rows[:-1]] == [part.start for part in rows[1:]]
    n_own = [part.stop - part.start for part in rows]
    assert max(n_own) == partitions[0].most_rows
    assert sum(len(partition.parts) for partition in partitions) == partitions[0].n_parts <= 64
    owners = [partitions[0].owner(part) for part in range(partitions[0].n_parts)]
    assert owners == sorted(owners)
    assert np.bincount(owners, minlength=size).tolist() == [len(p.parts) for p in partitions]
