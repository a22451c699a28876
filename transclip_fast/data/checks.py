"""Checks of the arrays that a user passes, each failing with one line that names the row."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from transclip_fast.data.npy_shards import StoredRows
from transclip_fast.errors import InputError

# fp16 rows are off by up to 6e-4; renormalising those would move z by up to 3e-2.
UNIT_NORM_TOLERANCE = 2e-3
PROBABILITY_TOLERANCE = 1e-2
UNLISTED_MASS = 1e-6  # least mass that a row of a sparse prior leaves to the classes it omits
ROWS_PER_CHECK = 4096
ALIGNMENT = 64  # bytes


def as_matrix(array: Any, name: str, *, columns: int | None = None) -> torch.Tensor:
    """
    A finite two-dimensional float tensor from a numpy array, a torch tensor or nested lists.

    Parameters
    ----------
    array : array_like (rows, columns)
        Any floating or integer type, which the tensor has, too.
    name : str
        Name of the array in error messages.
    columns : int, optional
        Required number of columns.

    Raises
    ------
    InputError
        Not two-dimensional, no rows, wrong number of columns, not numeric, NaN or infinite.
    """
    matrix = _in_memory(unread_matrix(array, name, columns))
    for start in range(0, len(matrix), ROWS_PER_CHECK):
        block = matrix[start : start + ROWS_PER_CHECK]
        if torch.isfinite(block.float().sum()):  # a single NaN or infinity makes the sum one
            continue
        row = _first(~torch.isfinite(block).all(1))
        if row is not None:
            raise _not_finite(matrix, start + row, name)
    return matrix


def unread_matrix(array: Any, name: str, columns: int | None = None) -> torch.Tensor | StoredRows:
    """
    A matrix whose entries are not checked; rows in files stay there.

    Raises
    ------
    InputError
        Not two-dimensional, no rows, wrong number of columns, not numeric.
    """
    matrix = array if isinstance(array, StoredRows) else _as_tensor(array, name)
    if len(matrix.shape) != 2 or 0 in matrix.shape:
        raise InputError(
            f"{name}: expected a non-empty (rows, columns) array, got shape {tuple(matrix.shape)}"
        )
    if columns is not None and matrix.shape[1] != columns:
        raise InputError(
            f"{name}: has {matrix.shape[1]} columns, expected {columns}; encode both with one model"
        )
    return matrix


def as_unit_rows(array: Any, name: str, *, columns: int | None = None) -> torch.Tensor:
    """
    A float32 matrix whose rows have unit norm; `array` itself is never modified.

    Rows whose norm is within 2e-3 of 1 are used as they are, rows further off are divided by
    their norm in float64, with one warning.

    Raises
    ------
    InputError
        As `as_matrix`, and for an all-zero row.
    """
    matrix = _in_memory(unread_matrix(array, name, columns))
    divisors = unit_divisors(matrix, name)
    matrix = _aligned(matrix.to(torch.float32))
    if divisors is not None:
        matrix = matrix.clone()
        for off in torch.split((divisors != 1).nonzero()[:, 0], ROWS_PER_CHECK):
            matrix[off] = _divided(matrix[off], divisors[off])
    return matrix


def unit_divisors(matrix: torch.Tensor | StoredRows, name: str) -> torch.Tensor | None:
    """
    The divisors (N,) float64 that make unit rows of (N, d): norms further than 2e-3 from 1, else 1.

    None if all are 1, otherwise with one warning.

    Raises
    ------
    InputError
        A row that is all zero, not finite, or too large for float32.
    """
    norms = torch.empty(len(matrix), dtype=torch.float64)
    for start in range(0, len(matrix), ROWS_PER_CHECK):
        block = slice(start, start + ROWS_PER_CHECK)
        norms[block] = _norms(matrix[block])
    if (row := _first(~norms.isfinite())) is not None:
        raise _not_finite(matrix, row, name)
    if (row := _first(norms == 0)) is not None:
        raise InputError(f"{name}: row {row} is all zero; remove or recompute that row")
    far = (norms - 1).abs() > UNIT_NORM_TOLERANCE
    if (row := _first(far)) is None:
        return None
    warnings.warn(
        f"{name}: {int(far.sum())} of {len(matrix)} rows were not unit vectors and were "
        f"normalised (row {row} has norm {norms[row]:.4g})",
        stacklevel=3,
    )
    return norms.where(far, 1.0)


def unit_sample(matrix: torch.Tensor | StoredRows, ids: torch.Tensor) -> torch.Tensor:
    """
    Some rows of an `unread_matrix` as unit rows, with the bits of `Rows(matrix)[ids]`.

    Nothing is checked and nothing warned of: that is done when all rows are read.

    Parameters
    ----------
    matrix : Tensor or StoredRows (N, d)
    ids : Tensor (n,) int64

    Returns
    -------
    Tensor (n, d) float32
        Where the matrix is; rows in files come to the CPU.
    """
    if isinstance(matrix, StoredRows):
        rows = torch.from_numpy(matrix[ids.cpu().numpy()])
    else:
        rows = matrix[ids.to(matrix.device)]
    rows = _aligned(rows.to(torch.float32))
    norms = _norms(rows)
    far = (norms - 1).abs() > UNIT_NORM_TOLERANCE
    rows[far] = _divided(rows[far], norms[far])
    return rows


def as_labels(array: Any, name: str, *, rows: int, n_classes: int) -> torch.Tensor:
    """
    Class indices (rows,) as int64.

    Raises
    ------
    InputError
        Wrong length, not whole numbers, or outside 0 .. n_classes - 1.
    """
    tensor = _as_tensor(array, name)
    if tensor.shape != (rows,):
        raise InputError(
            f"{name}: expected {rows} labels, one a row, got shape {tuple(tensor.shape)}"
        )
    labels = tensor.to(torch.int64)
    if tensor.is_floating_point() and (row := _first(labels != tensor)) is not None:
        raise InputError(
            f"{name}: row {row} has label {tensor[row]:.4g}; labels are whole numbers, positions "
            "in the list of classes"
        )
    if (row := _first((labels < 0) | (labels >= n_classes))) is not None:
        raise InputError(
            f"{name}: row {row} has label {int(labels[row])}, outside 0 .. {n_classes - 1}; "
            "labels are positions in the list of classes"
        )
    return labels


def as_labelled_rows(
    name: str, rows: Any, labels: Any, dim: int, n_classes: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """
    Unit rows (M, d) and their labels (M,) int64, on the CPU; None if both are None.

    Raises
    ------
    InputError
        One without the other, and as `as_unit_rows` and `as_labels`.
    """
    if rows is None and labels is None:
        return None
    if rows is None or labels is None:
        raise InputError(f"{name}_features and {name}_labels come together; one is missing")
    features = as_unit_rows(rows, f"{name}_features", columns=dim)
    checked = as_labels(labels, f"{name}_labels", rows=len(features), n_classes=n_classes)
    return features, checked.cpu()


def as_log_probabilities(array: Any, name: str, *, rows: int) -> torch.Tensor:
    """
    log of a (rows, K) matrix of probabilities, float32; a probability of 0 gives -inf.

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
    if (row := _first((matrix < 0).any(1))) is not None:
        raise InputError(f"{name}: row {row} has a negative probability; scores go in prior_logits")
    totals = matrix.sum(1)
    if (row := _first((totals - 1).abs() > PROBABILITY_TOLERANCE)) is not None:
        raise InputError(
            f"{name}: row {row} sums to {totals[row]:.4g}, not 1; scores go in prior_logits"
        )
    return (matrix / totals[:, None]).log().to(torch.float32)


