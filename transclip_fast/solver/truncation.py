"""The number of entries that sparse scores and assignments keep of a row."""

from __future__ import annotations

import warnings
from dataclasses import asdict

import torch

from transclip_fast.data.feature_rows import Rows, Tensors
from transclip_fast.errors import InputError, user_level
from transclip_fast.solver.layout import ENTRY_BYTES, FEWEST_CANDIDATES, FREE_LIST_BYTES
from transclip_fast.types import FLOOR, Assignments, Truncation

WHOLE_CLASSES = 64  # of lists that drop nothing
# Mean mass of y_hat^lambda outside the candidates. That of z is smaller: the mixture and the
# neighbours sharpen it.
MAX_MISSED_MASS = 5e-2
LARGE_DROPPED_MASS = 0.1  # of z, worth a warning


def choose_truncation(
    log_prior: torch.Tensor,
    n_rows: int,
    *,
    most: int,
    candidates: int | None = None,
    rank: int | None = None,
) -> Truncation:
    """
    Choose how many entries of a row to keep.

    Parameters
    ----------
    log_prior : Tensor (n, K)
        lambda log y_hat of some of the rows.
    n_rows : int
        N.
    most : int
        Candidates for which there is memory.
    candidates, rank : int, optional
        C and R set by the user; with both at K nothing is dropped.

    Raises
    ------
    InputError
        `rank` above `candidates`.
    """
    n_classes = log_prior.shape[1]
    candidates, rank = (c if c is None else min(c, n_classes) for c in (candidates, rank))
    if candidates is None:
        log_prior = log_prior.nan_to_num(0.0, neginf=-torch.inf)  # 0 times -inf is NaN
        needed = needed_candidates(log_prior.log_softmax(1), n_rows, most)
        candidates = max(needed, rank or 1)
    elif rank is not None and rank > candidates:
        raise InputError(f"rank={rank} is more than candidates={candidates}")
    # Lists of few classes are short: there is nothing to gain by dropping some of them.
    whole = rank == n_classes or (rank is None and candidates == n_classes <= WHOLE_CLASSES)
    return Truncation(candidates, rank or candidates, 0.0 if whole else FLOOR)


def needed_candidates(log_p: torch.Tensor, n_rows: int, most: int) -> int:
    """
    The number of candidates that hold nearly all of the prior's mass, doubled from the fewest.

    Parameters
    ----------
    log_p : Tensor (n, K)
        lambda log y_hat of some of the rows, normalised.
    n_rows : int
        N.
    most : int
        Candidates for which there is memory.
    """
    most = min(most, log_p.shape[1])
    # Mass of the 1, 2, ... largest classes of a row, mean over the sample.
    mass = log_p.exp().topk(most, dim=1).values.cumsum(1).mean(0)
    needed = max(FEWEST_CANDIDATES, FREE_LIST_BYTES // (ENTRY_BYTES * n_rows))
    while needed < most and mass[needed - 1] < 1 - MAX_MISSED_MASS:
        needed *= 2
    return min(needed, most)


def losses(
    truncation: Truncation, z: Assignments, tail_mass: float, features: Rows
) -> dict[str, float]:
    """The truncation and the mass that it lost, as in `TransCLIP.truncation_`."""

    def leaf(rows: slice) -> Tensors:
        kept = z.values[rows].sum(dtype=torch.float64)
        return kept, z.bound[rows].sum(dtype=torch.float64)

    kept, bounds = (float(x) / len(features) for x in features.total(leaf, [(), ()]))
    dropped = 1 - kept
    if dropped > LARGE_DROPPED_MASS:
        warnings.warn(
            f"sparse assignments keep {100 * (1 - dropped):.0f} % of the mass only; raise "
            "candidates and rank",
            stacklevel=user_level(),
        )
    return asdict(truncation) | {
        "mean_dropped": max(dropped, 0.0),
        "tail_mass": tail_mass,
        "largest_bound": features.largest(z.bound),
        "mean_bound": bounds,
    }
