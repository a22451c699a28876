"""
Which rows to correct first: the least certain ones.

Of the choices that a result allows this one gains most, more than those that mind zero-shot or
neighbours: `bench.accuracy.corrections`.
"""

from __future__ import annotations

import numpy as np

from transclip_fast.errors import InputError
from transclip_fast.store.results import Result

COLUMNS = ("confidence", "known")  # of the predictions


def suggested_rows(result: Result, n: int) -> np.ndarray:
    """At most `n` rows of a result whose class was not given, the first to correct first."""
    table = result.predictions
    if "confidence" not in table.column_names:
        raise InputError(f"{result.folder}: has no column 'confidence'; solve again")
    confidence = table.column("confidence").to_numpy()
    rows = np.arange(len(confidence))
    if "known" in table.column_names:
        rows = rows[~table.column("known").to_numpy()]
    chosen: np.ndarray = rows[np.argsort(confidence[rows], kind="stable")[:n]]
    return chosen
