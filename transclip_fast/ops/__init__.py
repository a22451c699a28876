"""The few operations on all N rows that the solver is made of, and who answers them."""

from transclip_fast.ops.torch import (
    class_sums,
    energies,
    log_prior,
    score,
    start_rows,
    sum_of_squares,
    sweep,
)

__all__ = [
    "class_sums",
    "energies",
    "log_prior",
    "score",
    "start_rows",
    "sum_of_squares",
    "sweep",
]
