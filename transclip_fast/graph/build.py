"""Features to neighbour lists: the choice of a search, its recall, and the final lists."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from transclip_fast.callbacks import Checkpoint, Count
from transclip_fast.data.checks import check_number, unit_divisors, unread_matrix
from transclip_fast.data.feature_rows import Rows, evenly_spaced_rows
from transclip_fast.data.npy_shards import StoredRows
from transclip_fast.device import current_device, exact_float32, resolve_device
from transclip_fast.errors import InputError, user_level
from transclip_fast.graph import faiss_index
from transclip_fast.graph.approximate import IndexSearch
from transclip_fast.graph.candidates import (
    RERANK_ROWS,
    SPARE_CANDIDATES,
    Candidates,
    float32_rounding,
    products_float64,
    rerank_float64,
)
from transclip_fast.graph.cuvs import check_cuvs, cuvs_installed, search_cuvs
from transclip_fast.graph.exact import search_exact
from transclip_fast.graph.job import Job
from transclip_fast.graph.neighbor_graph import NeighborGraph
from transclip_fast.graph.recall import RecallSample
from transclip_fast.memory import free_bytes, show_bytes
from transclip_fast.ops.exchange import Partition
from transclip_fast.parallel import parallel_map, single_threaded_torch
from transclip_fast.ranks import check_same, current_ranks
from transclip_fast.version import __version__

SEARCHES = ("auto", "faiss", "exact", "cuvs")
# Up to which "auto" searches exactly: a second or two on a CPU, some seconds on a GPU.
EXACT_ROWS = {"cpu": 20_000, "cuda": 1_500_000}
NEIGHBOR_BYTES = 12  # of an entry of the lists: int64 and float32
COMPARED_ROWS = 512  # by which processes know that they have the same features, or graph


def build_graph(
    features: object,
    n_neighbors: int = 3,
    *,
    search: str = "auto",
    recall: float = 0.99,
    index: Any = None,
    save_index: str | Path | None = None,
    device: torch.device | str = "cpu",
    progress: Count | None = None,
    checkpoint: Checkpoint | None = None,
    own_rows: bool = False,
) -> NeighborGraph:
    """
    The `n_neighbors` most similar other rows of each row, by inner product.

    In an initialised process group of torch.distributed all processes call this with the same
    arguments and share the work: the graph has the same bits for any number of them.

    Parameters
    ----------
    features : array_like or Rows (N, d)
        Unit rows of any float type; rows of another norm are normalised, with a warning. A
        `numpy.memmap` is read block by block on a CPU, where "faiss" holds a float16 copy; a GPU
        holds all rows if they take at most half of its free memory.
    n_neighbors : int, default 3
    search : {"auto", "faiss", "exact", "cuvs"}, default "auto"
        "exact" compares all pairs of rows. "faiss" compares each row with the lists of a FAISS
        index that are nearest to it, on the CPU. "cuvs" runs cuVS's NN-descent on a GPU. "auto" is
        exact up to 20,000 rows on a CPU and 1,500,000 on a GPU, above that cuvs on a GPU where it
        is installed, else faiss. Without FAISS it is exact, with a warning.
    recall : float, default 0.99
        For "faiss": so many lists are probed that recall, measured on 1,000 exactly searched rows,
        is at least this with 95 % confidence. An approximate search that misses it warns.
    index : faiss.Index, str or Path, optional
        For "faiss": an index of the same rows in the same order, the file of one, or a factory
        string such as "IVF1024,Flat". By default lists around centres from k-means. Its nprobe or
        efSearch is set.
    save_index : str or Path, optional
        For "faiss": file to write the index to.
    device : torch.device or str, default "cpu"
        Where to search, as of `TransCLIP`; ignored if `features` are `Rows`, which have a device.
    progress : callable, optional
        Called with (rows done, rows in all) after every block.
    checkpoint : Checkpoint, optional
        Saves the state of the search, from which a later call resumes.
    own_rows : bool, default False
        Of several processes, each returns the lists of its own rows alone: those of
        `transclip_fast.ops.exchange.Partition`.

    Returns
    -------
    NeighborGraph
        `neighbors` (N, n_neighbors) int64, best first, -1 where fewer rows were found, and
        `similarities` (N, n_neighbors) float32. `info` has `search`, `recall` and, for an
        approximate search, `recall_target`, `recall_rows` (sample size), `weight_error` (mean
        shortfall of the similarities); for FAISS `index`, `blas` (the kernels of its products), and
        `probes` and `lists` where lists are probed.

    Raises
    ------
    InputError
        Features that are not finite non-zero rows, `n_neighbors` below 1, `recall` outside 0 .. 1,
        an unknown search, one whose library is missing, a device that is not there, or an index
        that cannot be made or read, or that holds other rows. Several processes that differ in
        their arguments; "cuvs", a factory string and `save_index` are for one.

    Examples
    --------
    >>> import numpy as np
    >>> from transclip_fast import build_graph
    >>> angles = np.deg2rad([0, 10, 30, 90])
    >>> features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    >>> graph = build_graph(features, n_neighbors=2)
    >>> graph.neighbors
    array([[1, 2],
           [0, 2],
           [1, 0],
           [2, 1]])
    >>> graph.similarities.round(2)
    array([[0.98, 0.87],
           [0.98, 0.94],
           [0.94, 0.87],
           [0.5 , 0.17]], dtype=float32)
    >>> graph.info
    {'search': 'exact', 'recall': 1.0}
    """
    ranks = current_ranks()
    check_search(n_neighbors, search, recall, index, save_index, ranks=ranks.size)
    if search == "auto" and (index is not None or save_index is not None):
        search = "faiss"
    if isinstance(features, Rows):
        rows = features
    else:
        device, held = resolve_device(ranks.device(str(device))), None
        if ranks.size == 1 and isinstance(features, np.memmap | StoredRows):
            held = holds_files(search, features.shape, device)
        rows = whole_rows(features, "features", device, search=search, held=held)
    if ranks.size > 1:
        parameters = repr((n_neighbors, search, recall))
        check_same(ranks, {"version": __version__, "graph parameters": parameters, **_facts(rows)})
    _check_memory(len(rows) // ranks.size, n_neighbors)
    if n_neighbors >= len(rows):
        warnings.warn(
            f"n_neighbors: {n_neighbors} is not below the number of rows, {len(rows)}; the "
            "neighbours that are missing send no messages",
            stacklevel=user_level(),
        )
    if search == "auto":
        search = choose_search(len(rows), rows.device, rows.held and ranks.size == 1)
    if search == "cuvs":
        check_cuvs(rows.device, rows.held)
    if search == "faiss":
        rows = rows.on_cpu()
    job = Job.of(len(rows), ranks, progress, checkpoint)
    job.exchange.device = rows.device
    with exact_float32(), current_device(rows.device), single_threaded_torch():
        found, rounding, info = _candidates(
            rows, n_neighbors, search, recall, index, save_index, job
        )
        lists = _final_lists(rows, found, n_neighbors, rounding, job.own)
        if not own_rows:
            lists = tuple(map(job.exchange.join, lists))
        neighbors, similarities = (array.cpu().numpy() for array in lists)
        return NeighborGraph(neighbors, similarities, info)


def check_search(
    n_neighbors: int,
    search: str,
    recall: Any,
    index: Any,
    save_index: str | Path | None = None,
    *,
    ranks: int = 1,
) -> None:
    """InputError for arguments of `build_graph` with which `ranks` processes could search none."""
    check_number("n_neighbors", n_neighbors, 1)
    if not isinstance(recall, Real) or not 0 <= float(recall) <= 1:
        raise InputError(f"recall must be between 0 and 1, got {recall!r}")
    if search not in SEARCHES:
        raise InputError(f"search must be one of {', '.join(SEARCHES)}, got {search!r}")
    if (index is not None or save_index is not None) and search in ("exact", "cuvs"):
        raise InputError(f"search {search!r} uses no FAISS index: leave index and save_index out")
    if save_index is not None:
        faiss_index.check_place(Path(save_index))
        if index is not None and (not isinstance(index, str) or faiss_index.is_file(index)):
            raise InputError("save_index: is for an index that is made here, and index is one")
    if isinstance(index, str | Path):
        faiss_index.is_file(index)  # or it may be one that is not there
    if ranks > 1:
        _check_shared(search, index, save_index)


def _check_memory(n_rows: int, n_neighbors: int) -> None:
    """InputError if the lists of so many rows cannot fit into memory."""
    needed, free = n_rows * n_neighbors * NEIGHBOR_BYTES, free_bytes(torch.device("cpu"))
    if needed > free:
        raise InputError(
            f"n_neighbors: {n_neighbors:,} of {n_rows:,} rows take {show_bytes(needed)}, there are "
            f"{show_bytes(free)}; ask for fewer"
        )


def _candidates(
    rows: Rows,
    n_neighbors: int,
    search: str,
    recall: float,
    index: Any,
    save_index: str | Path | None,
    job: Job,
) -> tuple[Candidates, float, dict[str, Any]]:
    """Candidates of own rows, the rounding of the difference of two products, and `info`."""
    size = min(n_neighbors, len(rows)) + SPARE_CANDIDATES
    found = Candidates.empty(job.own.stop - job.own.start, size, rows.device)
    rounding = float32_rounding(rows.shape[1])
    if search == "exact":
        search_exact(rows, found, n_neighbors, job)
        return found, rounding, {"search": search, "recall": 1.0}
    info: dict[str, Any] = {"search": search}
    sample = RecallSample.draw(rows, n_neighbors, job.exchange)
    if search == "faiss":
        indexed = IndexSearch(rows, sample, recall, index, job)
        indexed.fill(found)
        info |= indexed.info | {"blas": faiss_index.blas_kernel()}
        if not indexed.unrounded:
            rounding = math.inf
        if save_index is not None:
            faiss_index.save_index(indexed.index, Path(save_index))
    else:
        search_cuvs(rows, found)
        rounding = math.inf
    info |= _measured(rows, job.exchange.pick(found.ids, sample.ids), sample, recall)
    return found, rounding, info


def whole_rows(
    features: object,
    name: str,
    device: torch.device | str,
    *,
    search: str = "auto",
    held: bool | None = None,
) -> Rows:
    """
    The `Rows` of a search, of which every process can read any.

    Of streamed rows each process checks its own; all are read only where some are no unit rows.
    Several processes have them on the CPU where FAISS may search.
    """
    ranks, matrix = current_ranks(), unread_matrix(features, name)
    if held is None:
        held = not isinstance(features, np.memmap | StoredRows)
    if ranks.size == 1:
        return Rows(features, name, device, held=held)
    if search != "exact" and faiss_index.faiss_installed():
        device = "cpu"
    own = Partition(len(matrix), ranks).rows
    checked = all(ranks.all_gather(held or own.start == own.stop or _are_unit(matrix, own)))
    return Rows(features, name, device, held=held, checked=checked and not held)


def holds_files(search: str, shape: Sequence[int], device: torch.device) -> bool:
    """Whether a GPU that searches rows in files holds them: they take half of its free memory."""
    if device.type != "cuda" or len(shape) != 2 or search == "faiss":
        return False
    if search == "auto" and shape[0] > EXACT_ROWS["cuda"] and not cuvs_installed():
        return False  # `choose_search`
    return 2 * (4 + 2) * shape[0] * shape[1] <= free_bytes(device)  # in float32 and in 16 bits


def _are_unit(matrix: torch.Tensor | StoredRows, own: slice) -> bool:
    """Whether own rows are unit rows; errors are raised when every process reads all rows."""
    part = matrix[own] if isinstance(matrix, torch.Tensor) else matrix.part(own)
    with suppress(InputError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return unit_divisors(part, "features") is None
    return False


def _check_shared(search: str, index: Any, save_index: str | Path | None) -> None:
    """InputError for what several processes cannot do."""
    if search == "cuvs":
        raise InputError("search 'cuvs' is for one process; run it without torchrun")
    if save_index is not None:
        raise InputError("save_index: an index is written by one process; run it without torchrun")
    if isinstance(index, str) and not faiss_index.is_file(index):
        raise InputError(
            f"index: {index!r} is trained in one process; save it with save_index, and give "
            "its file"
        )


def _facts(rows: Rows) -> dict[str, str]:
    """Shape of the rows and hash of some, the same in all processes that share them."""
    some = rows[evenly_spaced_rows(len(rows), COMPARED_ROWS, rows.device)].cpu().numpy()
    return {"features": f"{rows.shape} {hashlib.sha256(some.tobytes()).hexdigest()}"}


def choose_search(n_rows: int, device: torch.device, held: bool) -> str:
    """The search that "auto" means."""
    on_gpu = device.type == "cuda" and held  # streamed rows would be read once a panel
    if n_rows <= EXACT_ROWS["cuda" if on_gpu else "cpu"]:
        return "exact"
    if on_gpu and cuvs_installed():
        return "cuvs"
    if faiss_index.faiss_installed():
        return "faiss"
    warnings.warn(
        "FAISS is not installed: all pairs of rows are compared, slowly", stacklevel=user_level()
    )
    return "exact"


def _measured(
    rows: Rows, candidates: torch.Tensor, sample: RecallSample, recall: float
) -> dict[str, Any]:
    """The part of `info` on recall, for candidates (S, C) of the sample; warns if it is missed."""
    shares, error = sample.measure(rows, candidates)
    reached = float(shares.mean())
    if reached < recall:
        warnings.warn(
            f"the graph's recall is {reached:.4f}, below {recall}: another index, or an exact "
            "search, finds more neighbours",
            stacklevel=user_level(),
        )
    return {
        "recall": reached,
        "recall_target": recall,
        "recall_rows": len(sample.ids),
        "weight_error": error,
    }


def _final_lists(
    rows: Rows, found: Candidates, k: int, rounding: float, own: slice
) -> tuple[torch.Tensor, ...]:
    """
    Neighbours (n, k) int64 and similarities (n, k) float32 of own rows, -1 and 0 for none.

    `rounding` is that of the difference of two of the candidates' products.
    """
    neighbors = found.ids[:, :k].clone()
    similarities, part = found.values.new_empty(neighbors.shape), rows.part(own)

    def rerank(ids: torch.Tensor) -> None:
        best = rerank_float64(part[ids], rows, found.ids[ids], neighbors.shape[1])
        neighbors[ids], similarities[ids] = best[0], best[1].float()

    def weigh(ids: torch.Tensor) -> None:
        similarities[ids] = products_float64(part[ids], rows, neighbors[ids]).float()

    ambiguous = found.ambiguous_rows(k, rounding)
    clear = torch.ones(len(neighbors), dtype=torch.bool, device=neighbors.device)
    clear[ambiguous] = False
    parallel_map(rerank, torch.split(ambiguous, RERANK_ROWS), rows.device)
    parallel_map(weigh, torch.split(clear.nonzero()[:, 0], RERANK_ROWS), rows.device)
    similarities[neighbors < 0] = 0
    missing = (0, k - neighbors.shape[1])  # if N < k
    return pad(neighbors, missing, value=-1), pad(similarities, missing)
