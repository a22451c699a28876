"""
Approximate search in a FAISS index: each row is compared with the lists nearest to it.

A list holds the rows whose nearest centre is the same. All rows that probe a list are multiplied
with it at once, by torch: FAISS's wheels choose old kernels on CPUs that they do not know. How
many lists are probed follows from 1,000 rows with exact neighbours. An index whose lists do not
hold the rows themselves is searched by FAISS.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import numpy as np
import torch

from transclip_fast.callbacks import Checkpoint, Count, SavedState
from transclip_fast.data.feature_rows import Rows
from transclip_fast.graph.candidates import Candidates, without_self
from transclip_fast.graph.centres import kmeans_centres, nearest_centres
from transclip_fast.graph.faiss_index import (
    faiss_errors,
    faiss_threads,
    list_index,
    lists_of,
    load_faiss,
    old_kernel,
    open_index,
    read_list,
)
from transclip_fast.graph.recall import RecallSample, confirms
from transclip_fast.ops.blocks import blocks
from transclip_fast.parallel import parallel_map

BLOCK_PRODUCTS = 1 << 20  # of rows with members of a list that they probe, 4 MB in float32
FEWEST_QUERIES, MOST_QUERIES = 256, 4096  # of a block: a list may be one row, or all
BATCH_BLOCKS = 64  # between two merges: results do not depend on the number of cores
PANEL_ROWS, STEP_ROWS = 256, 1 << 14  # that FAISS searches at a time, and between two checkpoints
FEWEST_EF, MOST_EF = 16, 4096  # HNSW's efSearch
LEAST_GAIN = 2e-3  # of recall, by four times the effort: compressed rows gain no more
Block = tuple[int, slice, torch.Tensor]  # a list, members of it, and the rows that probe it


class IndexSearch:
    """
    A search of the nearest rows of every row in a FAISS index of the rows.

    Parameters
    ----------
    rows : Rows (N, d)
    sample : RecallSample
        Decides how many lists are probed.
    recall : float
        To be reached with 95 % confidence.
    source : faiss.Index, str or Path, optional
        An index, its file, or a factory string; by default one is made here.
    checkpoint : Checkpoint

    Attributes
    ----------
    index : faiss.Index
    info : dict
        `index`, its description, and where lists are probed `probes` and `lists`.
    unrounded : bool
        Whether the products are those of the rows themselves, in float32.
    """

    def __init__(
        self, rows: Rows, sample: RecallSample, recall: float, source: Any, checkpoint: Checkpoint
    ) -> None:
        self._rows, self._sample, self._recall = rows, sample, recall
        self._checkpoint, self._state = checkpoint, checkpoint.load() or {}
        self.info: dict[str, Any] = {}
        self.unrounded = False
        if source is None:
            self._make_index()
            return
        self.index = open_index(source, rows)
        self.info["index"] = source if isinstance(source, str) else type(self.index).__name__
        self._nearest: torch.Tensor | None = None
        lists = lists_of(self.index)
        if lists is not None:
            quantizer = load_faiss().downcast_index(self.index.quantizer)
            centres = torch.from_numpy(quantizer.reconstruct_n(0, self.index.nlist))
            self._rank_lists(centres, lists[sample.neighbors])

    def _make_index(self) -> None:
        """Lists around centres from k-means."""
        rows, sample = self._rows, self._sample
        saved = self._state.get("centres")
        centres = kmeans_centres(rows) if saved is None else torch.from_numpy(saved)
        neighbors = rows[sample.neighbors.flatten()]
        own_lists = nearest_centres(neighbors, centres, 1).view(sample.neighbors.shape)
        nearest = self._rank_lists(centres, own_lists)
        self.index, self.unrounded = list_index(rows, centres, nearest[:, 0])
        self.info["index"] = f"IVF{len(centres)},{'Flat' if rows.held else 'SQfp16'}"

    def _rank_lists(self, centres: torch.Tensor, lists: torch.Tensor) -> torch.Tensor:
        """The lists (N, P) that each row probes; `lists` (S, k) are of the sample's neighbours."""
        probes = self._sample.probes(centres, lists, self._recall)
        if not np.array_equal(self._state.get("centres", ()), centres.numpy()):
            self._state = {}  # another index: FAISS's training may differ between machines
        saved = self._state.get("nearest")
        self._nearest = (
            nearest_centres(self._rows, centres, probes)
            if saved is None
            else torch.from_numpy(saved)
        )
        self._centres = centres
        self.info |= {"probes": probes, "lists": len(centres)}
        return self._nearest

    def fill(self, found: Candidates, progress: Count) -> None:
        """Fill the entries of every row."""
        with faiss_errors("index"), faiss_threads(1):
            if self._nearest is None:
                self._search_index(found, progress)
            else:
                self._search_lists(self._nearest, found, progress)

    def _search_lists(self, nearest: torch.Tensor, found: Candidates, progress: Count) -> None:
        """Fill `found` from the lists (N, P) that are nearest to each row."""
        faiss, rows = load_faiss(), self._rows
        heaps, done = faiss.ResultHeap(len(rows), found.size + 1, keep_max=True), 0
        if self._state:
            heaps.D[:], heaps.I[:] = self._state["values"], self._state["ids"]
            done, self._state = int(self._state["blocks"]), {}

        def find(block: Block) -> Any:
            faiss.omp_set_num_threads(1)  # of this thread: the pool's threads are the parallelism
            number, members, queries = block
            ids, others = read_list(self.index, number, members)
            products = (rows[queries] @ others.T).numpy()
            heap = faiss.ResultHeap(len(queries), found.size + 1, keep_max=True)
            heap.D[:] = heaps.D[queries, :1]  # what is no larger than a row's least would not stay
            heap.add_result_subset(np.arange(len(queries)), products, ids)
            return heap

        def state() -> SavedState:
            arrays = {"values": heaps.D, "ids": heaps.I, "blocks": np.asarray(done)}
            return arrays | {"centres": self._centres.numpy(), "nearest": nearest.numpy()}

        tasks = self._probing_blocks(nearest)
        while done < len(tasks):
            batch = tasks[done : done + BATCH_BLOCKS]
            for (*_, queries), heap in zip(batch, parallel_map(find, batch), strict=True):
                heaps.add_result_subset(queries.numpy(), heap.D, heap.I)
            done += len(batch)
            progress(len(rows) * done // len(tasks), len(rows))
            self._checkpoint.keep(state)
        heaps.finalize()
        own = torch.arange(len(rows))
        best = without_self(torch.from_numpy(heaps.I), torch.from_numpy(heaps.D), own)
        found.ids, found.values = best

    def _probing_blocks(self, nearest: torch.Tensor) -> list[Block]:
        """Every list, in parts, with some of the rows that probe it."""
        queries = (
            nearest.flatten().argsort(stable=True).div_(nearest.shape[1], rounding_mode="floor")
        )
        counts = torch.bincount(nearest.flatten(), minlength=self.index.nlist).tolist()
        tasks: list[Block] = []
        for number, probing in enumerate(torch.split(queries, counts)):
            length = self.index.invlists.list_size(number)
            if length and len(probing):
                n_queries = min(max(BLOCK_PRODUCTS // length, FEWEST_QUERIES), MOST_QUERIES)
                parts = list(blocks(length, max(1, BLOCK_PRODUCTS // n_queries)))
                tasks += [
                    (number, part, some)
                    for some in torch.split(probing, n_queries)
                    for part in parts
                ]
        return tasks

    def _search_index(self, found: Candidates, progress: Count) -> None:
        """Fill `found` by FAISS's own search."""
        if line := old_kernel():
            warnings.warn(line, stacklevel=2)
        rows, start = self._rows, 0
        self._set_effort(found.size)
        if self._state:
            found.restore(self._state)
            start, self._state = int(self._state["rows"]), {}

        def search(panel: slice) -> None:
            own = torch.arange(panel.start, panel.stop)
            found.ids[panel], found.values[panel] = self._top(rows[panel], own, found.size)

        for first in range(start, len(rows), STEP_ROWS):
            stop = min(first + STEP_ROWS, len(rows))
            parallel_map(search, list(blocks(stop, PANEL_ROWS, first)))
            progress(stop, len(rows))
            self._checkpoint.keep(partial(found.state, rows=stop))

    def _top(
        self, rows: torch.Tensor, own: torch.Tensor, size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What FAISS finds for some rows: ids and values (n, size), without the rows themselves."""
        faiss = load_faiss()
        faiss.omp_set_num_threads(1)  # of this thread, as above
        values, ids = map(torch.from_numpy, self.index.search(rows.numpy(), size + 1))
        if self.index.metric_type == faiss.METRIC_L2:
            values = 1 - values / 2  # of unit rows
        return without_self(ids, values, own)

    def _set_effort(self, size: int) -> None:
        """Search as thoroughly as the recall needs: FAISS's nprobe, or efSearch."""
        faiss = load_faiss()
        ivf = faiss.try_extract_index_ivf(self.index)
        name, effort, most = "efSearch", FEWEST_EF, MOST_EF
        if ivf is not None:
            name, effort, most = "nprobe", 1, ivf.nlist
        tried: list[tuple[int, float]] = []
        while True:
            try:
                faiss.ParameterSpace().set_index_parameter(self.index, name, effort)
            except RuntimeError:
                return  # the index has no such parameter, and nothing to choose
            ids, _ = self._top(self._sample.rows, self._sample.ids, size)
            reached, _ = self._sample.measure(self._rows, ids)
            tried.append((effort, float(reached.mean())))
            if effort == most or confirms(reached, self._recall):
                break
            if len(tried) > 2 and tried[-1][1] - tried[-3][1] < LEAST_GAIN:
                effort = tried[-3][0]
                faiss.ParameterSpace().set_index_parameter(self.index, name, effort)
                break
            effort = min(2 * effort, most)
        self.info |= {"probes": effort, "lists": most} if ivf is not None else {}
