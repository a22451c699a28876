"""Indexes that others made: used where they hold the rows, refused where they do not."""

import json
import os
import platform
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch

from tests.conftest import unit
from tests.graph.test_exact import brute_force
from transclip_fast import InputError
from transclip_fast.data.feature_rows import Rows
from transclip_fast.graph import faiss_index, list_search
from transclip_fast.graph.build import build_graph
from transclip_fast.graph.faiss_index import lists_of, load_faiss, open_index, read_list

faiss = load_faiss()
N, D = 600, 16
FACTORIES = "Flat HNSW32 IVF16,Flat IVF16_HNSW32,Flat IVF16,SQfp16 IVF16,SQ8 IDMap2,Flat"


@pytest.fixture(scope="module")
def features():
    rng = np.random.default_rng(0)
    centres = unit(rng.normal(size=(30, D)))
    return unit(centres[rng.integers(30, size=N)] + 0.4 * rng.normal(size=(N, D))).astype("f4")


def made(features, factory, metric=faiss.METRIC_INNER_PRODUCT):
    """An index by FAISS alone."""
    index = faiss.index_factory(features.shape[1], factory, metric)
    index.train(features)
    if factory.startswith("IDMap"):
        index.add_with_ids(features, np.arange(len(features)))
    else:
        index.add(features)
    return index


def stored(index, folder):
    file = folder / "image.index"
    faiss.write_index(index, str(file))
    return file


def assert_exact(graph, features):
    """All neighbours, best first, as in float64."""
    expected_ids, expected = brute_force(features, features, 3)
    np.testing.assert_array_equal(graph.neighbors, expected_ids)
    np.testing.assert_allclose(graph.similarities, expected, atol=1e-6)


@pytest.mark.parametrize("metric", [faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2])
@pytest.mark.parametrize(
    "factory",
    [
        "Flat",
        "HNSW32",
        "IVF16,Flat",
        "IVF16_HNSW32,Flat",
        "IVF16,SQfp16",
        "IVF16,SQ8",
        "IDMap2,Flat",
    ],
)
def test_an_index_by_faiss_alone(factory, metric, features, tmp_path):
    file = stored(made(features, factory, metric), tmp_path)
    for index in (file, str(file), faiss.read_index(str(file))):
        graph = build_graph(features, 3, index=index, recall=1.0)
        assert_exact(graph, features)
        assert graph.info["search"] == "faiss"
        assert graph.info["recall"] == 1.0


def test_one_of_compressed_rows(features):
    """Few are found, which is measured and said; those that are have their true similarity."""
    with pytest.warns(UserWarning, match=r"recall is 0\.\d+, below 0.99"):
        graph = build_graph(features, 3, index="OPQ8_16,IVF4,PQ8x4np")
    expected, _ = brute_force(features, features, 3)
    found = (graph.neighbors[:, :, None] == expected[:, None, :]).any(1).mean()
    assert graph.info["recall"] == pytest.approx(found, abs=0.01)
    assert 0.3 < found < 0.99
    at = np.einsum("nd,nkd->nk", features.astype(float), features.astype(float)[graph.neighbors])
    np.testing.assert_allclose(graph.similarities, at, atol=1e-6)


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_lists_hold_the_rows(kind, features):
    index = made(features, "IVF16,Flat")
    if kind == "float16":
        half = faiss.ScalarQuantizer.QT_fp16
        index = faiss.IndexIVFScalarQuantizer(
            faiss.IndexFlatIP(D), D, 16, half, faiss.METRIC_INNER_PRODUCT, False
        )
        index.train(features)
        index.add(features)
    lists = lists_of(index).numpy()
    seen = []
    for number, part in product(range(16), (slice(0, 11), slice(11, None))):
        ids, rows = read_list(index, number, part)
        np.testing.assert_array_equal(lists[ids], number)
        np.testing.assert_allclose(rows, features[ids], atol=0 if kind == "float32" else 1e-3)
        seen += ids.tolist()
    assert sorted(seen) == list(range(N))


@pytest.mark.parametrize(
    "factory", ["IVF16,SQfp16", "IVF16,SQ8", "IVF16,PQ4x4", "IVF16,FlatPanorama4", "Flat"]
)
def test_lists_that_do_not_are_searched_by_faiss(factory, features):
    """Residual codes among them: products with those are no products with the rows."""
    assert lists_of(open_index(factory, Rows(features))) is None


