"""
Which rows to correct first: the least certain ones.

Of the choices that a result allows this one gains most, more than those that mind zero-shot or
neighbours: `bench.accuracy.corrections`.
"""

from __future__ import annotations

import numpy as np

from transclip_fast.store.results import CALIBRATED, Result

COLUMNS = ("confidence", CALIBRATED, "known")  # of the predictions


def suggested_rows(result: Result, n: int) -> np.ndarray:
    """At most `n` rows of a result whose class was not given, the first to correct first."""
    rows = np.flatnonzero(~result.known())
    return rows[np.argsort(result.confidence()[rows], kind="stable")[:n]]
