"""How much of each row the short form of scores and assignments keeps."""

from __future__ import annotations

import warnings
from dataclasses import asdict

import torch

from transclip_fast.data.feature_rows import evenly_spaced_rows
from transclip_fast.errors import InputError
from transclip_fast.solver.layout import ENTRY_BYTES, FEWEST, SMALL
from transclip_fast.types import FLOOR, Assignments, Truncation

FORMS = ("auto", "dense", "sparse")
# Mass that candidates may miss on average, of y_hat^lambda: the mixture and the neighbours make
# z sharper than that.
MISSED = 5e-2
SAMPLE = 512  # rows on which it is measured
MUCH = 0.1  # of the mass of z, not to be dropped in silence


def measured(sample: torch.Tensor, n_rows: int, most: int) -> Truncation:
    """
    As many candidates as the prior needs.

    Parameters
    ----------
    sample : Tensor (n, K)
        lambda log y_hat of some of the rows, normalised.
    n_rows : int
        N.
    most : int
        For how many there is room.
    """
    most = min(most, sample.shape[1])
    # Mass of the 1, 2, ... largest classes of a row, averages over the sample.
    mass = sample.exp().topk(most, dim=1).values.cumsum(1).mean(0)
    needed = max(FEWEST, SMALL // (ENTRY_BYTES * n_rows))
    while needed < most and mass[needed - 1] < 1 - MISSED:
        needed *= 2
    kept = min(needed, most)
    return Truncation(kept, kept)


def losses(truncation: Truncation, z: Assignments, tail_mass: float) -> dict[str, float]:
    """What was kept, and what that lost: see `TransCLIP.truncation_`."""
    dropped = float(1 - z.values.sum(1, dtype=torch.float64).mean())
    if dropped > MUCH:
        warnings.warn(
            f"sparse assignments keep {100 * (1 - dropped):.0f} % of the mass only; raise "
            "candidates and rank",
            stacklevel=3,
        )
    return asdict(truncation) | {
        "mean_dropped": max(dropped, 0.0),
        "tail_mass": tail_mass,
        "largest_bound": float(z.bound.max()),
        "mean_bound": float(z.bound.mean()),
    }


def sample_ids(n_rows: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The rows (n,) on whose prior `choose_truncation` looks, evenly spread."""
    return evenly_spaced_rows(n_rows, SAMPLE, device)


def choose_truncation(
    sample: torch.Tensor,
    n_rows: int,
    *,
    kl_weight: float,
    most: int | None,
    candidates: int | None = None,
    rank: int | None = None,
) -> Truncation | None:
    """
    What to keep of the rows of a problem; None where everything is kept.

    Parameters
    ----------
    sample : Tensor (n, K)
        log y_hat of some of the rows.
    n_rows : int
        N.
    kl_weight : float
        lambda.
    most : int or None
        Candidates for which there is room; None where z is dense.
    candidates, rank : int, optional
        C and R where they are given; with both at K nothing at all is dropped.

    Raises
    ------
    InputError
        `rank` above `candidates`.
    """
    if most is None:
        return None
    n_classes = sample.shape[1]
    candidates, rank = (c if c is None else min(c, n_classes) for c in (candidates, rank))
    if candidates is None:
        weighted = (sample * kl_weight).nan_to_num_(0.0, neginf=-torch.inf)
        chosen = measured(torch.log_softmax(weighted, 1), n_rows, most)
        candidates = max(chosen.candidates, rank or 1)
    elif rank is not None and rank > candidates:
        raise InputError(f"rank={rank} is more than candidates={candidates}")
    return Truncation(candidates, rank or candidates, 0.0 if rank == n_classes else FLOOR)
