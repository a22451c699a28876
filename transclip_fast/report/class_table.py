"""The classes of a page, as columns; of too many those with the most images."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from transclip_fast.data.names import class_name
from transclip_fast.report.view import View
from transclip_fast.store.corrections import label_texts
from transclip_fast.store.json_text import script_json

# So that a page has at most 20 MB.
LISTED_CLASSES, NAME_BYTES = 50_000, 4_000_000


def class_table(view: View, named: Collection[int]) -> dict[str, Any]:
    """
    Numbers of the largest classes and of those that are `named` elsewhere, as JSON.

    `label` has what corrections call a class, by its place in the columns, where that is not its
    `name`; null where nothing would do.
    """
    n_classes, names = view.run["n_classes"], view.run["class_names"]
    before = np.bincount(view.zero_shot, minlength=n_classes)
    now = np.bincount(view.labels, minlength=n_classes)
    largest = np.argsort(-(before + now), kind="stable")[:LISTED_CLASSES]
    ids = np.union1d(largest, np.array(sorted(named), np.int64))
    sums = np.bincount(view.labels, view.confidence, minlength=n_classes)
    whole = [class_name(k, names) for k in ids]
    length = _fitting_length(whole)
    shown = [name if len(name) <= length else f"{name[:length]}…" for name in whole]
    called = label_texts(names, n_classes, length)
    if names:  # one that does not tell its class from the others shows its position, too
        pairs = zip(ids.tolist(), whole, shown, strict=True)
        shown = [cut if called[k] == name else f"{cut} (class {k})" for k, name, cut in pairs]
    columns: dict[str, Any] = {
        "id": ids.tolist(),
        "name": shown,
        "label": {i: called[k] for i, k in enumerate(ids) if called[k] != shown[i]},
        "before": before[ids].tolist(),
        "now": now[ids].tolist(),
        "confidence": _ratios(sums[ids], now[ids]),
    }
    if view.truth is not None:
        known = view.truth >= 0
        truth, rows = view.truth[known], np.bincount(view.truth[known], minlength=n_classes)
        for name, labels in (("accuracyBefore", view.zero_shot), ("accuracy", view.labels)):
            right = np.bincount(truth[truth == labels[known]], minlength=n_classes)
            columns[name] = _ratios(right[ids], rows[ids])
    return columns


def _ratios(parts: np.ndarray, wholes: np.ndarray) -> list[float | None]:
    """Quotients, None where there is nothing to divide by; 1 is not by rounding."""
    found: list[float | None] = []
    for part, whole in zip(parts.tolist(), wholes.tolist(), strict=True):
        ratio = round(part / whole, 4) if whole else None
        found.append(0.9999 if ratio == 1 and part < whole else ratio)
    return found


def _fitting_length(names: Sequence[str]) -> int:
    """To how many characters names are cut, so that they fit into `NAME_BYTES`."""
    length = max(map(len, names))
    while len(script_json([name[:length] for name in names])) > NAME_BYTES:
        length //= 2
    return length
