"""How much of each row the short form of scores and assignments keeps."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from transclip_fast.device import exact_float32, free_bytes
from transclip_fast.errors import InputError
from transclip_fast.prior import Prior

FORMS = ("auto", "dense", "sparse")
# Up to this size z, its successor and its scores stay whole: nothing is gained by lists.
DENSE_BYTES = 1 << 25
# z below this is left out; the mass of what is left out is dealt with as a whole.
FLOOR = 1e-4
# Mass of the prior, by far the softest distribution of a run, that candidates may miss on average.
MISSED = 2e-3
SAMPLE = 1024  # rows on which it is measured
FEWEST, MOST = 16, 128
# Lists are held in scores, in z and in the next z: an int32 and a float32 each time.
ENTRY_BYTES = 24
SMALL = 1 << 26  # bytes of lists that are not worth fewer than all candidates


@dataclass(frozen=True)
class Truncation:
    """
    What the short form keeps of a row.

    Parameters
    ----------
    candidates : int
        C, classes of the base score at most.
    rank : int
        R, classes of z at most, no more than C.
    floor : float
        z below it is dropped, and so are candidates that no message can lift to it. The largest
        entry of a row always stays.
    """

    candidates: int
    rank: int
    floor: float = FLOOR

    @classmethod
    def measured(cls, sample: torch.Tensor, n_rows: int, free: int) -> Truncation:
        """
        As many candidates as the prior needs and memory allows.

        Parameters
        ----------
        sample : Tensor (n, K)
            log y_hat of some of the rows.
        n_rows : int
            N.
        free : int
            Bytes of memory that is free; lists take half of it at most.
        """
        allowed = max(MOST, SMALL // (ENTRY_BYTES * n_rows))
        room = free // (2 * ENTRY_BYTES * n_rows)
        most = max(1, min(allowed, room, sample.shape[1]))
        # Mass of the 1, 2, ... largest classes of a row, averages over the sample.
        mass = sample.exp().topk(most, dim=1).values.cumsum(1).mean(0)
        needed = FEWEST
        while needed < most and mass[needed - 1] < 1 - MISSED:
            needed *= 2
        kept = min(needed, most)
        return cls(kept, kept)

    def losses(self, tail_mass: float, bound: torch.Tensor) -> dict[str, float]:
        """What was kept, and what that lost: see `TransCLIP.truncation_`."""
        worst, mean = float(bound.max()), float(bound.mean())
        return asdict(self) | {"tail_mass": tail_mass, "largest_bound": worst, "mean_bound": mean}


def choose_truncation(
    prior: Prior, features: torch.Tensor, *, form: str, candidates: int | None, rank: int | None
) -> Truncation | None:
    """
    What to keep of the rows of a problem; None where everything is kept.

    Parameters
    ----------
    form : {"auto", "dense", "sparse"}
    candidates, rank : int, optional
        C and R where they are given; with both at K nothing at all is dropped.

    Raises
    ------
    InputError
        `rank` above `candidates`.
    """
    n_rows, n_classes, free = len(features), prior.n_classes, free_bytes(features.device)
    if form == "auto" and candidates is None and rank is None:
        limit = DENSE_BYTES if features.device.type == "cpu" else free // 2
        form = "dense" if 12 * n_rows * n_classes <= limit else "sparse"
    if form == "dense":
        return None
    if candidates is None:
        rows = torch.linspace(0, n_rows - 1, min(n_rows, SAMPLE)).long().to(features.device)
        with exact_float32():
            chosen = Truncation.measured(prior.at(features, rows), n_rows, free)
        candidates = max(chosen.candidates, rank or 1)
    elif rank is not None and rank > candidates:
        raise InputError(f"rank={rank} is more than candidates={candidates}")
    everything = rank is not None and rank >= n_classes
    candidates = min(candidates, n_classes)
    return Truncation(candidates, min(rank or candidates, n_classes), 0.0 if everything else FLOOR)
