"""FAISS indexes of the rows: made here, made from a factory string, or read from a file."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transclip_fast.data.feature_rows import Rows, evenly_spaced_rows
from transclip_fast.errors import InputError, check_regular, reading
from transclip_fast.graph.centres import random_rows
from transclip_fast.ops.blocks import blocks
from transclip_fast.parallel import n_threads
from transclip_fast.whole_files import check_replaced, new_file, starts_with

ADD_ROWS = 1 << 14
CHECKED_ROWS, CHECKED_NEIGHBORS, CHECKED_SHARE = 100, 8, 0.5
LARGEST_PRODUCT_ERROR = 0.3  # of a usual product: compressed rows are off by less
COPY_SIMILARITY = 1 - 1e-6  # of two rows that are taken for one
TRAIN_ROWS_PER_LIST, TRAIN_ROWS = 64, 1 << 16  # FAISS warns below 39 rows a list
FIRST_BYTE = b"I"  # of every file of a FAISS index
TABLES_BYTES, TABLES_RATIO = 1 << 28, 64  # that FAISS may compute from a file, beyond and times it
# Inverted lists in a file, and how many they claim to be; what FAISS takes for each, even if empty.
LISTS, LIST_BYTES = re.compile(rb"il(?:ar|bl|od|pn)(.{8})", re.DOTALL), 160
SCANNED_BYTES = 1 << 20  # at a time
PLACE = re.compile(r"^Error in .* at \S+:\d+: ")  # in messages of FAISS
NOTHING = re.compile(r"(HNSW|IVF)0+(?!\d)")
PATH_SUFFIXES = (".index", ".faiss", ".bin", ".ivf")
AVX2_KERNELS = ("Haswell", "Excavator", "Zen", "SkylakeX", "Cooperlake", "Sapphirerapids")


def faiss_installed() -> bool:
    """Whether `import faiss` would find FAISS."""
    return find_spec("faiss") is not None


def load_faiss() -> Any:
    """The module; InputError if it is not installed, incomplete, or multiplies wrongly."""
    try:
        with avx2_kernels():
            import faiss
    except ImportError as error:
        raise InputError(
            f"FAISS cannot be imported ({error}): pip install faiss-cpu, or search exactly"
        ) from None
    check_products(faiss)
    return faiss


@contextmanager
def avx2_kernels() -> Iterator[None]:
    """
    Let an OpenBLAS that is loaded now use AVX2, where the user names no kernels.

    The one in FAISS's wheels is of 2021, and takes kernels of 2004 on a CPU that it does not know.
    """
    name = "OPENBLAS_CORETYPE"
    if "faiss" in sys.modules or name in os.environ or not _has_avx2():
        yield
        return
    os.environ[name] = "Haswell"
    try:
        yield
    finally:
        del os.environ[name]


@cache
def check_products(faiss: Any) -> None:
    """InputError if FAISS is incomplete, or multiplies wrongly, as an old OpenBLAS may."""
    if not hasattr(faiss, "knn"):  # what is left of two that shared a folder
        raise InputError(
            "FAISS is there in part, as after two of its packages of which one was uninstalled; "
            "uninstall all, install one: pip uninstall faiss-cpu faiss-gpu && pip install faiss-cpu"
        )
    rows = np.random.default_rng(0).standard_normal((64, 64), np.float32)
    found, _ = faiss.knn(rows, rows, 64, metric=faiss.METRIC_INNER_PRODUCT)
    expected = -np.sort(-rows.astype(np.float64) @ rows.T.astype(np.float64), axis=1)
    if not np.allclose(found, expected, atol=1e-3):
        raise InputError(
            f"FAISS's BLAS multiplies wrongly on this CPU ({blas_kernel()} kernels): set "
            "OPENBLAS_CORETYPE to older ones, or search exactly"
        )


def _has_avx2() -> bool:
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def blas_kernel() -> str | None:
    """The kernels of FAISS's OpenBLAS, such as "Haswell"; None if unknown, or not loaded."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    files = {line.split(maxsplit=5)[5] for line in lines if "faiss" in line and "openblas" in line}
    for file in sorted(files):
        with suppress(OSError):  # the file is gone
            core = getattr(ctypes.CDLL(file), "openblas_get_corename", None)
            if core is not None:
                core.restype = ctypes.c_char_p
                return str(core().decode())
    return None


def old_kernel() -> str | None:
    """A line on FAISS's kernels where they are older than this CPU, else None."""
    kernel = blas_kernel()
    if kernel is None or kernel in AVX2_KERNELS or not _has_avx2():
        return None
    return (
        f"FAISS's BLAS runs its {kernel} kernels, which are older than this CPU: "
        "OPENBLAS_CORETYPE=Haswell, set before the start, makes its products several times faster"
    )


