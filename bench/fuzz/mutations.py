"""Damage to a file's bytes: of any file, and of what its format means."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.fuzz import arrays, containers

WHOLE, STRUCTURED = 0.35, 0.65  # shares of damage to bytes and to what they mean
INTERESTING = (b"\0", b"\xff", b"\n", b",", b'"', b"\x80", b"\xed\xb2\x80", b"\xef\xbb\xbf", b"\r")
WORDS = (b"nan", b"-1", b"1e999", b"99999999999999999999", b"../../x", b"/dev/zero", b"a\0b", b"")
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, -40, 300, 50_000, 3_000_000,
    2**31, 2**63, 10**30, -(10**30), 0.5, 1e308, float("nan"),
    float("inf"), "", "a\0b", "\ud800", "../..", "x" * 5000, [], [[]], {}, {"a": {}}, [None],
    [1, "a"], "1", "é", "\n", [0, 0, 0, 0, 0],
)  # fmt: skip
Mutation = Callable[[bytes, random.Random], bytes]


def mutate(path: Path, content: bytes, draw: random.Random) -> bytes:
    """Return the content of a file with one or two faults."""
    for _ in range(1 + (draw.random() < 0.2)):
        structured = BY_SUFFIX.get(path.suffix)
        if structured is None or draw.random() < WHOLE:
            content = of_bytes(content, draw)
            continue
        try:
            content = structured(content, draw)
        except Exception:  # noqa: BLE001 - an earlier fault, that its format's parser refuses
            content = of_bytes(content, draw)
    return content


def of_bytes(content: bytes, draw: random.Random) -> bytes:
    """Flip bits, cut, insert, swap or repeat parts of any content."""
    data, size = bytearray(content), max(len(content), 1)
    # Most formats have what matters at one of their ends.
    near = draw.choice((size, size, min(size, 256)))
    place = draw.randrange(near) if draw.random() < 0.8 else size - 1 - draw.randrange(near)
    match draw.randrange(7):
        case 0:
            for _ in range(draw.choice((1, 1, 2, 8))):
                spot = min(place + draw.randrange(4), size - 1)
                data[spot : spot + 1] = bytes(
                    [(data[spot] if data else 0) ^ 1 << draw.randrange(8)]
                )
        case 1:
            data[place : place + 1] = bytes([draw.randrange(256)])
        case 2:
            del data[place:]
        case 3:
            data[place:place] = draw.choice(INTERESTING) * draw.choice((1, 1, 2, 600))
        case 4:
            length = draw.choice((1, 4, 16, 512))
            other = draw.randrange(size)
            first, second = data[place : place + length], data[other : other + length]
            data[place : place + length], data[other : other + length] = second, first
        case 5:
            length = draw.choice((1, 4, 64, 512))
            data[place:place] = data[place : place + length]
        case _:
            length = draw.choice((1, 2, 4, 8))
            number = draw.choice((0, 1, 2**63, 2**64 - 1, 2**31, 2**32 - 1, 10**6))
            data[place : place + length] = number.to_bytes(8, "little")[:length]
    return bytes(data)


def of_text(content: bytes, draw: random.Random) -> bytes:
    """Replace, repeat, empty or take out a line or a value."""
    lines = content.split(b"\n")
    k = draw.randrange(len(lines))
    match draw.randrange(5):
        case 0:
            lines[k] = draw.choice(WORDS)
        case 1:
            lines[k:k] = [lines[k]] * draw.choice((1, 1, 200))
        case 2:
            lines[k] = b""
        case 3:
            values = lines[k].split(b",")
            values[draw.randrange(len(values))] = draw.choice(WORDS + INTERESTING)
            lines[k] = b",".join(values)
        case _:
            del lines[k]
    return b"\n".join(lines)


def of_json(content: bytes, draw: random.Random) -> bytes:
    """Change one value of a JSON text, its type or its name, or name one twice."""
    value = json.loads(content)
    if draw.random() < 0.08:
        return nested(content, draw)
    if draw.random() < 0.1 and content.lstrip().startswith(b"{"):
        key, inner = draw.choice(list(value.items()))
        other = draw.choice((inner, *ODD_VALUES))
        again = f"{json.dumps(key)}: {json.dumps(other)}, ".encode()
        return content.replace(b"{", b"{" + again, 1)
    changed = change_value(value, draw)
    return json.dumps(changed, ensure_ascii=draw.random() < 0.9).encode(errors="surrogatepass")


def nested(content: bytes, draw: random.Random) -> bytes:
    """Nest a JSON text so deep that a parser that calls itself gives up."""
    depth = draw.choice((900, 3000, 200_000))
    begin, end = draw.choice(((b"[", b"]"), (b'{"a":', b"}")))
    return begin * depth + content + end * depth


def change_value(value: Any, draw: random.Random) -> Any:
    """Return a JSON value of which one part is another."""
    if draw.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return draw.choice(ODD_VALUES)
    if isinstance(value, list):
        k = draw.randrange(len(value))
        match draw.randrange(4):
            case 0:
                return value[:k] + value[k + 1 :]
            case 1:
                return [*value[:k], value[k], *value[k:]]
            case _:
                return [*value[:k], change_value(value[k], draw), *value[k + 1 :]]
    key = draw.choice(list(value))
    match draw.randrange(6):
        case 0:
            return {name: inner for name, inner in value.items() if name != key}
        case 1:
            name = str(draw.choice(ODD_VALUES))
            return {(name if own == key else own): inner for own, inner in value.items()}
        case _:
            return {**value, key: change_value(value[key], draw)}


def of_safetensors(content: bytes, draw: random.Random) -> bytes:
    """Change the header of a .safetensors file, or a tensor's numbers."""
    return arrays.of_safetensors(content, draw, of_json)


BY_SUFFIX: dict[str, Mutation] = {
    ".json": of_json,
    ".npy": arrays.of_npy,
    ".npz": arrays.of_npz,
    ".safetensors": of_safetensors,
    ".pt": arrays.of_pt,
    ".bin": arrays.of_pt,
    ".parquet": containers.of_parquet,
    ".tar": containers.of_tar,
    ".png": containers.of_png,
    ".csv": of_text,
    ".txt": of_text,
}
