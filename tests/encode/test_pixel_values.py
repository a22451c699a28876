"""Images of more than 8 bits, and of values that Pillow takes for others: scaled or refused."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.encode.test_pixels import file, made
from transclip_fast.encode.pixels import decode
from transclip_fast.errors import InputError


def pgm(values):
    """A PGM of 16 bits."""
    return b"P5 %d %d 65535\n" % values.shape[::-1] + values.astype(">u2").tobytes()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "big-endian", "JPEG2000", "PGM"])
def test_16_bit_images_are_the_upper_8_bits(kind):
    grey = np.asarray(made(61, 47, "L"))
    values = grey.astype(np.uint16) * 256 + 255 - grey
    if kind == "PGM":
        data = pgm(values)
    elif kind == "big-endian":
        data = file(Image.frombytes("I;16B", (61, 47), values.astype(">u2").tobytes()), "TIFF")
        assert data.startswith(b"MM")
    else:
        data = file(Image.fromarray(values), kind)
    np.testing.assert_array_equal(decode(data), np.repeat(grey[..., None], 3, 2))


def test_white_may_be_zero():
    grey = np.asarray(made(61, 47, "L"))
    data = file(Image.fromarray(grey.astype(np.uint16) * 257), "TIFF")
    entry = b"\x06\x01\x03\0\1\0\0\0"  # photometric interpretation, one short
    assert data.count(entry + b"\1\0") == 1
    turned = data.replace(entry + b"\1\0", entry + b"\0\0")
    np.testing.assert_array_equal(decode(turned)[..., 0], 255 - grey)


@pytest.mark.parametrize(
    ("dtype", "white"),
    [("f4", 1), ("f4", 255), ("f4", 65535), ("i4", 255), ("i4", 65535), ("u2", 65535)],
)
def test_floats_and_integers_are_scaled(dtype, white):
    grey = np.asarray(made(61, 47, "L"))
    data = file(Image.fromarray((grey * (white / 255)).astype(dtype)), "TIFF")
    assert np.abs(decode(data)[..., 0].astype(int) - grey).max() <= (white == 65535)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("f4", [-1, 9]),
        ("f4", [0, 1.3]),  # of 0 to 1, or nearly black in 0 to 255?
        ("f4", [0, 1e6]),
        ("f4", [0.5, np.nan]),
        ("f4", [0, np.inf]),
        ("i4", [-1, 200]),
        ("i4", [0, 2550]),  # 12 bits, or nearly black in 16?
        ("i4", [0, 10**6]),
        ("u2", [0, 2550]),
        ("u2", [0, 16383]),  # 14 bits, as of cameras
        ("u2", [0, 0]),
    ],
)
def test_values_of_no_known_range_are_refused(dtype, values):
    data = file(Image.fromarray(np.tile(np.array(values, dtype), (9, 5))), "TIFF")
    with pytest.raises(InputError, match="has values from .* fit no range .* save it with 8 bits"):
        decode(data)


def png(values, colours):
    """A PNG of 16 bits, of values (H, W, C)."""
    parts = b"IHDR" + struct.pack(">IIBBBBB", *values.shape[1::-1], 16, colours, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in values.astype(">u2"))
    chunks = (parts, b"IDAT" + zlib.compress(rows), b"IEND")
    sizes = (struct.pack(">I", len(chunk) - 4) for chunk in chunks)
    sums = (struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    whole = zip(sizes, chunks, sums, strict=True)
    return b"\x89PNG\r\n\x1a\n" + b"".join(part for chunk in whole for part in chunk)


def tiff(values, photometric, bits=16, tags=(), planes=False):
    """A TIFF without compression, of values (H, W, C), with other tags, as (number, values)."""
    height, width, channels = values.shape
    strips = [values[..., c] for c in range(channels)] if planes else [values]
    strips = [strip.astype(f"<u{bits // 8}").tobytes() for strip in strips]
    places = [8 + sum(map(len, strips[:k])) for k in range(len(strips))]
    entries = [(256, [width]), (257, [height]), (258, [bits] * channels), (262, [photometric])]
    entries += [(273, places), (277, [channels]), (278, [height]), (279, [*map(len, strips)])]
    entries = sorted([*entries, (284, [1 + planes]), *tags])
    content, table = b"".join(strips), struct.pack("<H", len(entries))
    for tag, numbers in entries:
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            content, packed = content + packed, struct.pack("<I", 8 + len(content))
        table += struct.pack("<HHI", tag, 4, len(numbers)) + packed
    return b"II*\0" + struct.pack("<I", 8 + len(content)) + content + table + bytes(4)


COLOURS_OF_16_BITS = {
    "RGB": (3, lambda values: png(values, 2)),
    "LA": (2, lambda values: png(values, 4)),
    "RGBA": (4, lambda values: png(values, 6)),
    "TIFF": (3, lambda values: tiff(values, 2)),
    "CMYK": (4, lambda values: tiff(values, 5)),
}


@pytest.mark.parametrize("kind", COLOURS_OF_16_BITS)
@pytest.mark.parametrize("bits", [8, 12, 14, 15, 16])
def test_colours_of_16_bits_are_the_upper_8_or_are_refused(kind, bits):
    channels, made_file = COLOURS_OF_16_BITS[kind]
    values = np.random.default_rng(0).integers(0, 2**bits, (9, 11, channels))
    values[0, 0] = 2**bits - 1
    if kind in ("LA", "RGBA"):
        values[..., -1] = 65535
    data = made_file(values)
    if bits < 15:
        with pytest.raises(InputError, match=f"up to {2**bits - 1:,}, which fit no range"):
            decode(data)
        return
    expected = (values >> 8).astype(np.uint8)
    expected = expected[..., [0, 0, 0]] if kind == "LA" else expected[..., :3]
    if kind == "CMYK":
        upper = (values >> 8).astype(np.uint8)
        expected = np.asarray(Image.fromarray(upper, "CMYK").convert("RGB"))
    np.testing.assert_array_equal(decode(data), expected)


def test_planes_of_16_bits_are_refused_where_pillow_reads_noise():
    values = np.random.default_rng(0).integers(0, 2**16, (9, 11, 3))
    with pytest.raises(InputError, match=r"^has a plane of 16 bits for each channel; save it with"):
        decode(tiff(values, 2, planes=True))
    np.testing.assert_array_equal(decode(tiff(values, 2)), values >> 8)
    np.testing.assert_array_equal(decode(tiff(values >> 8, 2, 8, planes=True)), values >> 8)


def test_signed_values_of_8_bits_are_refused():
    values = np.random.default_rng(0).integers(0, 256, (9, 11, 1))
    with pytest.raises(InputError, match=r"^has signed values of 8 bits; save it with unsigned"):
        decode(tiff(values, 1, 8, [(339, [2])]))
    unsigned = decode(tiff(values, 1, 8, [(339, [1])]))
    np.testing.assert_array_equal(unsigned, np.repeat(values, 3, 2))


def test_a_colour_map_of_8_bits_is_refused_where_pillow_reads_black():
    values = np.random.default_rng(0).integers(0, 256, (9, 11, 1))
    ramp = np.tile(np.arange(256), 3)
    with pytest.raises(InputError, match=r"^has a colour map of 8-bit values, .* save it as PNG$"):
        decode(tiff(values, 3, 8, [(320, ramp.tolist())]))
    expected = np.repeat(values, 3, 2)
    np.testing.assert_array_equal(
        decode(tiff(values, 3, 8, [(320, (ramp * 257).tolist())])), expected
    )
    black = decode(tiff(values, 3, 8, [(320, (ramp * 0).tolist())]))
    np.testing.assert_array_equal(black, expected * 0)