def test_half_precision_does_not_reorder(features, tmp_path):
    """Neighbours that float16 cannot tell apart are told apart by float64."""
    rng = np.random.default_rng(1)
    close = unit(features[:60].repeat(5, axis=0) + 1e-4 * rng.normal(size=(300, D))).astype("f4")
    np.save(tmp_path / "x.npy", close)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    graph = build_graph(mapped, 3, search="faiss", recall=1.0)
    assert graph.info["index"].endswith(",SQfp16")
    assert_exact(graph, close)


def repeated(features):
    index = made(features, "IVF4,Flat")
    for number in range(4):
        ids, _ = read_list(index, number, slice(None))
        ids[1::2] = ids[: 2 * (len(ids) // 2) : 2]
        size = index.invlists.list_size(number)
        codes = faiss.rev_swig_ptr(index.invlists.get_codes(number), 4 * D * size).copy()
        index.invlists.update_entries(number, 0, size, faiss.swig_ptr(ids), faiss.swig_ptr(codes))
    return index


def shifted(features):
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(D))
    index.add_with_ids(features, np.arange(N) + 1000)
    return index


WRONG = {
    "dimensions": (lambda x: made(x[:, :8].copy(), "Flat"), "holds 8 dimensions, .* have 16"),
    "rows": (lambda x: made(x[1:], "Flat"), "holds 599 rows, the features have 600"),
    "order": (
        lambda x: made(x[::-1].copy(), "Flat"),
        "other rows than the features, or in another",
    ),
    "norms": (
        lambda x: made(x * np.linspace(0.1, 9, N, dtype="f4")[:, None], "Flat"),
        "other (rows|norms) than",
    ),
    "metric": (lambda x: made(x, "Flat", faiss.METRIC_L1), "neither inner product nor L2"),
    "ids": (shifted, "its ids are not the numbers of the rows"),
    "repeated": (repeated, "holds a row twice, and another not at all"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_ones(kind, features, tmp_path):
    make, expected = WRONG[kind]
    file = stored(make(features), tmp_path)
    with pytest.raises(InputError, match=rf"^({file}|index): .*{expected}"):
        build_graph(features, 3, index=str(file))


def test_files_that_are_none(features, tmp_path):
    file = stored(made(features, "IVF16,Flat"), tmp_path)
    whole = file.read_bytes()
    for content in (b"", b"IxFI", whole[: len(whole) // 2], b"\x80\x04" + whole):
        file.write_bytes(content)
        with pytest.raises(
            InputError, match=f"^{file}: is no FAISS index that can be read"
        ) as found:
            build_graph(features, 3, index=file)
        assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["folder/IVF16", "image.index", "x.faiss"])
def test_a_missing_file_is_no_factory_string(name, features):
    with pytest.raises(InputError, match=f"^{name}: no such file"):
        build_graph(features, 3, index=name)


REFUSED = "IVF Nonsense IVF0,Flat IVF16,PQ5 IVF900,Flat HNSW0 HNSW00_2x2"


@pytest.mark.parametrize("factory", REFUSED.split())
def test_factory_strings_that_faiss_refuses(factory, features):
    with pytest.raises(InputError, match=f"^index '{factory}': ") as found:
        build_graph(features, 3, index=factory)
    assert "\n" not in str(found.value)


def test_lists_on_disk_lie_beside_the_index(features, tmp_path):
    """Wherever the index says that they are."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    index = made(features, "IVF16,Flat")
    lists = faiss.OnDiskInvertedLists(16, 4 * D, str(tmp_path / "a" / "lists.data"))
    lists.merge_from_1(index.invlists)
    index.replace_invlists(lists)
    file = stored(index, tmp_path / "b")
    with pytest.raises(InputError, match=f"^{file}: is no FAISS index that can be read"):
        build_graph(features, 3, index=file)
    (tmp_path / "a" / "lists.data").rename(tmp_path / "b" / "lists.data")
    assert_exact(build_graph(features, 3, index=file, recall=1.0), features)


def test_an_index_is_saved_whole_or_not_at_all(features, tmp_path):
    file = tmp_path / "image.index"
    graph = build_graph(features, 3, search="faiss", save_index=file)
    assert [path.name for path in tmp_path.iterdir()] == ["image.index"]
    index = faiss.read_index(str(file))
    assert (index.ntotal, index.nlist) == (N, graph.info["lists"])
    again = build_graph(features, 3, index=file)
    np.testing.assert_array_equal(again.neighbors, graph.neighbors)
    with pytest.raises(InputError, match="its folder does not exist"):
        build_graph(features, 3, search="faiss", save_index=tmp_path / "none" / "x.index")
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "folder", "", ".", "/"):
        with pytest.raises(InputError, match="is a folder; name a file"):
            build_graph(features, 3, search="faiss", save_index=place)
    np.save(tmp_path / "x.npy", features)
    before = (tmp_path / "x.npy").read_bytes()
    with pytest.raises(InputError, match="x.npy: is there and is no FAISS index"):
        build_graph(features, 3, search="faiss", save_index=tmp_path / "x.npy")
    assert (tmp_path / "x.npy").read_bytes() == before
    (tmp_path / "x.npy").unlink()
    with pytest.raises(InputError, match="for an index that is made here"):
        build_graph(features, 3, index=file, save_index=tmp_path / "y.index")
    with pytest.raises(InputError, match="cannot be written"):
        build_graph(features, 3, search="faiss", save_index=tmp_path / ("x" * 250))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "image.index"]


SCRIPT = """
import json, os, sys
import numpy as np
from transclip_fast import build_graph
from transclip_fast.graph.faiss_index import blas_kernel
rows = np.load(sys.argv[1])
graphs = [build_graph(rows, 3, search="faiss"), build_graph(rows, 3, index="IVF16,Flat")]
lists = [graph.neighbors.tolist() for graph in graphs]
print(json.dumps([lists, blas_kernel(), os.environ.get("OPENBLAS_CORETYPE")]))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86's kernels")
def test_any_kernel_finds_the_same(features, tmp_path):
    np.save(tmp_path / "x.npy", features)
    found = []
    for kernel in (None, "Nehalem"):
        environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"}
        if kernel:
            environment["OPENBLAS_CORETYPE"] = kernel
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "x.npy")]
        ran = subprocess.run(command, env=environment, capture_output=True, check=True, text=True)
        graphs, used, left = json.loads(ran.stdout)
        assert left == kernel  # the environment is as it was
        assert used in (kernel, None) or (kernel is None and used in faiss_index.AVX2_KERNELS)
        found.append(graphs)
    assert found[0] == found[1]


def test_a_wrong_product_is_noticed():
    def knn(rows, others, k, metric):
        values = np.sort(rows @ others.T, axis=1)[:, ::-1].copy()
        values[7, 3] += 0.1
        return values, None

    class Module:
        METRIC_INNER_PRODUCT = 0

    Module.knn = staticmethod(knn)
    faiss_index.check_products(faiss)
    for _ in range(2):
        with pytest.raises(InputError, match="multiplies wrongly"):
            faiss_index.check_products(Module)
    with pytest.raises(InputError, match="there in part, .* uninstall all, install one: pip"):
        faiss_index.check_products(object())  # of a folder without its files


def test_old_kernels_are_named(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for kernel, expected in (("Prescott", True), ("SkylakeX", False), (None, False)):
        monkeypatch.setattr(faiss_index, "blas_kernel", lambda kernel=kernel: kernel)
        line = faiss_index.old_kernel()
        assert bool(line) == expected
        assert not expected or f"its {kernel} kernels" in line
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(faiss_index, "blas_kernel", lambda: "Prescott")
    assert faiss_index.old_kernel() is None


def test_without_faiss(features, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match="FAISS cannot be imported .*: pip install faiss-cpu"):
        load_faiss()
    with pytest.raises(InputError, match="FAISS cannot be imported"):
        build_graph(features, 3, search="faiss")
    assert build_graph(features, 3).info["search"] == "exact"


def test_long_and_short_lists(monkeypatch):
    """A list of most rows, and rows alone in theirs, in blocks of any shape."""
    rng = np.random.default_rng(0)
    one = unit(rng.normal(size=D) + 0.2 * rng.normal(size=(500, D)))
    features = np.concatenate([one, unit(rng.normal(size=(60, D)))]).astype("f4")
    expected = build_graph(features, 3, search="exact")
    for products, fewest, most in ((1 << 20, 256, 4096), (64, 3, 7), (200, 1, 9)):
        monkeypatch.setattr(list_search, "BLOCK_PRODUCTS", products)
        monkeypatch.setattr(list_search, "FEWEST_QUERIES", fewest)
        monkeypatch.setattr(list_search, "MOST_QUERIES", most)
        found = build_graph(features, 3, search="faiss", recall=1.0)
        np.testing.assert_array_equal(found.neighbors, expected.neighbors)


def test_no_more_effort_than_helps(features):
    """Compressed rows miss the recall however many lists are probed."""
    with pytest.warns(UserWarning, match="recall is"):
        graph = build_graph(features, 3, index="IVF100,PQ1x3np")
    assert graph.info["probes"] < 100


def test_the_callers_threads_stay(features):
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(3)
    try:
        for index in (None, "HNSW8", "IVF16,Flat"):
            build_graph(features, 3, search="faiss", index=index)
            assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(before)


@pytest.mark.parametrize("index", [5, 1.5, ["Flat"], b"Flat"])
def test_what_is_no_index(index, features):
    with pytest.raises(InputError, match="expected a FAISS index, a? ?file or a? ?factory string"):
        build_graph(features, 3, index=index)


def test_a_folder_is_no_index(features, tmp_path):
    with pytest.raises(InputError, match="is a folder, no FAISS index"):
        build_graph(features, 3, index=str(tmp_path))


def test_a_damaged_index_claims_no_memory(features, tmp_path):
    """A size in a file of 40 KB that claims 2 GiB: FAISS would take them before it reads."""
    if not hasattr(faiss, "set_deserialization_vector_byte_limit"):
        pytest.skip("this FAISS has no limit")
    file = stored(made(features, "Flat"), tmp_path)
    content = bytearray(file.read_bytes())
    place = content.index((N * D).to_bytes(8, "little"))
    content[place : place + 8] = (2**29).to_bytes(8, "little")
    file.write_bytes(content)
    before = faiss.get_deserialization_vector_byte_limit()
    with pytest.raises(InputError, match="is no FAISS index that can be read: .*limit"):
        open_index(file, Rows(features))
    assert faiss.get_deserialization_vector_byte_limit() == before


@pytest.mark.parametrize("scanned", [1 << 20, 7])
def test_a_damaged_index_claims_no_lists(features, tmp_path, monkeypatch, scanned):
    """42 million lists: FAISS would make them, of 6.7 GB, before it reads what is in them."""
    monkeypatch.setattr(faiss_index, "SCANNED_BYTES", scanned)
    file = stored(made(features, "IVF4,Flat"), tmp_path)
    content = file.read_bytes()
    place = content.index(b"ilar") + 4
    assert content[place : place + 8] == (4).to_bytes(8, "little")
    open_index(file, Rows(features))
    file.write_bytes(content[:place] + (42_000_000).to_bytes(8, "little") + content[place + 8 :])
    with pytest.raises(InputError, match="it claims 42,000,000 inverted lists"):
        open_index(file, Rows(features))


def test_bytes_that_look_like_lists_are_none(tmp_path, features):
    """Before those of the index there may be any bytes, here of a vector of the centres."""
    index = made(features, "IVF4,Flat")
    centres = index.quantizer.reconstruct_n(0, 4)
    centres[0, :3] = np.frombuffer(b"ilar" + b"\xff\x3f\xff\x3f" * 2, np.float32)
    quantizer = faiss.IndexFlatIP(D)
    quantizer.add(centres)
    index.quantizer, index.nprobe = quantizer, 4
    file = stored(index, tmp_path)
    assert file.read_bytes().count(b"ilar") == 2
    assert open_index(file, Rows(features)).nlist == 4


def test_an_index_that_is_a_fifo_is_not_waited_for(features, tmp_path):
    os.mkfifo(tmp_path / "image.index")
    with pytest.raises(InputError, match=r"image\.index"):
        open_index(str(tmp_path / "image.index"), Rows(features))
