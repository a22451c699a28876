"""Unit rows, from memory or from files larger than memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy

import numpy as np
import torch
from torch.nn.functional import embedding

from transclip_fast.data.checks import as_unit_rows, unit_divisors, unread_matrix
from transclip_fast.data.npy_shards import StoredRows, row_numbers
from transclip_fast.parallel import parallel_map

BLOCK_BYTES = 1 << 22  # of float32 rows read at a time
Tensors = tuple[torch.Tensor, ...]


class Rows:
    """
    Features (N, d) of which `rows[ids]`, or a slice, is a tensor of unit rows on the device.

    Held rows are one float32 tensor on the device. Streamed rows stay in their file or in memory,
    in their own type; while a GPU computes on one block, the next is read and copied.

    Parameters
    ----------
    features : array_like, numpy.memmap or StoredRows (N, d)
    held : bool, optional
        By default rows in a file are streamed and rows in memory are held.
    first : int
        What messages call the first row.
    checked : bool
        Whether streamed rows are known to be unit rows, and not read now.

    Attributes
    ----------
    dtype : torch.dtype
        Type of `rows[ids]`.
    on_read : callable, optional
        Called with the length of every slice that is read, from any thread.

    Raises
    ------
    InputError
        As `transclip_fast.data.checks.as_unit_rows`; later, if a file changes while it is read.
    """

    def __init__(
        self,
        features: object,
        name: str = "features",
        device: torch.device | str = "cpu",
        *,
        held: bool | None = None,
        first: int = 0,
        checked: bool = False,
    ) -> None:
        self.device, self.dtype = torch.device(device), torch.float32
        self.on_read: Callable[[int], None] | None = None
        self._divisors: torch.Tensor | None = None
        self._ahead: _ReadAhead | None = None
        self._function: Callable[[torch.Tensor], torch.Tensor] | None = None
        in_file = isinstance(features, np.memmap | StoredRows)
        self._source = unread_matrix(features, name)
        self.shape = (len(self._source), self._source.shape[1])
        self._held: torch.Tensor | None = None
        if held is None:
            held = not in_file
        if held and isinstance(self._source, torch.Tensor):
            self._held = as_unit_rows(self._source, name, first=first).to(self.device)
            return
        if not checked:
            self._divisors = unit_divisors(self._source, name, first)
        if held:
            self._held = self._whole()

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def held(self) -> bool:
        """Whether they are a tensor on the device."""
        return self._held is not None

    def __getitem__(self, ids: torch.Tensor | slice) -> torch.Tensor:
        rows = self._read(ids)
        return rows if self._function is None else self._function(rows)

    def _read(self, ids: torch.Tensor | slice) -> torch.Tensor:
        if isinstance(ids, torch.Tensor):
            if self._held is not None:
                return embedding(ids, self._held)  # copies whole rows, unlike an index
            flat = self._host(ids.flatten().cpu())
            return flat.to(self.device, self.dtype).view(*ids.shape, self._source.shape[1])
        start, stop, step = ids.indices(len(self))
        if step != 1:
            return self._read(torch.from_numpy(row_numbers(ids, len(self))).to(self.device))
        if self.on_read is not None:
            self.on_read(stop - start)
        if self._held is not None:
            return self._held[start:stop]
        if self.device.type != "cuda":
            return self._host(slice(start, stop)).to(self.dtype)
        self._ahead = self._ahead or _ReadAhead(self._host, self.device, self.dtype)
        following = slice(stop, min(2 * stop - start, len(self)))
        return self._ahead.read(slice(start, stop), following)

    def half(self) -> Rows:
        """A copy in float16."""
        other = copy(self)
        other.dtype, other._ahead = torch.float16, None
        if self._held is not None:
            other._held = self._held.half()
        return other

    def mapped(self, function: Callable[[torch.Tensor], torch.Tensor], dim: int) -> Rows:
        """These rows (..., d) after `function`, as (..., dim): applied whenever rows are read."""
        before = self._function
        other = copy(self)
        other._function = function if before is None else lambda rows: function(before(rows))
        other.shape, other._ahead = (len(self), dim), None
        return other

    def on_cpu(self) -> Rows:
        """These rows for a computation on the CPU."""
        if self.device.type == "cpu":
            return self
        other = copy(self)
        other.device, other._ahead = torch.device("cpu"), None
        if self._held is not None:
            other._held = self._held.cpu()
        return other

    def part(self, rows: slice) -> Rows:
        """Consecutive rows, in the same memory or files."""
        other, source = copy(self), self._source
        other._ahead = None
        other.shape = (rows.stop - rows.start, self.shape[1])
        other._source = source[rows] if isinstance(source, torch.Tensor) else source.part(rows)
        if self._held is not None:
            other._held = self._held[rows]
        if self._divisors is not None:
            other._divisors = self._divisors[rows]
        return other

    @property
    def own(self) -> slice:
        """The rows of this process; other processes may share them: `ops.ranked.RankedRows`."""
        return slice(0, len(self))

    def total(self, leaf: Callable[[slice], Tensors], shapes: Sequence[Sequence[int]]) -> Tensors:
        """
        The sum over all rows of what `leaf` returns for a slice of own rows, float64 tensors.

        Rows that several processes share need their `shapes`: one of them may have no rows.
        """
        return leaf(self.own)

    def largest(self, values: torch.Tensor) -> float:
        """The largest of values (n,) of all rows."""
        return float(values.max())

    def pick(
        self, table: UnitRows, ids: torch.Tensor, nodes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Of a table of all rows, those of the rows `ids` (n,): `nodes` (N,) are their places."""
        return table[ids if nodes is None else nodes[ids]]

    def digest(self, leaf: Callable[[slice], str]) -> str:
        """A hash of all rows, of which `leaf` makes one for a slice of own rows."""
        return leaf(self.own)

    def local(self) -> Rows:
        """The rows of this process as rows of their own."""
        return self

    def blocks(self) -> list[slice]:
        """Slices that cover all rows, each of about `BLOCK_BYTES`."""
        step = self._block_rows
        return [slice(start, start + step) for start in range(0, len(self), step)]

    @property
    def _block_rows(self) -> int:
        return max(64, BLOCK_BYTES // (4 * self._source.shape[1]))

    def _host(self, ids: torch.Tensor | slice) -> torch.Tensor:
        """Streamed rows in float32, on the CPU; large slices on all cores."""
        if isinstance(ids, slice) and ids.stop - ids.start > (size := self._block_rows):
            shape = ids.stop - ids.start, self._source.shape[1]
            out = torch.empty(shape, dtype=torch.float32)

            def part(first: int) -> None:
                piece = out[first : first + size]
                piece.copy_(self._host(slice(ids.start + first, ids.start + first + len(piece))))

            parallel_map(part, range(0, len(out), size))
            return out
        if isinstance(self._source, torch.Tensor):
            rows = self._source[ids].cpu()
        else:
            where = ids.numpy() if isinstance(ids, torch.Tensor) else ids
            rows = torch.from_numpy(self._source[where])
        if self._divisors is not None:
            return (rows.float().double() / self._divisors[ids, None]).float()
        # Copied into torch's memory, since the order of a BLAS library's sums depends on alignment.
        return torch.empty(rows.shape, dtype=torch.float32).copy_(rows)

    def _whole(self) -> torch.Tensor:
        """All rows on the device."""
        whole = torch.empty(self.shape, dtype=torch.float32, device=self.device)

        def part(block: slice) -> None:
            whole[block] = self._host(block)

        parallel_map(part, self.blocks(), self.device)
        return whole


UnitRows = torch.Tensor | Rows


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows scaled to unit norm."""
    return torch.nn.functional.normalize(rows, dim=-1)


def evenly_spaced_rows(n_rows: int, most: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Numbers (n,) int64 of at most `most` rows, evenly spread over all."""
    size = min(n_rows, most)
    return torch.arange(size, device=device) * n_rows // size


class _ReadAhead:
    """
    Blocks of rows on a GPU; while it computes on one, the next is read and copied.

    Three are there at most: one is fetched when the GPU is done with the third before it, however
    far ahead of the GPU the caller is. `read` returns the rows of a slice in float32, on the CPU;
    `dtype` is the type they are copied in.
    """

    def __init__(
        self, read: Callable[[slice], torch.Tensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._read, self._device, self._dtype = read, device, dtype
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pinned = [torch.empty(0, dtype=dtype, pin_memory=True) for _ in range(2)]
        self._copied = [_event(), _event()]  # when each pinned buffer is free again
        self._used = [_event(), _event()]  # when the GPU is done with the last blocks, oldest first
        self._next: tuple[slice, torch.Tensor, torch.cuda.Event] | None = None

    def read(self, block: slice, following: slice) -> torch.Tensor:
        """The rows of a block; starts to fetch the following one."""
        stream = torch.cuda.current_stream(self._device)
        self._used = [self._used[1], _event()]
        self._used[1].record(stream)
        if self._next is None or self._next[0] != block:
            self._next = self._fetch(block)
        _, rows, copied = self._next
        stream.wait_event(copied)
        rows.record_stream(stream)
        self._used[0].synchronize()
        self._next = self._fetch(following) if following.start < following.stop else None
        return rows

    def _fetch(self, block: slice) -> tuple[slice, torch.Tensor, torch.cuda.Event]:
        rows = self._read(block)
        self._pinned.reverse()
        self._copied.reverse()
        self._copied[0].synchronize()
        if self._pinned[0].numel() < rows.numel():
            self._pinned[0] = torch.empty(rows.numel(), dtype=self._dtype, pin_memory=True)
        buffer = self._pinned[0][: rows.numel()].view(rows.shape).copy_(rows)
        with torch.cuda.stream(self._copies):
            on_device = buffer.to(self._device, non_blocking=True)
            copied = _event()
            copied.record(self._copies)
        self._copied[0] = copied
        return block, on_device, copied


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
