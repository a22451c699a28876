"""
Which rows to correct first: those whose label has the smallest z, where the solution wavers.

Of the choices that a result allows this one gains most, more than those by calibrated confidences,
zero-shot or neighbours: `bench.accuracy.corrections`.
"""

from __future__ import annotations

import numpy as np

from transclip_fast.store.results import Result

COLUMNS = ("confidence", "known")  # of the predictions


def suggested_rows(result: Result, n: int) -> np.ndarray:
    """At most `n` rows of a result whose class was not given, the first to correct first."""
    rows = np.flatnonzero(~result.flags("known"))
    return rows[np.argsort(result.shares("confidence")[rows], kind="stable")[:n]]