def as_logits(array: Any, name: str, *, rows: int) -> torch.Tensor:
    """log_softmax of a (rows, K) matrix of logits, float32, on the scale a softmax takes."""
    matrix = as_matrix(array, name).to(torch.float32)
    check_rows(matrix, name, rows)
    if (row := _first(~matrix.isfinite().all(1))) is not None:
        raise InputError(f"{name}: row {row} is too large for float32; rescale the logits")
    return torch.log_softmax(matrix, dim=1)


def check_rows(matrix: Any, name: str, rows: int) -> None:
    """Raise InputError unless there is one row per query."""
    if len(matrix) != rows:
        raise InputError(f"{name}: has {len(matrix)} rows, expected {rows}, one per query")


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
        if k is None:
            raise InputError(
                f"{name}: does not say how many classes there are; give text_features or "
                "class_names too"
            )
        row_of, class_of, values = self._checked(name, rows, k)
        mass = torch.bincount(row_of, values, minlength=rows)
        if (row := _first(mass > 1 + PROBABILITY_TOLERANCE)) is not None:
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
            _as_tensor(array, name).double() for array in (self.offsets, self.classes, self.values)
        )
        if len(offsets) != rows + 1:
            raise InputError(f"{name}: has {len(offsets) - 1} rows, expected {rows}, one per query")
        lengths, fits = offsets.diff(), offsets.ndim == 1 and classes.ndim == 1
        fits = fits and classes.shape == values.shape and bool((lengths >= 0).all())
        if not fits or offsets[0] != 0 or offsets[-1] != len(values):
            raise InputError(f"{name}: indices and values do not fit each other; write it again")
        row_of, class_of = torch.repeat_interleave(lengths.long()), classes.long()

        def refuse(wrong: torch.Tensor, why: str) -> None:
            if (entry := _first(wrong)) is not None:
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


