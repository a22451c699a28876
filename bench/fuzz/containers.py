"""Faults in tables, tars and images that keep the rest of the file valid."""

from __future__ import annotations

import io
import random
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SIZES = (
    b"-0000000001\0",
    b"77777777777\0",
    b"\x80" + b"\0" * 10 + b"\x05",
    b"\xff" * 12,
    b"00000000000\0",
)


def of_parquet(content: bytes, draw: random.Random) -> bytes:
    """Change, double or take out a column or rows of a parquet file."""
    table = pq.read_table(io.BytesIO(content))
    k = draw.randrange(table.num_columns)
    name, n_rows = table.column_names[k], table.num_rows
    match draw.randrange(7):
        case 0:
            table = table.append_column(name, table.column(k))
        case 1:
            table = table.remove_column(k)
        case 2:
            table = table.slice(0, n_rows // 2)
        case 3:
            table = pa.concat_tables([table, table])
        case _:
            table = table.set_column(k, name, _odd_column(n_rows, draw))
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def _odd_column(n_rows: int, draw: random.Random) -> pa.Array:
    ones = [1] * n_rows
    match draw.randrange(14):
        case 0:
            return _not_utf8(n_rows)
        case 1:
            return pa.nulls(n_rows)
        case 2:
            return pa.array([None, *ones[1:]], pa.int64())
        case 3:
            return pa.array([[1, 2]] * n_rows)
        case 4:
            return pa.array([{"a": 1}] * n_rows)
        case 5:
            return pa.array(["a\0b"] * n_rows).dictionary_encode()
        case 6:
            return pa.array(ones, pa.timestamp("ns"))
        case 7:
            return pa.array(ones, pa.decimal128(20, 2))
        case 8:
            return pa.array([b"\xff\0"] * n_rows, pa.binary())
        case 9:
            return pa.array([float("nan")] * n_rows)
        case 10:
            return pa.array([2**64 - 1] * n_rows, pa.uint64())
        case 11:
            return pa.array([True] * n_rows)
        case 12:
            return pa.array([-7] * n_rows)
        case _:
            return pa.array([[("a", 1)]] * n_rows, pa.map_(pa.string(), pa.int64()))


def _not_utf8(n_rows: int) -> pa.Array:
    offsets = pa.py_buffer(np.arange(n_rows + 1, dtype=np.int32).tobytes())
    return pa.Array.from_buffers(
        pa.string(), n_rows, [None, offsets, pa.py_buffer(b"\xff" * n_rows)]
    )


def of_tar(content: bytes, draw: random.Random) -> bytes:
    """Change a field of a member's header in a tar, with the right checksum; or join two."""
    data = bytearray(content)
    starts = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    start = draw.choice(starts)
    header = data[start : start + 512]
    match draw.randrange(6):
        case 0:
            size = int(header[124:135], 8) + draw.choice((512, 1024, 2048, 4096))  # takes in others
            header[124:136] = draw.choice((*SIZES, b"%011o\0" % size))
        case 1:
            header[156:157] = draw.choice(
                (b"1", b"2", b"3", b"5", b"6", b"7", b"S", b"L", b"x", b"g")
            )
            header[157:160] = draw.choice((b"a.p", b"\0\0\0", b"../"))
        case 2:
            header[:8] = draw.choice((b"a\xff\xfe.png\0", b"../x.png", b"\0" * 8, bytes(data[:8])))
        case 3:
            return bytes(data + content)
        case 4:
            return bytes(data[: start + draw.choice((0, 512, 700))])
        case _:
            at = draw.randrange(500)
            header[at] ^= 1 << draw.randrange(8)
    if draw.random() < 0.8:
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    data[start : start + 512] = header
    return bytes(data)


def of_png(content: bytes, draw: random.Random) -> bytes:
    """Let the header of a PNG claim another size or kind, with the right checksum."""
    data = bytearray(content)
    at, value = draw.choice(((16, 4), (20, 4), (24, 1), (25, 1), (28, 1))), 0
    value = draw.choice((0, 1, 3, 16, 255, 30_000, 2**31 - 1)) % 256 ** at[1]
    data[at[0] : at[0] + at[1]] = value.to_bytes(at[1], "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def tar_of(members: dict[str, bytes]) -> bytes:
    """Return a tar of files."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()
