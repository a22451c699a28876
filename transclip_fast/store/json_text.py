"""JSON, strictly: no name twice, no half characters, and values of the expected types."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transclip_fast.errors import InputError


def parse_json(text: str | bytes) -> Any:
    """
    The value in a JSON text.

    Raises
    ------
    ValueError
        Damage, an object that has a name twice, or half of a surrogate pair, which is no text.
    """
    value = json.loads(text, object_pairs_hook=_without_repeats)
    json.dumps(value, ensure_ascii=False).encode()
    return value


def script_json(data: Any) -> str:
    """JSON for a script of a page: it ends and starts no element; ASCII, so no line separator."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def value_of(
    record: Mapping[str, Any],
    name: str,
    kind: type | tuple[type, ...],
    origin: str | Path,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """
    A value of a JSON object, whose type and size are checked.

    A float may be written as a whole number, but is finite; no other type stands for another.

    Raises
    ------
    InputError
        It is missing, of another type, or out of range; with the `origin` of the object.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    value = record.get(name)
    right = type(value) in kinds or (float in kinds and type(value) is int)
    if right and isinstance(value, int | float):
        right = math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63
        right = right and (minimum is None or value >= minimum)
        right = right and (maximum is None or value <= maximum)
    if not right:
        found = repr(value)[:40] if name in record else "missing"
        raise InputError(f"{origin}: {name} is {found}; it is damaged, write it again")
    return value


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; an error if it has one name twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{key!r} is there twice")
    return found
