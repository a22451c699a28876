"""Rows read from a file one by one, without the GIL: Python takes longer than the system."""

from __future__ import annotations

from numba import types

from transclip_fast.compiled_loops import compiled

pread = types.ExternalFunction(
    "pread", types.intp(types.int32, types.uintp, types.uintp, types.int64)
)


@compiled("int64(int32, int64, int64[::1], uint8[:, ::1])")
def gather(descriptor, offset, rows, out):  # type: ignore[no-untyped-def]
    """
    Read rows (n,), of as many bytes as those of `out` (n, bytes), that begin at `offset` of a file.

    Returns how many were read whole, up to the first that was not.
    """
    width = out.shape[1]
    for k in range(len(rows)):
        if pread(descriptor, out[k:].ctypes.data, width, offset + rows[k] * width) != width:
            return k
    return len(rows)
