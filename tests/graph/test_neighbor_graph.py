"""Neighbour lists: which are refused, and how they are cut."""

import numpy as np
import pytest
import torch

from transclip_fast import InputError, TransCLIP, build_graph
from transclip_fast.graph.neighbor_graph import NeighborGraph
from transclip_fast.methods import StatA, ZLaP


def graph(**changes):
    """Lists of 2 neighbours of 4 rows."""
    values = {
        "neighbors": np.array([[1, 2], [0, 3], [3, -1], [2, 0]]),
        "similarities": np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.0], [0.6, 0.3]], np.float32),
    }
    return NeighborGraph(**{**values, **changes}, info={"method": "hand"})


def test_cut_to_the_best():
    full = graph()
    assert (len(full), full.n_neighbors) == (4, 2)
    cut = full.check(4, 1)
    np.testing.assert_array_equal(cut.neighbors, [[1], [0], [3], [2]])
    np.testing.assert_allclose(cut.similarities, [[0.9], [0.8], [0.7], [0.6]])
    assert cut.info == full.info
    assert full.check(4, 2).n_neighbors == 2


@pytest.mark.parametrize(
    ("changes", "sizes", "message"),
    [
        ({}, (5, 2), "has 4 rows, the features have 5"),
        ({}, (4, 3), "lists have 2 neighbours, 3 are needed"),
        ({"similarities": np.zeros((4, 3))}, (4, 2), "differ in shape"),
        ({"neighbors": np.zeros(4, int), "similarities": np.zeros(4)}, (4, 2), "shape"),
        ({"neighbors": np.zeros((4, 2))}, (4, 2), "must be integers, got float64"),
        ({"neighbors": np.array([[1, 2], [0, 4], [3, 1], [2, 0]])}, (4, 2), "row 1 has"),
        ({"neighbors": np.array([[1, 2], [0, 3], [3, -2], [2, 0]])}, (4, 2), "row 2 has"),
        ({"neighbors": np.array([[1, 2], [0, 3], [3, 1], [2, 3]])}, (4, 2), "row 3 has"),  # itself
        ({"similarities": np.array([[1, 0], [1, 2], [1, 1], [1, 0]])}, (4, 1), "of row 1 are not"),
        ({"similarities": np.array([[1, np.nan]] + [[1, 1]] * 3)}, (4, 2), "row 0 has"),
        ({"similarities": np.array([[1, 1]] * 3 + [[1, np.inf]])}, (4, 2), "row 3 has"),
    ],
)
def test_errors(changes, sizes, message):
    with pytest.raises(InputError, match=message) as error:
        graph(**changes).check(*sizes, name="lists.npy")
    assert str(error.value).startswith("lists.npy: ")
    assert "\n" not in str(error.value)


def test_lists_that_are_used_whole_have_any_order():
    """After the neighbours, some of negative similarity, come the places of those that lack."""
    rising = graph(similarities=np.array([[0.1, 0.9], [0.8, 0.2], [-0.7, 0.0], [0.6, 0.3]]))
    assert rising.check(4, 2).n_neighbors == 2
    graph(similarities=np.array([[0.9, 0.1], [0.8, 0.2], [-0.7, 0.0], [0.6, 0.3]])).check(4, 1)


def test_lists_may_be_tensors():
    own = graph()
    lists = torch.from_numpy(own.neighbors), torch.from_numpy(own.similarities)
    checked = NeighborGraph(*lists).check(4, 1)
    np.testing.assert_array_equal(checked.neighbors, own.neighbors[:, :1])


def frozen(array):
    array.setflags(write=False)
    return array


