"""Rows that stay in files are those that were held in memory, whatever is asked of them."""

import os
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import unit
from transclip_fast import InputError, TransCLIP
from transclip_fast.data import feature_rows as rows
from transclip_fast.data.checks import as_unit_rows, unit_sample, unread_matrix
from transclip_fast.data.feature_rows import Rows
from transclip_fast.data.npy_shards import Shard, StoredRows
from transclip_fast.ops import blocks as blocks_
from transclip_fast.solver.layout import Layout


@pytest.fixture
def stored(tmp_path):
    """Maker of stored rows from an array, cut into shards of these lengths."""

    def make(array, lengths):
        files = [tmp_path / f"{number}.npy" for number in range(len(lengths))]
        parts = np.split(array, np.cumsum(lengths)[:-1])
        for file, part in zip(files, parts, strict=True):
            np.save(file, part)
        return StoredRows([Shard.find(file) for file in files])

    return make


def features(n=77, d=33, dtype=np.float32, seed=0):
    return unit(np.random.default_rng(seed).normal(size=(n, d))).astype(dtype)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.data())
def test_stored_rows_are_the_array(tmp_path_factory, lengths, data):
    array = np.arange(3.0 * sum(lengths)).reshape(-1, 3)
    folder = tmp_path_factory.mktemp("rows")
    for number, part in enumerate(np.split(array, np.cumsum(lengths)[:-1])):
        np.save(folder / f"{number}.npy", part)
    found = StoredRows([Shard.find(folder / f"{i}.npy") for i in range(len(lengths))])
    assert (found.shape, found.dtype) == (array.shape, array.dtype)
    np.testing.assert_array_equal(np.asarray(found), array)
    n = len(array)
    numbers = st.integers(-n - 1, n)
    indices = st.one_of(
        st.slices(n),
        numbers,
        numbers.map(np.int64),
        st.lists(numbers, max_size=20),
        st.lists(numbers, max_size=20).map(lambda ids: np.array(ids, np.int8)),
        st.lists(st.booleans(), min_size=n, max_size=n).map(lambda mask: np.array(mask, bool)),
    )
    index = data.draw(indices)
    try:
        expected = array[index]
    except IndexError:
        with pytest.raises(IndexError, match="there is no such row"):
            found[index]
    else:
        np.testing.assert_array_equal(found[index], expected, strict=True)


@pytest.mark.parametrize(
    "index",
    [(1, 2), None, True, 1.0, "1", np.zeros((2, 2), int), np.ones(76, bool), [0.0]],
    ids=str,
)
def test_indices_that_are_not_of_rows_alone(index, stored):
    with pytest.raises(IndexError, match=r"by number, slice, numbers or mask \(77,\)"):
        stored(features(), [40, 37])[index]


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("index", [slice(None, None, 5), slice(60, 3, -7), slice(3, 3, 2)])
def test_slices_with_steps(index, held, stored):
    array = features()
    for source in (array, stored(array, [40, 37])):
        np.testing.assert_array_equal(Rows(source, held=held)[index], array[index])
    with pytest.raises(IndexError, match="consecutive"):
        stored(array, [40, 37]).part(slice(0, 9, 2))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(3),
        np.zeros((3, 2), int),
        np.asfortranarray(np.ones((3, 2))),
        np.ones((3, 2), ">f4"),
    ],
    ids=["vector", "integers", "columns first", "other byte order"],
)
def test_what_is_not_read_in_slices(array, tmp_path):
    np.save(tmp_path / "x.npy", array)
    assert Shard.find(tmp_path / "x.npy") is None


def test_files_that_change_meanwhile(stored, tmp_path):
    found = stored(features(), [40, 37])
    file = tmp_path / "1.npy"
    assert len(found[30:50]) == 20
    whole, written = file.read_bytes(), os.stat(file)
    (tmp_path / "other.npy").write_bytes(whole)  # as `cp -p` leaves it
    os.utime(tmp_path / "other.npy", ns=(written.st_atime_ns, written.st_mtime_ns))
    (tmp_path / "other.npy").rename(file)
    for ids in (slice(30, 50), np.array([3, 76])):
        with pytest.raises(InputError, match=r"1\.npy: was changed while it was read"):
            found[ids]
    assert len(found[:40]) == 40
    file.unlink()
    with pytest.raises(InputError, match=r"1\.npy: no such file"):
        found[30:50]


