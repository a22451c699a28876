"""Priors of another method: checks of probabilities and logits, and sparse priors."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from transclip_fast.data.checks import as_matrix, as_tensor, check_rows, first_row
from transclip_fast.errors import InputError, user_level

PRIORS = ("prior", "prior_logits", "prototypes")  # arrays of which each tells a prior
PROBABILITY_TOLERANCE = 1e-2  # of the sum of a row
LOG_ROWS = 512  # at a time: quotients and logarithms of all rows take 16 bytes an entry in float64
UNLISTED_MASS = 1e-6  # at least, that a row of a sparse prior leaves to the classes it omits


def as_log_probabilities(array: Any, name: str, *, rows: int) -> torch.Tensor:
    """
    log of a (rows, K) matrix of probabilities, float32 in C order; a probability of 0 gives -inf.

    A scipy sparse array becomes dense as in `ListedPrior`.

    Raises
    ------
    InputError
        Wrong number of rows, a negative entry, or a row whose sum is not 1 (to 1e-2).
    """
    if hasattr(array, "tocsr"):
        csr = array.tocsr()
        listed = ListedPrior(csr.indptr, csr.indices, csr.data, csr.shape[1])
        array = listed.dense(name, rows=rows)
    matrix = as_matrix(array, name)
    check_rows(matrix, name, rows)
    if matrix.dtype != torch.float64:  # its log fits float32 even if the probability does not
        matrix = matrix.to(torch.float32)
    if (row := first_row((matrix < 0).any(1))) is not None:
        raise InputError(f"{name}: row {row} has a negative probability; scores go in prior_logits")
    totals = matrix.sum(1)
    if (row := first_row((totals - 1).abs() > PROBABILITY_TOLERANCE)) is not None:
        raise InputError(
            f"{name}: row {row} sums to {totals[row]:.4g}, not 1; scores go in prior_logits"
        )
    log = torch.empty_like(matrix, dtype=torch.float32, memory_format=torch.contiguous_format)
    parts = (torch.split(array, LOG_ROWS) for array in (log, matrix, totals[:, None]))
    for out, part, total in zip(*parts, strict=True):
        out.copy_((part / total).log())
    return log


def as_logits(array: Any, name: str, *, rows: int) -> torch.Tensor:
    """log_softmax of (rows, K) logits on the scale a softmax takes, float32 in C order."""
    matrix = as_matrix(array, name).to(torch.float32)
    check_rows(matrix, name, rows)
    if (row := first_row(~matrix.isfinite().all(1))) is not None:
        raise InputError(f"{name}: row {row} is too large for float32; rescale the logits")
    _warn_of_no_logits(matrix, name)
    return torch.log_softmax(matrix, dim=1).contiguous()


def _warn_of_no_logits(matrix: torch.Tensor, name: str) -> None:
    """Warn of a matrix (rows, K) that seems to hold probabilities or cosines."""
    low, high = matrix.aminmax()
    if low == high or low < -1 or high > 1:
        return
    if low >= 0 and ((matrix.sum(1) - 1).abs() <= PROBABILITY_TOLERANCE).all():
        found = "all rows are >= 0 and sum to 1: are these probabilities? then give them as prior"
    else:
        found = (
            "all values are within -1 .. 1: are these cosines? then multiply them by the logit "
            "scale, 100 for CLIP"
        )
    warnings.warn(f"{name}: {found}", stacklevel=user_level())


@dataclass(frozen=True)
class ListedPrior:
    """
    A sparse prior: probabilities of some classes of each row, as a rule its largest.

    The mass that a row's entries leave, but at least 1e-6, is spread evenly over the classes it
    does not list: with a probability of 0 they could never be assigned, whatever the images show.
    An entry of 0 counts as not listed.

    Parameters
    ----------
    offsets : array_like (N + 1,) int
        Bounds of each row's entries.
    classes, values : array_like (E,) int, (E,) float
    n_classes : int, optional
        K, if it is known.
    """

    offsets: Any
    classes: Any
    values: Any
    n_classes: int | None = None

    def dense(self, name: str, *, rows: int, n_classes: int | None = None) -> torch.Tensor:
        """
        All probabilities (N, K) float32; `n_classes` is K for a prior that does not know it.

        Raises
        ------
        InputError
            K is not known, another number of rows, offsets that do not bound the entries, a class
            that is no position in the list of classes or comes twice in a row, a value that is
            negative or not finite, or a row of more mass than 1 (to 1e-2).
        """
        k = self.n_classes or n_classes
        if None not in (self.n_classes, n_classes) and self.n_classes != n_classes:
            raise InputError(f"{name}: has {self.n_classes} classes, expected {n_classes}")
        if k is None:
            raise InputError(
                f"{name}: does not say how many classes there are; give text_features or "
                "class_names too"
            )
        row_of, class_of, values = self._checked(name, rows, k)
        mass = torch.bincount(row_of, values, minlength=rows)
        if (row := first_row(mass > 1 + PROBABILITY_TOLERANCE)) is not None:
            raise InputError(
                f"{name}: row {row} sums to {mass[row]:.4g}, more than 1; scores go in prior_logits"
            )
        n_omitted = k - torch.bincount(row_of, minlength=rows)
        rest = torch.where(n_omitted > 0, (1 - mass).clamp_min(UNLISTED_MASS), 0.0)
        scale = torch.where(mass > 0, ((1 - rest) / mass).clamp_max(1), 1.0)
        dense = (rest / n_omitted.clamp_min(1)).float()[:, None].repeat(1, k)
        dense[row_of, class_of] = (values * scale[row_of]).float()
        return dense

    def _checked(
        self, name: str, rows: int, n_classes: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Row and class (E,) int64 and value (E,) float64 of the entries that are not 0."""
        offsets, classes, values = (
            as_tensor(array, name).double() for array in (self.offsets, self.classes, self.values)
        )
        if offsets.ndim and len(offsets) != rows + 1:
            raise InputError(f"{name}: has {len(offsets) - 1} rows, expected {rows}, one per query")
        fits = offsets.ndim == classes.ndim == 1 and classes.shape == values.shape
        lengths = offsets.flatten().diff()
        fits = fits and bool(((lengths >= 0) & (lengths == lengths.round())).all())
        if not fits or offsets[0] != 0 or offsets[-1] != len(values):
            raise InputError(f"{name}: indices and values do not fit each other; write it again")
        row_of, class_of = torch.repeat_interleave(lengths.long()), classes.long()

        def refuse(wrong: torch.Tensor, why: str) -> None:
            if (entry := first_row(wrong)) is not None:
                found = why.format(f"{float(classes[entry]):.10g}")
                raise InputError(f"{name}: row {int(row_of[entry])} {found}")

        used = values != 0
        refuse(~values.isfinite(), "contains a value that is not finite; recompute that row")
        refuse(values < 0, "has a negative probability; scores go in prior_logits")
        refuse(
            used & ~((classes >= 0) & (classes < n_classes) & (classes == class_of)),
            f"names class {{}}, outside 0 .. {n_classes - 1}; classes are positions in the list of "
            "classes",
        )
        cells = (row_of * n_classes + class_of).where(used, -1)
        order = cells.argsort(stable=True)
        again = torch.zeros_like(used)
        again[order[1:]] = cells[order].diff() == 0
        refuse(again & used, "names class {} twice; add up what belongs together")
        return row_of[used], class_of[used], values[used]