KINDS = {
    **{f"ids {kind}": (kind, "float32") for kind in ("int8", "uint8", "uint32", ">i4", ">i8")},
    **{kind: ("int64", kind) for kind in ("float16", ">f4", "float64", "longdouble")},
    "reversed": (lambda a: a[:, ::-1].copy()[:, ::-1],) * 2,
    "Fortran": (np.asfortranarray,) * 2,
    "frozen": (frozen,) * 2,
    "lists": (np.ndarray.tolist,) * 2,
    "tensors": (torch.from_numpy, lambda a: torch.from_numpy(a).bfloat16().requires_grad_()),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("assignments", ["dense", "sparse"])
def test_lists_of_any_type_and_order_are_the_same(problem, kind, assignments):
    features, prototypes, _ = problem()
    made = build_graph(features)
    arrays = made.neighbors, (256 * made.similarities).round() / 256  # exact in half
    changed = [
        array.astype(change) if isinstance(change, str) else change(array.copy())
        for array, change in zip(arrays, KINDS[kind], strict=True)
    ]
    for model in (TransCLIP(device="cpu", assignments=assignments), ZLaP(n_neighbors=3)):
        found, expected = (
            model.fit(
                features, text_features=prototypes, graph=NeighborGraph(*lists)
            ).label_distributions_
            for lists in (changed, arrays)
        )
        assert abs(found - expected).max() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neighbors": [[1, 2], [0]]}, "^neighbors: expected an array, got rows of different"),
        (
            {"similarities": [["a", "b"]] * 4},
            "^similarities: expected numbers, got",
        ),
        ({"similarities": np.ones((4, 2), object)}, "^similarities: expected numbers, .* object"),
        ({"similarities": np.ones((4, 2), complex)}, "^similarities: expected numbers"),
        ({"neighbors": torch.ones(4, 2).to_sparse()}, "^neighbors: is a sparse tensor"),
    ],
)
def test_lists_that_are_no_numbers(changes, message):
    with pytest.raises(InputError, match=message):
        graph(**changes)


def test_similarities_beyond_float32_are_refused():
    with pytest.raises(InputError, match="row 1 has an impossible neighbour"):
        graph(similarities=np.array([[1, 1], [1e300, 1], [1, 1], [1, 1]])).check(4, 2)


def test_what_is_cut_off_may_be_wrong():
    wrong_tail = graph(neighbors=np.array([[1, 9], [0, 3], [3, -1], [2, 0]]))
    wrong_tail.check(4, 1)


def test_masked_lists_are_refused():
    with pytest.raises(InputError, match=r"similarities: has masked values \(1\)"):
        graph(similarities=np.ma.masked_equal(graph().similarities, np.float32(0.1)))


def test_a_graph_is_equal_to_itself_alone():
    """Arrays have no single answer; a graph can be looked for in a list, and be a key."""
    first, second = graph(), graph()
    assert first == first
    assert first != second
    assert [second, first].index(first) == 1
    assert {first: 1, second: 2}[second] == 2


@pytest.mark.parametrize("model", [TransCLIP(device="cpu"), StatA(device="cpu")])
def test_what_a_function_returns_instead_of_a_graph(model, problem):
    features, prototypes, _ = problem()
    with pytest.raises(InputError, match=r"^graph: the function returned tuple, expected a Neigh"):
        model.fit(features, text_features=prototypes, graph=lambda rows: (1, 2))


@pytest.mark.parametrize("model", [TransCLIP(device="cpu"), StatA(device="cpu")])
@pytest.mark.parametrize("lists", ["given", "made"])
def test_lists_of_rows_in_another_order(model, lists, problem):
    features, prototypes, _ = problem(noise=0.2)
    graph, order = build_graph(features), np.random.default_rng(0).permutation(len(features))
    given = graph if lists == "given" else lambda rows: graph
    with pytest.warns(UserWarning, match=r"^graph: says that rows 0 and \d+ have the similarity 0"):
        model.fit(features[order], text_features=prototypes, graph=given)
    half = features.astype(np.float16)
    for rows in (features, half):  # other digits are no other order
        model.fit(rows, text_features=prototypes, graph=given)


@pytest.mark.parametrize("recall", ["all", None, float("nan"), 1.5])
def test_recalls_that_are_none(recall, problem):
    with pytest.raises(InputError, match="^recall must be between 0 and 1, got"):
        build_graph(problem()[0], recall=recall)


@pytest.mark.parametrize("device", ["auto", "cpu", torch.device("cpu")])
def test_devices_of_a_search(device, problem, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    features, _, _ = problem()
    expected = build_graph(features)
    np.testing.assert_array_equal(
        build_graph(features, device=device).neighbors, expected.neighbors
    )


@pytest.mark.parametrize("device", ["cuda:99", "nope", torch.device("cuda", 99)])
def test_devices_that_are_none(device, problem):
    with pytest.raises(InputError, match=f"^device '{device}' cannot be used"):
        build_graph(problem()[0], device=device)