def test_files_that_are_cut_at_the_same_moment(stored, tmp_path, monkeypatch):
    monkeypatch.setattr("transclip_fast.data.npy_shards._state", lambda _: ())
    found = stored(features(), [40, 37])
    file = tmp_path / "1.npy"
    file.write_bytes(file.read_bytes()[:500])
    for ids in (slice(30, 50), np.array([3, 76])):
        with pytest.raises(InputError, match=r"1\.npy: was cut short while it was read"):
            found[ids]


def sources(array, stored, tmp_path):
    np.save(tmp_path / "mapped.npy", array)
    return {
        "array": array,
        "tensor": torch.from_numpy(array),
        "memory map": np.load(tmp_path / "mapped.npy", mmap_mode="r"),
        "shards": stored(array, [30, 40, 7]),
    }


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("off", [False, True])
def test_rows_are_unit_rows(dtype, held, off, stored, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "BLOCK_BYTES", 64 * 4 * 33)
    array = features(dtype=dtype)
    if off:
        array[[5, 70]] *= 3
    warning = "2 of 77 rows were not unit vectors"
    with pytest.warns(UserWarning, match=warning) if off else nullcontext():
        expected = as_unit_rows(array, "x")
    for source in sources(array, stored, tmp_path).values():
        with pytest.warns(UserWarning, match=warning) if off else nullcontext():
            found = Rows(source, held=held)
        assert (len(found), found.shape) == (77, (77, 33))
        ids = torch.tensor([[70, 5, 0], [1, 70, 76]])
        for at in (slice(None), slice(3, 70), slice(70, 200), ids, ids[0]):
            assert torch.equal(found[at], expected[at])
            assert found[at].dtype == torch.float32
        assert torch.equal(torch.cat([found[block] for block in found.blocks()]), expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("ids", [[5], [70, 5, 0, 76, 5, 30, 31], range(77)])
@pytest.mark.filterwarnings("ignore:.*were not unit vectors")
def test_a_sample_has_the_bits_of_rows(ids, dtype, stored, tmp_path):
    array = features(dtype=dtype)
    array[[5, 70]] *= np.array([[3], [1e-3]], dtype)
    array[30] *= 1 + 1.5e-3  # less than the tolerance
    chosen = torch.tensor(ids)
    given = sources(array, stored, tmp_path) | {"columns first": np.asfortranarray(array)}
    for source in given.values():
        for held in (True, False):
            expected = Rows(source, held=held)[chosen]
            assert torch.equal(unit_sample(unread_matrix(source, "x"), chosen), expected)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "row 60 contains NaN"),
        (np.inf, "row 60 contains an infinite value"),
        (0, "row 60 is all zero"),
    ],
)
@pytest.mark.parametrize("held", [True, False])
def test_bad_rows_are_named(value, message, held, stored, tmp_path):
    array = features()
    array[60] = value
    for source in sources(array, stored, tmp_path).values():
        with pytest.raises(InputError, match=f"^x: .*{message}"):
            Rows(source, "x", held=held)


@pytest.mark.parametrize("held", [True, False])
def test_mapped_rows(held, stored):
    array = features(dtype=np.float16)
    plain = Rows(stored(array, [30, 47]), held=held)
    squares = plain.mapped(lambda x: torch.cat([x, x * x], -1), 66)
    twice = squares.mapped(lambda x: x[..., 30:37] + 1, 7)
    assert (squares.shape, twice.shape, len(twice)) == ((77, 66), (77, 7), 77)
    both = np.concatenate([plain[:], plain[:] ** 2], 1)
    ids = torch.tensor([[3, 76, 0], [5, 5, 40]])
    np.testing.assert_array_equal(squares[11:70], both[11:70])
    np.testing.assert_array_equal(squares[ids], both[ids])
    np.testing.assert_array_equal(twice[ids], both[ids][..., 30:37] + 1)
    assert plain[:].shape == (77, 33)
    covered = torch.cat([squares[block] for block in squares.blocks()])
    np.testing.assert_array_equal(covered, both)


