"""Memory of a solve, and the layout that fits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from transclip_fast.errors import InputError
from transclip_fast.memory import limit_of, show_bytes
from transclip_fast.ops.blocks import gemm_rows, read_rows
from transclip_fast.ops.exchange import Partition
from transclip_fast.parallel import n_threads
from transclip_fast.ranks import Ranks

FORMS = ("auto", "dense", "sparse")  # of the assignments
# Up to so many classes a dense solve is faster, whatever N is: measured on a CPU, and estimated for
# a GPU from the bytes that a sweep moves.
DENSE_CLASSES = {"cpu": 128, "cuda": 64}
DENSE_ENTRIES = 1 << 18  # of z: with fewer, a dense solve is faster than loading compiled loops
FEWEST_CANDIDATES, USUAL_CANDIDATES = 32, 128  # of a row
# bytes: an int32 and a float32 in each of scores, z and the next z
ENTRY_BYTES = 24
FREE_LIST_BYTES = 1 << 24  # lists up to this size are always affordable
# Normalisers, tails, bounds and numbers of a row, and the copies of sorting rows and edges:
# measured on 125,000 to 1,000,000 streamed rows.
ROW_BYTES = 320
PROCESS_BYTES = 850 << 20  # Python, torch, numba, pyarrow, and free blocks of the allocator
SEARCH_ROW_BYTES = 800  # candidates of a row and its lists, and the copies of sorting them
ANY_ROW_BYTES = 8  # of a row of any process: its place in a sample, then the least product it takes
CLASS_MATRICES = 8  # (K, d) float64: means, sums, weights and temporaries of computing them
PART_SUMS = 7  # (K, d) float64: of parts of the rows, on their way up a tree
START_BYTES = 96  # of a class: the 8 rows that one process is most confident of
COLUMNS_BYTES = 28  # of a row of any process: labels, zero-shot's, outlier scores; one twice
HALO_ID_BYTES = 24  # number and place of a row of another process, place of an own one it wants


@dataclass(frozen=True)
class Size:
    """
    The size of a problem.

    Parameters
    ----------
    n_rows, n_classes, dim, n_neighbors : int
        N, K, d, k.
    file_bytes : int
        Of features in files; 0 if they are in memory.
    input_bytes : int
        Of features in memory, which every process has whole.
    copied : bool
        Whether features held on the device are a copy of the input.
    linear : bool
        Whether the prior is that of prototypes; otherwise it is (N, K).
    runs : int
        Values of gamma that are tried.
    undecided : bool
        Whether a class cost is decided by a second run.
    halved : bool
        Whether held features have a copy in float16.
    labelled : int
        Support and validation rows.
    known : bool
        Whether the class of some queries is known.
    ranks : int
        Processes that share the rows.
    """

    n_rows: int
    n_classes: int
    dim: int
    n_neighbors: int = 3
    file_bytes: int = 0
    input_bytes: int = 0
    copied: bool = True
    linear: bool = True
    runs: int = 1
    undecided: bool = False
    halved: bool = False
    labelled: int = 0
    known: bool = False
    ranks: int = 1

    @property
    def partition(self) -> Partition:
        """How processes share the rows."""
        return Partition(self.n_rows, Ranks(0, self.ranks))

    @property
    def own_rows(self) -> int:
        """The most rows of a process."""
        return self.partition.most_rows

    @property
    def most_remote(self) -> int:
        """The most neighbours of an own row that other processes have: both ways, none twice."""
        return min(self.ranks - 1, 2 * self.n_neighbors)

    @property
    def host_bytes(self) -> int:
        """In the memory of a process before a solve."""
        # A prior (N, K) of up to 8 bytes, its logarithm in 4, and the masks of checking it.
        table = 0 if self.linear else 16 * self.own_rows * self.n_classes
        columns = COLUMNS_BYTES * self.n_rows if self.ranks > 1 else 0
        return PROCESS_BYTES + self.input_bytes + table + columns

    def used(self, device: torch.device) -> int:
        """Bytes in use before a solve: a constant, so that a resumed solve has the same layout."""
        return self.host_bytes if device.type == "cpu" else 0


@dataclass(frozen=True)
class Layout:
    """
    The memory layout of a solve.

    Parameters
    ----------
    candidates : int or None
        Most classes kept of a row; None if all are kept (dense).
    held : bool
        Features stay on the device; otherwise each pass reads them from memory or files.
    """

    candidates: int | None
    held: bool

    def bytes(self, size: Size, device: torch.device) -> dict[str, int]:
        """
        The most bytes that each part of a solve takes on the device.

        Edges between the rows of several processes are taken to be spread evenly.
        """
        n, n_classes, d, k = size.own_rows, size.n_classes, size.dim, size.n_neighbors
        # A GPU computes on a block that was read, while two more are on their way.
        workers, reads = (n_threads(), 2) if device.type == "cpu" else (1, 3)
        read = 4 * d * min(n, read_rows(device))
        entry = (4 if size.copied else 0) + (2 if size.halved else 0)
        kept, lists = 4 * n_classes, 12 * n_classes
        if self.candidates is not None:
            kept, lists = 8 * self.candidates, ENTRY_BYTES * self.candidates
        best = kept if size.runs > 1 or size.undecided else 0  # of the runs so far
        merged = START_BYTES * size.ranks * n_classes + PART_SUMS * 8 * n_classes * d
        return {
            "features": entry * n * d if self.held else 0,
            "labelled": 4 * size.labelled * d,
            # Of a GPU; in the memory of the process it is counted before the solve.
            "prior": 0 if size.linear or device.type == "cpu" else 4 * n * n_classes,
            "graph": n * (12 * k + 8 + 24 * k),  # lists, and both ends of each edge
            "assignments": n * (lists + best + ROW_BYTES),
            "classes": CLASS_MATRICES * 8 * n_classes * d,
            "blocks": reads * read + workers * 4 * gemm_rows(device, n_classes) * (n_classes + d),
            "halo": size.most_remote * n * (2 * kept + HALO_ID_BYTES),  # z, twice
            "exchange": self.travelling_bytes(size) + (merged if size.ranks > 1 else 0),
        }

    def solve_bytes(self, size: Size, device: torch.device) -> int:
        """The most bytes of a solve, of all its parts."""
        return sum(self.bytes(size, device).values())

    def travelling_bytes(self, size: Size) -> int:
        """Bytes of z that leave a process and come to it in a sweep, at most."""
        kept = 4 * size.n_classes if self.candidates is None else 8 * self.candidates
        return 2 * size.most_remote * size.own_rows * kept

    def search_bytes(self, size: Size, device: torch.device) -> int:
        """Bytes of an approximate neighbour search; an exact one of few rows takes less."""
        features = self.bytes(size, device)["features"]
        if size.ranks > 1:
            features += ANY_ROW_BYTES * size.n_rows
        if size.ranks > 1 and not size.file_bytes:  # a process reads rows of all from its memory
            features += 4 * size.n_rows * size.dim
        index = size.dim * (4 if self.held and device.type == "cpu" else 2)
        return features + (SEARCH_ROW_BYTES + index) * size.own_rows


def dense_is_faster(size: Size, device: torch.device) -> bool:
    """Whether keeping all classes of a row takes less time than keeping its largest ones."""
    few = size.n_classes <= DENSE_CLASSES.get(device.type, DENSE_CLASSES["cuda"])
    return few or (device.type == "cpu" and size.n_rows * size.n_classes <= DENSE_ENTRIES)


def choose_layout(
    size: Size,
    device: torch.device,
    *,
    form: str,
    candidates: int | None = None,
    rank: int | None = None,
    memory: int | None = None,
) -> Layout:
    """
    The layout that fits: lists of the usual length first, then features held, then shorter lists.

    Parameters
    ----------
    form : {"auto", "dense", "sparse"}
        "auto" is dense if that is faster and fits into memory.
    candidates, rank : int, optional
        C and R, set by the user; R is at most C.
    memory : int, optional
        Bytes for the process, or for its part of a GPU; by default what is free.

    Raises
    ------
    InputError
        Nothing fits.
    """
    used, limit = size.used(device), limit_of(device, memory)
    room = limit - used
    if form == "auto" and candidates is None:
        dense = Layout(None, held=False).solve_bytes(size, device)
        fits = dense <= room or size.n_classes <= FEWEST_CANDIDATES  # lists would be no shorter
        form = "dense" if fits and dense_is_faster(size, device) else "sparse"
    layout = Layout(None, held=False)
    if form == "sparse":
        kept = candidates or max(_candidates_that_fit(size, device, room), rank or 1)
        layout = Layout(min(kept, size.n_classes), held=False)
    needed = used + layout.solve_bytes(size, device)
    if needed > limit:
        raise InputError(
            f"memory: {size.own_rows:,} rows and {size.n_classes:,} classes, {form}, need at least "
            f"{show_bytes(needed)}, there are {show_bytes(limit)}; "
            f"{_remedy(size, layout, device, form=form, limit=limit)}"
        )
    held = replace(layout, held=True)
    most = max(held.solve_bytes(size, device), held.search_bytes(size, device))
    return held if most <= room else layout


def _candidates_that_fit(size: Size, device: torch.device, room: int) -> int:
    """The usual number, halved until the lists fit into `room` bytes or it is the fewest."""
    fixed, one = (Layout(x, held=False).solve_bytes(size, device) for x in (0, 1))
    fits = (room - fixed) // (one - fixed)
    kept = max(USUAL_CANDIDATES, FREE_LIST_BYTES // (ENTRY_BYTES * size.n_rows))
    while kept > FEWEST_CANDIDATES and min(kept, size.n_classes) > fits:
        kept = max(FEWEST_CANDIDATES, kept // 2)  # in steps: a little less memory changes nothing
    return kept


def _remedy(size: Size, layout: Layout, device: torch.device, *, form: str, limit: int) -> str:
    """A way to solve a problem for which the least layout is too large."""
    if form == "dense" and size.n_classes > FEWEST_CANDIDATES:
        return "choose assignments='sparse', or allow more"
    if form == "sparse":  # perhaps with longer lists than fit, as the user has set them
        fewer = min(_candidates_that_fit(size, device, limit - size.used(device)), size.n_classes)
        shorter = replace(layout, candidates=fewer)
        if size.used(device) + shorter.solve_bytes(size, device) <= limit:
            return f"leave candidates and rank out, or give at most {fewer}, or allow more"
    for ranks in range(size.ranks + 1, size.partition.n_parts + 1):
        shared = replace(size, ranks=ranks)
        if shared.used(device) + layout.solve_bytes(shared, device) <= limit:
            return f"allow more, or share the rows among {ranks} processes with as much each"
    return "allow more, or solve fewer rows at a time"
