"""How much memory a solve takes, and what is chosen so that it fits."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from transclip_fast.errors import InputError
from transclip_fast.ops.torch import gemm_rows, read_rows
from transclip_fast.threads import n_threads

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Up to this size z, its successor and its scores stay whole: nothing is gained by lists.
DENSE_BYTES = 1 << 25
FEWEST, USUAL = 32, 128  # candidates of a row
# Lists are held in scores, in z and in the next z: an int32 and a float32 each time.
ENTRY_BYTES = 24
SMALL = 1 << 24  # bytes of lists that are no matter, however few candidates would do
ROW_BYTES = 64  # normalisers, tails, bounds, labels and numbers of a row
LIBRARIES = 1 << 27  # that are loaded on the way, and what the allocator keeps
CLASS_MATRICES = 8  # (K, d) float64: means, sums, weights, and what they are computed from


def parse_memory(value: str | int | None) -> int | None:
    """
    Bytes of "8GiB", "500 MB" or a number.

    K, M, G and T are powers of 1024, with or without "iB" or "B".

    Raises
    ------
    InputError
        Something else, or nothing at all.
    """
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", str(value), re.IGNORECASE)
    if not isinstance(value, str) or match is None or float(match[1]) == 0:
        raise InputError(f"memory must be a size like 8GiB, got {value!r}")
    return int(float(match[1]) * UNITS[match[2].upper()])


def show_bytes(number: float) -> str:
    """A size for a reader."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} GiB"


def resident_bytes() -> int:
    """Memory that this process has now."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most memory that this process has had."""
    return _status("VmHWM")


def _status(field: str) -> int:
    status = Path("/proc/self/status").read_text().partition(f"{field}:")[2]
    return 1024 * int(status.split()[0])


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; on the CPU, with what the cache of files gives back."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = Path("/proc/meminfo").read_text().partition("MemAvailable:")[2]
    return 1024 * int(available.split()[0])


def limit_of(device: torch.device, memory: int | None) -> int:
    """Bytes that the process, or what it has on a GPU, may reach: as told, or what is free."""
    if memory is not None:
        return memory
    return free_bytes(device) + (resident_bytes() if device.type == "cpu" else 0)


@dataclass(frozen=True)
class Size:
    """
    Of a problem: queries, classes, dimensions, neighbours of a query.

    `copied` says whether features held on the device are a copy of what is given.
    """

    n_rows: int
    n_classes: int
    dim: int
    n_neighbors: int = 3
    copied: bool = True


@dataclass(frozen=True)
class Layout:
    """
    How a solve is laid out in memory.

    Parameters
    ----------
    candidates : int or None
        Classes of a row that are kept at most; None where all are (dense).
    held : bool
        Features are held on the device; otherwise each pass reads them from where they are.
    """

    candidates: int | None
    held: bool

    def bytes(self, size: Size, device: torch.device) -> dict[str, int]:
        """What each part of a solve takes on the device, at its largest."""
        n, n_classes, d, k = size.n_rows, size.n_classes, size.dim, size.n_neighbors
        workers = n_threads() if device.type == "cpu" else 1
        read = 4 * d * min(n, read_rows(device))
        lists = 12 * n_classes if self.candidates is None else ENTRY_BYTES * self.candidates
        return {
            "features": 4 * n * d if self.held and size.copied else 0,
            "graph": n * (12 * k + 8 + 24 * k),  # lists, and both ends of each edge
            "assignments": n * (lists + ROW_BYTES),
            "classes": CLASS_MATRICES * 8 * n_classes * d,
            "libraries": LIBRARIES if device.type == "cpu" else 0,
            "blocks": 2 * read + workers * 4 * gemm_rows(device, n_classes) * (n_classes + d),
        }


def choose_layout(
    size: Size,
    device: torch.device,
    *,
    form: str,
    candidates: int | None = None,
    memory: int | None = None,
) -> Layout:
    """
    The layout that fits: lists of the usual length first, then features held, then shorter lists.

    Parameters
    ----------
    form : {"auto", "dense", "sparse"}
        "auto" is dense for small problems, and on a GPU while they fit half of it.
    candidates : int, optional
        C, where it is given.
    memory : int, optional
        Bytes for the process, and on a GPU for what is on it; what is free where not given.

    Raises
    ------
    InputError
        Nothing fits.
    """
    used = resident_bytes() if device.type == "cpu" else 0
    limit = limit_of(device, memory)
    room = limit - used
    if form == "auto" and candidates is None:
        most = DENSE_BYTES if device.type == "cpu" else room // 2
        form = "dense" if 12 * size.n_rows * size.n_classes <= most else "sparse"
    layout = Layout(None, held=False)
    if form == "sparse":
        fixed = sum(Layout(0, held=False).bytes(size, device).values())
        fits = (room - fixed) // (ENTRY_BYTES * size.n_rows)
        usual = candidates or max(USUAL, SMALL // (ENTRY_BYTES * size.n_rows))
        least = min(candidates or FEWEST, size.n_classes)
        layout = replace(layout, candidates=max(least, min(usual, fits, size.n_classes)))
    needed = sum(layout.bytes(size, device).values())
    if needed > room:
        raise InputError(
            f"memory: {size.n_rows:,} rows and {size.n_classes:,} classes, {form}, need "
            f"{show_bytes(used + needed)}, there are {show_bytes(limit)}; "
            + ("choose assignments='sparse'" if form == "dense" else "allow more, or fewer rows")
        )
    held = replace(layout, held=True)
    return held if sum(held.bytes(size, device).values()) <= room else layout