def list_index(
    rows: Rows, centres: torch.Tensor, ids: torch.Tensor, lists: torch.Tensor
) -> tuple[Any, bool]:
    """
    An index of the rows `ids` (n,) in the lists (n,) of the centres (L, d), and whether it rounds
    none.

    Rows in files are kept in float16, others in float32.
    """
    faiss = load_faiss()
    d, n_lists = rows.shape[1], len(centres)
    quantizer = faiss.IndexFlatIP(d)
    quantizer.add(centres.numpy())
    if rows.held:
        index = faiss.IndexIVFFlat(quantizer, d, n_lists, faiss.METRIC_INNER_PRODUCT)
    else:
        kind = faiss.ScalarQuantizer.QT_fp16
        index = faiss.IndexIVFScalarQuantizer(
            quantizer, d, n_lists, kind, faiss.METRIC_INNER_PRODUCT, False
        )
    index.is_trained, unrounded = True, True
    for block in blocks(len(ids), ADD_ROWS):
        x, numbers, own = rows[ids[block]], ids[block].numpy(), lists[block].numpy()
        pointers = (faiss.swig_ptr(array) for array in (x.numpy(), numbers, own))
        index.add_core(len(x), *pointers)
        unrounded &= rows.held or bool((x.half() == x).all())
    return index, unrounded


def open_index(source: Any, rows: Rows) -> Any:
    """The index of the rows in a file, from a factory string, or given as an object; checked."""
    faiss = load_faiss()
    if isinstance(source, faiss.Index):
        index, name = source, "index"
    elif is_file(source):
        index, name = _read(str(source)), str(source)
    else:
        return _factory(str(source), rows)
    with faiss_errors(name):
        _check(index, rows, name)
    return index


def is_file(source: Any) -> bool:
    """Whether an index is a file; InputError if it looks like one and is none."""
    if not isinstance(source, str | Path):
        raise InputError(
            f"index: expected a FAISS index, a file or a factory string, got {source!r}"
        )
    path = Path(source)
    if os.path.isfile(path):
        return True
    if os.path.isdir(path):
        raise InputError(f"{str(source)!r}: is a folder, no FAISS index")
    if isinstance(source, Path) or len(path.parts) > 1 or path.suffix in PATH_SUFFIXES:
        raise InputError(f"{source}: no such file")
    return False


def check_place(path: Path) -> None:
    """InputError if no index can be saved there, or one would replace a file of another kind."""
    check_replaced(path, "FAISS index", lambda file: starts_with(file, FIRST_BYTE))
    if not os.path.isdir(path.absolute().parent):
        raise InputError(f"{path}: its folder does not exist")


def save_index(index: Any, path: Path) -> None:
    """Write an index into a file, whole or not at all; InputError if that fails."""
    faiss = load_faiss()
    try:
        with new_file(path) as partial:
            faiss.write_index(index, str(partial))
    except (RuntimeError, OSError) as error:
        raise InputError(f"{path}: cannot be written: {_line(error)}") from None


