"""
Approximate search in a FAISS index: each row is compared with the lists nearest to it.

A list holds the rows whose nearest centre is the same; `graph.list_search` searches them: FAISS's
wheels choose old kernels on CPUs that they do not know. How many lists are probed follows from
1,000 rows with exact neighbours. An index whose lists do not hold the rows themselves is searched
by FAISS.
"""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import numpy as np
import torch

from transclip_fast.data.feature_rows import Rows
from transclip_fast.errors import user_level
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
)
from transclip_fast.graph.job import Job
from transclip_fast.graph.list_search import Blocks, ListSearch
from transclip_fast.graph.recall import RecallSample, confirms
from transclip_fast.ranks import check_same

PANEL_ROWS, STEP_ROWS = 256, 1 << 14  # that FAISS searches at a time, and between two checkpoints
FEWEST_EF, MOST_EF = 16, 4096  # HNSW's efSearch
LEAST_GAIN = 2e-3  # of recall, by four times the effort: compressed rows gain no more


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
    job : Job

    Attributes
    ----------
    index : faiss.Index
        One made here has the lists that this process searches.
    info : dict
        `index`, its description, and where lists are probed `probes` and `lists`.
    unrounded : bool
        Whether the products are those of the rows themselves, in float32.
    """

    def __init__(
        self, rows: Rows, sample: RecallSample, recall: float, source: Any, job: Job
    ) -> None:
        self._rows, self._sample, self._recall, self._job = rows, sample, recall, job
        self._state = job.checkpoint.load() or {}
        self.info: dict[str, Any] = {}
        self.unrounded = False
        self._lists: ListSearch | None = None
        if source is None:
            self._make_index()
            return
        self.index = open_index(source, rows)
        self.info["index"] = source if isinstance(source, str) else type(self.index).__name__
        self._check_same()
        lists = lists_of(self.index)
        if lists is not None:
            quantizer = load_faiss().downcast_index(self.index.quantizer)
            centres = torch.from_numpy(quantizer.reconstruct_n(0, self.index.nlist))
            nearest = self._rank_lists(centres, lists[sample.neighbors])
            blocks = self._blocks(torch.bincount(lists, minlength=len(centres)), nearest)
            self._lists = ListSearch(rows, self.index, blocks, centres, nearest, job)

    def _make_index(self) -> None:
        """Lists around centres from k-means."""
        rows, sample, exchange = self._rows, self._sample, self._job.exchange
        saved = self._state.get("centres")
        centres = kmeans_centres(rows, exchange.ranks) if saved is None else torch.from_numpy(saved)
        neighbors = rows[sample.neighbors.flatten()]
        own_lists = nearest_centres(neighbors, centres, 1).view(sample.neighbors.shape)
        nearest = self._rank_lists(centres, own_lists)
        sizes = exchange.sum(torch.bincount(nearest[:, 0], minlength=len(centres)))
        blocks = self._blocks(sizes, nearest)
        members = torch.from_numpy(blocks.pairs(nearest[:, :1], exchange))
        ids, order = (members % len(rows)).sort()  # a file is read in order
        lists = members[order].div_(len(rows), rounding_mode="floor")
        self.index, unrounded = list_index(rows, centres, ids, lists)
        # Resumed candidates may be of rows that were streamed, and so rounded to half precision.
        unrounded = unrounded and bool(self._state.get("unrounded", not self._state))
        self.unrounded = all(exchange.ranks.all_gather(unrounded))
        self.info["index"] = f"IVF{len(centres)},{'Flat' if rows.held else 'SQfp16'}"
        self._lists = ListSearch(
            rows, self.index, blocks, centres, nearest, self._job, unrounded=self.unrounded
        )

    def _rank_lists(self, centres: torch.Tensor, lists: torch.Tensor) -> torch.Tensor:
        """The lists (n, P) that own rows probe; `lists` (S, k) are of the sample's neighbours."""
        probes = self._sample.probes(centres, lists, self._recall)
        probes = self._job.exchange.ranks.broadcast(probes)
        if not np.array_equal(self._state.get("centres", ()), centres.numpy()):
            self._state = {}  # another index: FAISS's training may differ between machines
        self.info |= {"probes": probes, "lists": len(centres)}
        saved = self._state.get("nearest")
        if saved is not None:
            return torch.from_numpy(saved)
        return nearest_centres(self._rows.part(self._job.own), centres, probes)

    def _blocks(self, sizes: torch.Tensor, nearest: torch.Tensor) -> Blocks:
        """The blocks of lists of such sizes (L,), that own rows probe as `nearest` (n, P) says."""
        exchange = self._job.exchange
        probing = exchange.sum(torch.bincount(nearest.flatten(), minlength=len(sizes)))
        return Blocks(sizes.numpy(), probing.numpy(), exchange.ranks)

    def _check_same(self) -> None:
        """InputError unless all processes have the same index, as far as a search tells."""
        _, found = self.index.search(self._sample.rows.numpy(), 1)
        sha256 = hashlib.sha256(found.tobytes()).hexdigest()
        check_same(self._job.exchange.ranks, {"index": sha256})

    def fill(self, found: Candidates) -> None:
        """Fill the entries of own rows."""
        with faiss_errors("index"), faiss_threads(1):
            if self._lists is None:
                self._search_index(found)
            else:
                self._lists.fill(found, self._state)

    def _search_index(self, found: Candidates) -> None:
        """Fill `found` by FAISS's own search."""
        if line := old_kernel():
            warnings.warn(line, stacklevel=user_level())
        self._set_effort(found.size)

        def search(panel: slice, part: Candidates) -> None:
            own = torch.arange(panel.start, panel.stop)
            part.ids[:], part.values[:] = self._top(self._rows[panel], own, part.size)

        self._job.search_panels(search, found, PANEL_ROWS, STEP_ROWS, self._state or None)

    def _top(
        self, rows: torch.Tensor, own: torch.Tensor, size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and values (n, size) by FAISS's search of some rows, without the rows themselves."""
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