def test_reads_are_counted(stored):
    found, seen = Rows(stored(features(), [77])), []
    found.on_read = seen.append
    found[3:10], found[70:90], found[torch.tensor([1, 2])]
    assert seen == [7, 7]


@pytest.mark.parametrize("assignments", ["dense", "sparse"])
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("dim", [32, 33])
def test_streamed_and_held_give_the_same_bits(
    problem, stored, assignments, backend, dim, monkeypatch
):
    """Whatever type the features are stored in, and with many blocks."""
    monkeypatch.setitem(blocks_.READ_ROWS, "cpu", 32)
    monkeypatch.setitem(blocks_.GEMM_ROWS, "cpu", (16, 32))
    images, prototypes, _ = problem(n=177, d=dim)
    images = images.astype(np.float16)
    models = []
    for held in (True, False):
        monkeypatch.setattr(
            "transclip_fast.solver.problem.choose_layout",
            lambda *_, held=held, **__: Layout(6 if assignments == "sparse" else None, held),
        )
        model = TransCLIP(device="cpu", backend=backend, candidates=None)
        models.append(model.fit(stored(images, [100, 77]), prototypes))
    for name in ("means_", "variances_", "objective_", "zero_shot_confidences_"):
        np.testing.assert_array_equal(getattr(models[0], name), getattr(models[1], name))
    held, streamed = (model.label_distributions_ for model in models)
    assert (held != streamed).sum() == 0
    assert [model.layout_.held for model in models] == [True, False]


class Gpu:
    """Streams whose work is done when somebody waits for it, and never earlier."""

    class Event:
        done = True

        def record(self, stream):
            self.done, self.stream = False, stream
            stream.recorded.append(self)

        def synchronize(self):
            if not self.done:
                before = self.stream.recorded.index(self) + 1
                for event in self.stream.recorded[:before]:
                    event.done = True
                del self.stream.recorded[:before]

    class Stream:
        def __init__(self, device=None):
            self.recorded = []

        def wait_event(self, event):
            pass


def test_reads_do_not_run_ahead_of_the_gpu(monkeypatch):
    """However slow it is, three blocks are there at most: at work, copied, and on its way."""
    computing, work, source = Gpu.Stream(), [], torch.from_numpy(features())
    monkeypatch.setattr(rows, "_event", Gpu.Event)
    monkeypatch.setattr(torch.cuda, "Stream", Gpu.Stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **named: empty(*size, **named))
    fetched, unfinished = [], []

    def read(block):
        fetched.append(block.start)
        unfinished.append(len(fetched) - sum(event.done for event in work))
        return source[block]

    ahead = rows._ReadAhead(read, torch.device("cpu"), torch.float32)
    for start in range(0, 77, 7):
        block, following = slice(start, start + 7), slice(start + 7, min(start + 14, 77))
        assert torch.equal(ahead.read(block, following), source[block])
        work.append(Gpu.Event())
        work[-1].record(computing)
    assert fetched == list(range(0, 77, 7))
    assert max(unfinished) == 3


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("part", [slice(0, 77), slice(20, 21), slice(30, 77), slice(11, 11)])
def test_a_part_of_rows_is_a_slice_of_them(stored, part, held):
    array = features()
    array[::5] *= 2  # not unit
    with pytest.warns(UserWarning, match="normalised"):
        whole = Rows(stored(array, [10, 1, 0, 40, 26]), held=held)
    own = whole.part(part)
    expected = whole[part]
    assert own.shape == expected.shape
    torch.testing.assert_close(own[:], expected, rtol=0, atol=0)
    if len(own):
        last = torch.tensor([len(own) - 1, 0])
        torch.testing.assert_close(own[last], expected[last], rtol=0, atol=0)


def test_messages_number_the_rows_of_a_part_among_all():
    array = features()
    array[7] = 0
    with pytest.raises(InputError, match="row 107 is all zero"):
        Rows(array, first=100)
    array[7] = 3
    with pytest.warns(UserWarning, match="row 107 has norm"):
        Rows(array, first=100)
