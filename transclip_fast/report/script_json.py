"""JSON within a page."""

from __future__ import annotations

import json
from typing import Any


def script_json(data: Any) -> str:
    """JSON that ends no element and starts none; ASCII, so that no line separator is in it."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
