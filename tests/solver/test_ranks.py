"""Processes that share the rows of a solve: the same bits for any number of them."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from scipy import sparse

from tests.conftest import make_problem, unit
from tests.ranks import on_ranks
from tests.solver.test_class_cost_choice import apart, weak
from transclip_fast import InputError, NeighborGraph, TransCLIP
from transclip_fast.graph.affinity import affinity
from transclip_fast.graph.build import build_graph
from transclip_fast.metrics import outlier_scores
from transclip_fast.ops.exchange import Exchange, Partition
from transclip_fast.ops.ranked import RankedBackend, RankedRows, neighbor_places
from transclip_fast.ops.torch_backend import TorchOps
from transclip_fast.ranks import Ranks, current_ranks
from transclip_fast.types import Assignments, Scores, Truncation

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
    cases = [
        ({}, {}),
        ({"assignments": "sparse", "backend": "torch", "graph_mode": "directed"}, {}),
        ({**lists, "tol": 1e-3, "max_iter": 10}, {}),
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
    return [({"max_iter": 3, **values}, arrays) for values, arrays in cases]


def test_any_number_of_ranks_gives_the_same_bits():
    features, text, labels = make_problem(n=N_ROWS, k=9, noise=0.06)
    graph, cases = build_graph(features, 3), cases_of(features, text, labels)
    alone = all_fitted((features, text), graph, cases)
    assert alone[2][1][3] < 10  # stops by its tol
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


def test_ranks_decide_alike():
    """With and without a class cost: the choice has the bits of one process, too."""
    for features, texts in (weak(0, N_ROWS), apart(N_ROWS)):  # the latter gives up the cost
        graph = build_graph(features, 3)
        alone = fitted((features, texts), graph, {"max_iter": 5}, {})
        for size in (2, 3):
            ranks = on_ranks(size, fitted, (features, texts), graph, {"max_iter": 5}, {})
            labels = np.concatenate([rows[1] for rows, _ in ranks])
            np.testing.assert_array_equal(labels, alone[0][1])
            assert all(whole[3:5] == alone[1][3:5] for _, whole in ranks)


class Memory:
    """A checkpoint that keeps every state."""

    def __init__(self, state=None):
        self.state, self.states = state, []

    def load(self):
        return self.state

    def keep(self, state):
        self.states.append({name: np.array(array) for name, array in state().items()})


def resumed(problem, graph, values):
    """A fit, the same resumed after each of its steps, and the states of these."""
    kept = Memory()
    whole = fitted(problem, graph, values, {"checkpoint": lambda *_: kept})
    again = [
        fitted(problem, graph, values, {"checkpoint": lambda *_, state=state: Memory(state)})
        for state in kept.states
    ]
    return whole, again, kept.states


@pytest.mark.parametrize("values", [{}, {"class_cost": True}], ids=["published", "class cost"])
def test_ranks_resume(values):
    """The start of a class cost sends lists, too, before the state is there."""
    features, text, _ = make_problem(n=N_ROWS, k=9, noise=0.06)
    values = {"assignments": "sparse", "class_cost": False, "max_iter": 4, **values}
    ranks = on_ranks(2, resumed, (features, text), build_graph(features, 3), values)
    for whole, again, states in ranks:
        assert len(again) == len(states) == 4
        for found in again:
            for x, y in zip([*found[0], *found[1]], [*whole[0], *whole[1]], strict=True):
                np.testing.assert_equal(x, y)


def test_states_are_in_the_order_of_the_rows():
    """Lists are kept by label, which another machine may round otherwise."""
    features, text, _ = make_problem(n=N_ROWS, k=9, noise=0.06)
    values = {"assignments": "sparse", "max_iter": 4}
    whole, again, states = resumed((features, text), build_graph(features, 3), values)
    z = Assignments.empty(N_ROWS, 9, Truncation(9, 9), torch.device("cpu"))
    z.restore(states[-1])
    assert (z.best()[0].numpy() == whole[0][1]).mean() > 0.99
    np.testing.assert_equal(again[1], whole)


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


def refused(change, changed=(1,), **given):
    """The error of a fit of which some ranks have something else."""
    features, text, _ = make_problem(n=600, k=4, d=8)
    values, arrays = {"device": "cpu", "n_neighbors": 1}, {"X": features, "text_features": text}
    arrays |= given
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


def other_prior(values, arrays):
    arrays["prior"] = arrays["prior"][:, ::-1].copy()


def damaged(values, arrays):
    arrays["X"] = arrays["X"].copy()
    arrays["X"][599, 2] = np.nan


def bytes_sent():
    """Of every line of the docstring, what ranks say they sent, and what it says they do."""
    n_rows, n_classes, dim, ranks = 2100, 6, 5, current_ranks()
    rng, device, others = np.random.default_rng(0), torch.device("cpu"), ranks.size - 1
    neighbors = (np.arange(n_rows)[:, None] + rng.integers(1, n_rows, (n_rows, 3))) % n_rows
    partition = Partition(n_rows, ranks)
    own, exchange = partition.rows, Exchange(partition)
    n_own = own.stop - own.start
    features = RankedRows(np.eye(n_rows, dim, dtype=np.float32) + 1, "X", device, exchange)
    backend, found = RankedBackend(TorchOps, exchange), {}

    def sends(name, expected, action, *arguments):
        exchange.sent = 0
        result = action(*arguments)
        found[name] = exchange.sent, expected
        return result

    z = Assignments.empty(n_own, n_classes, None, device)
    weights = torch.ones(n_classes, dim)
    sends("start", 96 * n_classes * others, partial(backend.start, out=z), features, weights, None)
    ids = torch.arange(0, n_rows, 7)
    n_ids = int(((ids >= own.start) & (ids < own.stop)).sum())
    sends("features", 4 * dim * n_ids * others, features.__getitem__, ids)

    n_halo, n_wanted, n_edges = sizes_of_halos(partition, neighbors)
    graph = NeighborGraph(neighbors[own], np.ones((n_own, 3), np.float32))
    expected = 20 * n_edges + 16 * others + 8 * n_halo + 8 * n_wanted
    edges = sends("edges", expected, partial(affinity, graph, exchange=exchange))

    ops = backend(edges)
    times = joins(partition) + (0 if ranks.rank else others)  # that a sum is sent
    # Bytes of a row, of one of the same classes, of the same one; and more of a sweep.
    forms = {
        "dense": (None, 4 * n_classes, 4 * n_classes, 4 * n_classes, 0),
        "sparse": (Truncation(3, 3), 4 + 8 * 2, 4 + 4 * 2, 4, 8 * others),
    }
    for form, (truncation, new, revalued, same, more) in forms.items():
        z = Assignments.empty(n_own, n_classes, truncation, device)
        z.values[:, :2] = 0.5
        base = Scores.empty(torch.ones(n_own), n_classes, truncation)
        base.values.zero_()
        z, spare = ops.room(z), ops.room(z.empty_like())
        sweep = partial(ops.sweep, base, z, out=spare)
        sends(f"{form} sweep", new * n_wanted + more, sweep)
        sends(f"{form} sweep of the same z", 0, sweep)
        spare.values[:, 2:] = 0
        spare.values[:, :2] = 0.5
        if spare.classes is not None:
            spare.classes.zero_()
        energies = same * n_wanted + more + 16 * times
        sends(f"{form} energies of equal lists", energies, ops.energies, spare)
        z.values[:, :2] = torch.tensor([0.75, 0.25])
        energies += (revalued - same) * n_wanted
        sends(f"{form} energies of the same classes", energies, ops.energies, z)
        if spare.classes is not None:
            spare.classes[:, 1] = 5
        energies += (new - revalued) * n_wanted
        sends(f"{form} energies", energies, ops.energies, spare)
        sends(f"{form} sweep after them", 0, partial(ops.sweep, base, spare, out=z))
        sends(f"{form} class sums", 8 * 6 * 6 * times, ops.class_sums, spare, features)

    places, extend = neighbor_places(features, graph.neighbors)
    scores = np.ones(n_own, np.float32)
    sends("outlier scores", 20 * n_wanted, outlier_scores, scores, places, extend)
    columns = torch.zeros(n_own, dtype=torch.int64), torch.zeros(n_own)
    sends("labels", 8 * n_own * others, exchange.join, columns[0])
    sends("scores", 4 * n_own * others, exchange.join, columns[1])
    return found


def sizes_of_halos(partition, neighbors):
    """H, G and E of this rank, by going through all pairs of rows."""
    rank, size = partition.ranks.rank, partition.ranks.size
    firsts = [partition.first_row(r) for r in range(1, size)]
    owners = (np.arange(len(neighbors))[:, None] >= firsts).sum(1)
    ends = np.stack([np.repeat(np.arange(len(neighbors)), 3), neighbors.ravel()])
    pairs = np.concatenate([ends, ends[::-1]], axis=1)
    needed = np.unique(np.stack([owners[pairs[0]], pairs[1]]), axis=1)  # a rank, and a row
    needed = needed[:, needed[0] != owners[needed[1]]]
    n_edges = ((owners[ends[0]] == rank) & (owners[ends[1]] != rank)).sum()
    return (needed[0] == rank).sum(), (owners[needed[1]] == rank).sum(), n_edges


def joins(partition, low=0, high=None):
    """How many of a rank's subtrees join one of another rank: what it sends up the tree."""
    high = partition.n_parts if high is None else high
    if high - low < 2:
        return 0
    middle = (low + high) // 2
    owners = partition.owner(low), partition.owner(middle)
    sends = owners[0] != owners[1] == partition.ranks.rank
    return sends + joins(partition, low, middle) + joins(partition, middle, high)


def test_a_fit_without_a_graph_searches_it_over_ranks():
    features, text, _ = make_problem(n=N_ROWS, k=6, noise=0.06)
    cases = [({"assignments": "sparse"}, {})]
    given = on_ranks(1, all_fitted, (features, text), build_graph(features, 3), cases)
    found = on_ranks(3, all_fitted, (features, text), None, cases)
    for expected, array in zip(given[0][0][0], joined_rows(found, 0), strict=True):
        np.testing.assert_array_equal(array, expected)


def several_checks():
    refusals = [refused(change) for change in (other_features, other_parameters, other_graph)]
    prior = np.random.default_rng(0).dirichlet(np.ones(4), 600)
    refusals.append(refused(other_prior, prior=prior))
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
        assert {name: x for name, (x, _) in sent.items()} == {n: x for n, (_, x) in sent.items()}
        for name, refusal in zip(
            ("features", "parameters", "graph", "prior"), refusals, strict=True
        ):
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
