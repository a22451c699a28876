"""The layout that is chosen for the memory there is."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from transclip_fast import InputError, TransCLIP
from transclip_fast.solver import layout
from transclip_fast.solver.layout import Layout, Size, choose_layout
from transclip_fast.solver.parameters import Parameters
from transclip_fast.solver.problem import Problem

CPU = torch.device("cpu")
MILLION = Size(1_000_000, 1000, 512)


@pytest.fixture(autouse=True)
def _one_gibibyte_used(monkeypatch):
    monkeypatch.setattr(layout, "PROCESS_BYTES", 1 << 30)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(16, Layout(128, True)), (5, Layout(128, False)), (3, Layout(64, False))],
)
def test_lists_first_then_held_features_then_shorter_lists(limit, expected):
    found = choose_layout(MILLION, CPU, form="sparse", memory=limit << 30)
    assert found == expected
    assert (1 << 30) + sum(found.bytes(MILLION, CPU).values()) <= limit << 30


def test_what_does_not_fit():
    with pytest.raises(InputError, match=r"need at least 2\.22 GiB, there are 1\.5 GiB; allow"):
        choose_layout(MILLION, CPU, form="sparse", memory=3 << 29)
    with pytest.raises(InputError, match="there are 4 GiB; choose assignments='sparse'"):
        choose_layout(MILLION, CPU, form="dense", memory=4 << 30)
    for longer in ({"candidates": 100}, {"rank": 100}):
        with pytest.raises(InputError, match="there are 3 GiB; leave .* out, or give at most 64,"):
            choose_layout(MILLION, CPU, form="sparse", memory=3 << 30, **longer)
    with pytest.raises(InputError, match=r"there are 1\.5 GiB; allow more, or share"):
        choose_layout(MILLION, CPU, form="sparse", candidates=100, memory=3 << 29)


@pytest.mark.parametrize(
    ("n_rows", "n_classes", "memory", "dense"),
    [
        (2_500, 500, 8, False),  # half the time of a dense solve
        (2_500, 101, 8, True),
        (1_000_000, 19, 8, True),
        (1_000_000, 128, 8, True),
        (1_000_000, 129, 8, False),
        (1_000_000, 128, 2.3, False),  # does not fit
        (100, 1000, 8, True),  # done before compiled loops are loaded
    ],
)
def test_auto_is_dense_where_that_is_faster(n_rows, n_classes, memory, dense):
    size = Size(n_rows, n_classes, 64)
    found = choose_layout(size, CPU, form="auto", memory=int(memory * 2**30))
    assert (found.candidates is None) == dense


@pytest.mark.parametrize(("n_classes", "dense"), [(64, True), (65, False)])
def test_auto_on_a_gpu(n_classes, dense):
    size = Size(20_000, n_classes, 64)
    found = choose_layout(size, torch.device("cuda"), form="auto", memory=8 << 30)
    assert (found.candidates is None) == dense


@pytest.mark.parametrize("limit", [2500, 3000, 4000, 6000, 20000])
@pytest.mark.parametrize("candidates", [None, 40])
def test_a_layout_never_takes_more_than_is_allowed(limit, candidates):
    for n_classes in (10, 1000, 21000):
        size = Size(400_000, n_classes, 768, 5)
        try:
            found = choose_layout(size, CPU, form="auto", candidates=candidates, memory=limit << 20)
        except InputError:
            continue
        assert sum(found.bytes(size, CPU).values()) <= (limit << 20) - (1 << 30)
        assert found.candidates is None or found.candidates <= n_classes


def test_a_rank_is_room_that_lists_need(problem):
    """R entries of z need as many candidates, whether memory would hold them or not."""
    size = Size(20_000, 2000, 512)
    assert choose_layout(size, CPU, form="sparse", rank=2000, memory=8 << 30).candidates == 2000
    assert choose_layout(size, CPU, form="sparse", rank=16, memory=8 << 30).candidates > 16
    with pytest.raises(InputError, match="memory: 20,000 rows and 2,000 classes"):
        choose_layout(size, CPU, form="sparse", rank=2000, memory=1200 << 20)


def test_what_else_takes_memory():
    """Copies of held features, a prior (N, K), and the best run so far if several are tried."""
    layout = Layout(64, held=True)

    def total(**values):
        size = Size(1000, 100, 32, **values)
        return size.used(CPU) + sum(layout.bytes(size, CPU).values())

    plain = total()
    assert total(copied=False) == plain - 4 * 1000 * 32
    assert total(input_bytes=12345) == plain + 12345
    assert total(halved=True) == plain + 2 * 1000 * 32
    assert total(runs=4) == total(undecided=True) == plain + 8 * 64 * 1000
    assert total(file_bytes=64000) == plain
    assert total(labelled=10) == plain + 4 * 10 * 32


def test_a_given_prior_lies_on_the_gpu():
    cuda, layout = torch.device("cuda"), Layout(64, held=False)
    table = replace(MILLION, linear=False)
    more = layout.solve_bytes(table, cuda) - layout.solve_bytes(MILLION, cuda)
    assert more == 4 * 1_000_000 * 1000
    assert layout.solve_bytes(table, CPU) == layout.solve_bytes(MILLION, CPU)
    with pytest.raises(InputError, match="1,000,000 rows and 1,000 classes"):
        choose_layout(table, cuda, form="sparse", memory=4 << 30)


def test_a_little_less_memory_changes_nothing():
    found = {
        choose_layout(MILLION, CPU, form="sparse", memory=(3 << 30) + change * (1 << 20))
        for change in range(-50, 50, 10)
    }
    assert len(found) == 1


def test_size_of_what_is_given(tmp_path):
    images = np.ones((30, 8), np.float16)
    np.save(tmp_path / "images.npy", images)
    parameters, cuda = Parameters(n_neighbors=4, gamma=0.02), torch.device("cuda")
    in_file = np.load(tmp_path / "images.npy", mmap_mode="r")

    def size_of(X, device=CPU, **arrays):
        arrays = arrays or {"text_features": np.eye(5, 8)}
        return Problem.check(X, logit_scale=100.0, **arrays).size(parameters, device)

    assert size_of(in_file) == Size(30, 5, 8, 4, file_bytes=480, undecided=True)
    assert size_of(images) == Size(30, 5, 8, 4, input_bytes=480, undecided=True)
    aligned = torch.ones(30, 8)
    assert size_of(aligned) == Size(30, 5, 8, 4, input_bytes=960, copied=False, undecided=True)
    assert size_of(aligned[1:]).copied
    assert size_of(aligned, cuda).copied
    parameters.precision = "float16"
    assert size_of(aligned).halved
    parameters.precision = "float32"
    found = size_of(in_file, prior_logits=np.zeros((30, 5)))
    assert found == Size(30, 5, 8, 4, file_bytes=480, linear=False, undecided=True)
    assert found.used(CPU) == size_of(in_file).used(CPU) + 16 * 30 * 5
    parameters.gamma = None
    shots = {name: np.eye(5, 8) for name in ("support_features", "validation_features")}
    labels = {name: np.arange(5) for name in ("support_labels", "validation_labels")}
    found = size_of(in_file, text_features=np.eye(5, 8), **shots, **labels)
    assert found == Size(30, 5, 8, 4, file_bytes=480, runs=4, labelled=10)
    known = np.arange(30) % 5 - 1
    found = size_of(images, text_features=np.eye(5, 8), known_labels=known)
    assert found == Size(30, 5, 8, 4, input_bytes=480, known=True, undecided=True)


def test_processes_that_share_the_rows():
    """Each has its part, and z of the rows of others that are neighbours of its own, twice."""
    layout = Layout(64, held=False)
    one, two, ten = (layout.bytes(replace(MILLION, ranks=ranks), CPU) for ranks in (1, 2, 10))
    most = Size(1_000_000, 1000, 512, ranks=10).own_rows
    assert 100_000 <= most < 120_000
    assert one["halo"] == one["exchange"] == 0
    assert ten["assignments"] == one["assignments"] * most // 1_000_000
    assert ten["halo"] >= 2 * 8 * 64 * 6 * most  # 3 neighbours of a row, and it is one of 3
    assert 2 * 8 * 64 * 500_000 <= two["halo"] < 2 * 8 * 64 * 600_000  # there are no more rows
    assert ten["classes"] == one["classes"]


def test_a_refusal_tells_how_many_processes_fit():
    def refused(**values):
        size = replace(Size(100_000_000, 1000, 512), **values)
        with pytest.raises(InputError) as error:
            choose_layout(size, CPU, form="sparse", memory=20 << 30)
        return size, str(error.value)

    size, message = refused()
    number = int(re.search(r"share the rows among (\d+) processes", message)[1])
    choose_layout(replace(size, ranks=number), CPU, form="sparse", memory=20 << 30)
    assert f"among {number} processes" in refused(ranks=number - 1)[1]
    assert "allow more, or solve fewer rows at a time" in refused(n_classes=10**6)[1]


def test_lists_leave_room_for_those_of_other_processes():
    size = replace(MILLION, ranks=4)
    for limit, candidates in ((2.5, 32), (4, 64), (5.5, 128)):
        found = choose_layout(size, CPU, form="sparse", memory=int(limit * 2**30))
        assert found.candidates == candidates
        assert (1 << 30) + sum(found.bytes(size, CPU).values()) <= limit * 2**30


def test_a_fit_that_does_not_fit(problem):
    features, prototypes, _ = problem()
    with pytest.raises(InputError, match="memory: 77 rows and 6 classes, dense, need"):
        TransCLIP(device="cpu", memory=100 << 20).fit(features, prototypes)


def test_a_fit_in_a_given_amount(problem):
    features, prototypes, _ = problem(n=177)
    free = TransCLIP(device="cpu", candidates=6).fit(features.astype("float16"), prototypes)
    size = Size(177, 6, 33, input_bytes=2 * 177 * 33, undecided=True)
    needed = size.used(CPU) + sum(Layout(6, held=False).bytes(size, CPU).values())
    tight = TransCLIP(device="cpu", candidates=6, memory=needed)
    tight.fit(features.astype("float16"), prototypes)
    assert (free.layout_.held, tight.layout_.held) == (True, False)
    assert (free.transduction_ == tight.transduction_).all()