@contextmanager
def faiss_errors(name: str) -> Iterator[None]:
    """One line on the index instead of FAISS's errors."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # the latter of a damaged file's sizes
        raise InputError(f"{name}: {_line(error)}") from None


@contextmanager
def faiss_threads(number: int) -> Iterator[None]:
    """FAISS's threads when it is called from this thread."""
    faiss = load_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(number)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _read(path: str) -> Any:
    faiss, unreadable = load_faiss(), f"{path}: is no FAISS index that can be read"
    # Lists on disk are looked for beside the index, wherever it says they are.
    flags = faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY
    check_regular(path)
    most = TABLES_BYTES + TABLES_RATIO * os.path.getsize(path)
    claimed = list(_claimed_lists(path, most // LIST_BYTES))
    if claimed and min(claimed) > most // LIST_BYTES:
        raise InputError(f"{unreadable}: it claims {claimed[0]:,} inverted lists")
    # FAISS says on standard output that it looks beside it.
    with faiss_errors(unreadable), _without_stdout(), _vectors_below(most):
        return faiss.read_index(path, flags)


def _claimed_lists(path: str, most: int) -> Iterator[int]:
    """Numbers of inverted lists that a file claims, up to the first that is not above `most`."""
    with reading(path), open(path, "rb") as file:
        block = b""
        while chunk := file.read(SCANNED_BYTES):
            block = block[-11:] + chunk  # one that the last block cuts, of 12 bytes
            for found in LISTS.finditer(block):
                number = int.from_bytes(found[1], "little")
                yield number
                if number <= most:
                    return


@contextmanager
def _vectors_below(most: int) -> Iterator[None]:
    """Let FAISS, where it can, take no more bytes for a vector; a damaged file claims any."""
    faiss = load_faiss()
    if not hasattr(faiss, "set_deserialization_vector_byte_limit"):  # of late 2025
        yield
        return
    before = faiss.get_deserialization_vector_byte_limit()
    faiss.set_deserialization_vector_byte_limit(most)
    try:
        yield
    finally:
        faiss.set_deserialization_vector_byte_limit(before)


@contextmanager
def _without_stdout() -> Iterator[None]:
    """Standard output goes to standard error, also that of C++."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _factory(description: str, rows: Rows) -> Any:
    """A new index of all rows."""
    faiss = load_faiss()
    name = f"index {description!r}"
    if not description or NOTHING.search(description):  # FAISS would end the process
        raise InputError(f"{name}: is no FAISS index")
    with faiss_errors(name), faiss_threads(n_threads()):
        index = faiss.index_factory(rows.shape[1], description, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            ivf = faiss.try_extract_index_ivf(index)
            size = TRAIN_ROWS if ivf is None else TRAIN_ROWS_PER_LIST * ivf.nlist
            index.train(random_rows(rows, max(size, TRAIN_ROWS)).numpy())
        for block in blocks(len(rows), ADD_ROWS):
            index.add(rows[block].numpy())
    return index


def _check(index: Any, rows: Rows, name: str) -> None:
    """InputError unless an index holds these rows, in their order."""
    faiss = load_faiss()
    if index.d != rows.shape[1]:
        raise InputError(f"{name}: holds {index.d} dimensions, the features have {rows.shape[1]}")
    if index.ntotal != len(rows):
        raise InputError(f"{name}: holds {index.ntotal:,} rows, the features have {len(rows):,}")
    if index.metric_type not in (faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2):
        raise InputError(f"{name}: its metric is neither inner product nor L2")
    ids = evenly_spaced_rows(len(rows), CHECKED_ROWS)
    some = rows[ids]
    values, found = map(torch.from_numpy, index.search(some.numpy(), CHECKED_NEIGHBORS))
    if ((found < -1) | (found >= len(rows))).any():
        raise InputError(f"{name}: its ids are not the numbers of the rows, 0 to {len(rows) - 1}")
    similarity = torch.einsum("ncd,nd->nc", rows[found.clamp_min(0)], some)
    itself = ((similarity >= COPY_SIMILARITY) & (found >= 0)).any(1)
    if itself.double().mean() < CHECKED_SHARE:
        raise InputError(
            f"{name}: holds other rows than the features, or in another order: "
            f"{int(itself.sum())} of {len(ids)} rows found themselves in it (or it compresses them "
            "too much)"
        )
    products = values if index.metric_type == faiss.METRIC_INNER_PRODUCT else 1 - values / 2
    if (products - similarity)[found >= 0].abs().median() > LARGEST_PRODUCT_ERROR:
        raise InputError(
            f"{name}: its rows have other norms than 1, or are compressed too much; make another"
        )


def _line(error: Exception) -> str:
    """FAISS's message, without the place in its source."""
    return PLACE.sub("", str(error).splitlines()[0].rsplit("Error: ", 1)[-1]).strip()


def lists_of(index: Any) -> torch.Tensor | None:
    """
    The list (N,) int64 that each row is in, if the lists hold the rows themselves, else None.

    They do in float32 or, without residuals, in float16, for inner products.
    """
    faiss = load_faiss()
    half = faiss.ScalarQuantizer.QT_fp16
    # Not subclasses, which store their codes in other ways.
    plain = type(index) is faiss.IndexIVFFlat or (
        type(index) is faiss.IndexIVFScalarQuantizer
        and (index.sq.qtype, index.by_residual) == (half, False)
    )
    flat = isinstance(faiss.downcast_index(getattr(index, "quantizer", None)), faiss.IndexFlat)
    if not (plain and flat and index.metric_type == faiss.METRIC_INNER_PRODUCT):
        return None
    lists = torch.full((index.ntotal,), -1)
    for number in range(index.nlist):
        lists[read_list(index, number, slice(None), ids_only=True)[0]] = number
    if (lists < 0).any():
        raise InputError("index: holds a row twice, and another not at all; make another")
    return lists


def read_list(
    index: Any, number: int, members: slice, ids_only: bool = False
) -> tuple[np.ndarray, torch.Tensor]:
    """The ids (n,) int64 and the rows (n, d) float32 of some members of a list."""
    faiss, lists = load_faiss(), index.invlists
    size, width = lists.list_size(number), lists.code_size
    if size == 0:
        return np.empty(0, np.int64), torch.empty(0, index.d)
    ids, codes = lists.get_ids(number), None if ids_only else lists.get_codes(number)
    try:
        chosen = faiss.rev_swig_ptr(ids, size)[members].copy()
        if codes is None:
            return chosen, torch.empty(0, index.d)
        rows = faiss.rev_swig_ptr(codes, size * width).reshape(size, width)[members]
        kind = np.float32 if width == 4 * index.d else np.float16
        return chosen, torch.from_numpy(rows.copy().view(kind)).float()
    finally:
        lists.release_ids(number, ids)
        if codes is not None:
            lists.release_codes(number, codes)