def is_aligned(matrix: torch.Tensor) -> bool:
    """Whether float32 rows can be used where they are."""
    # The order of a BLAS library's sums depends on the alignment of its operands.
    return (
        matrix.dtype == torch.float32
        and matrix.is_contiguous()
        and matrix.data_ptr() % ALIGNMENT == 0
    )


def _aligned(matrix: torch.Tensor) -> torch.Tensor:
    if is_aligned(matrix):
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def _as_tensor(array: Any, name: str) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        tensor = array.detach()
    else:
        try:
            values = np.asarray(array)
        except ValueError as error:
            raise InputError(f"{name}: expected an array, got rows of different lengths") from error
        if values.dtype.kind not in "fiub":
            raise InputError(f"{name}: expected numbers, got an array of {values.dtype}")
        odd = any(stride < 0 or stride % values.itemsize for stride in values.strides)
        if values.dtype.byteorder == ">" or odd:
            values = np.ascontiguousarray(values.astype(values.dtype.newbyteorder("=")))
        if values.dtype.kind == "f" and values.dtype.itemsize > 8:
            values = values.astype(np.float64)
        with warnings.catch_warnings():  # of a read-only array; nothing here writes to it
            warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
            tensor = torch.from_numpy(values)
    if tensor.is_complex():
        raise InputError(f"{name}: expected real numbers, got {tensor.dtype}")
    return tensor


def _in_memory(matrix: torch.Tensor | StoredRows) -> torch.Tensor:
    return torch.from_numpy(np.asarray(matrix)) if isinstance(matrix, StoredRows) else matrix


def _first(wrong: torch.Tensor) -> int | None:
    """The first True of (n,) bool, or None."""
    return int(wrong.nonzero()[0, 0]) if wrong.any() else None


def _not_finite(matrix: torch.Tensor | StoredRows, row: int, name: str) -> InputError:
    values = torch.as_tensor(matrix[row : row + 1])
    if values.isfinite().all():
        return InputError(f"{name}: row {row} is too large for float32; rescale that row")
    kind = "NaN" if values.isnan().any() else "an infinite value"
    return InputError(f"{name}: row {row} contains {kind}; remove or recompute that row")


def _norms(block: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Norm of each row (n,) float64."""
    block = torch.as_tensor(block).to(torch.float32)
    norms: torch.Tensor = torch.linalg.vector_norm(block, dim=1)
    if ((norms - 1).abs() > UNIT_NORM_TOLERANCE / 2).any() or not norms.isfinite().all():
        # Squares can overflow or vanish in float32 while the row itself is fine.
        norms = torch.linalg.vector_norm(block, dim=1, dtype=torch.float64)
    return norms.double()


def _divided(rows: torch.Tensor, divisors: torch.Tensor) -> torch.Tensor:
    """Rows (n, d) float32 over their divisors (n,), in float64."""
    return (rows.double() / divisors[:, None].to(rows.device)).float()
