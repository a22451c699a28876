"""Checks of everything a user hands over, each failing with one line that names the row."""

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
UNLISTED_MASS = 1e-6  # of a row of a sparse prior, at least, for the classes that it leaves out
ROWS_PER_CHECK = 4096
ALIGNMENT = 64  # bytes


def as_matrix(array: Any, name: str, *, columns: int | None = None) -> torch.Tensor:
    """
    A finite two-dimensional float tensor from a numpy array, a torch tensor or nested lists.

    Parameters
    ----------
    array : array_like (rows, columns)
        Any floating or integer type, which is kept.
    name : str
        What the array is called in error messages.
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
        if torch.isfinite(block.float().sum()):  # which it is not with a single NaN or infinity
            continue
        finite = torch.isfinite(block).all(1)
        if not finite.all():
            raise _not_finite(matrix, start + int((~finite).nonzero()[0, 0]), name)
    return matrix


def unread_matrix(array: Any, name: str, columns: int | None = None) -> torch.Tensor | StoredRows:
    """
    A matrix whose entries were not looked at; what is in files stays there.

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

    Rows whose norm is within 2e-3 of 1 are used as they are, rows further off are normalised,
    with one warning.

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
            matrix[off] = (matrix[off].double() / divisors[off, None]).float()
    return matrix


def unit_divisors(matrix: torch.Tensor | StoredRows, name: str) -> torch.Tensor | None:
    """
    What makes unit rows of (N, d): norms (N,) float64 of rows further than 2e-3 off, else 1.

    None where there are no such rows, otherwise with one warning.

    Raises
    ------
    InputError
        A row that is all zero, not finite, or too large for float32.
    """
    norms = torch.empty(len(matrix), dtype=torch.float64)
    for start in range(0, len(matrix), ROWS_PER_CHECK):
        block = slice(start, start + ROWS_PER_CHECK)
        norms[block] = _norms(matrix[block])
    if not norms.isfinite().all():
        raise _not_finite(matrix, int((~norms.isfinite()).nonzero()[0, 0]), name)
    if not norms.all():
        row = int((norms == 0).nonzero()[0, 0])
        raise InputError(f"{name}: row {row} is all zero; remove or recompute that row")
    near = (norms - 1).abs() <= UNIT_NORM_TOLERANCE
    if near.all():
        return None
    row = int((~near).nonzero()[0, 0])
    warnings.warn(
        f"{name}: {int((~near).sum())} of {len(matrix)} rows were not unit vectors and were "
        f"normalised (row {row} has norm {norms[row]:.4g})",
        stacklevel=3,
    )
    return norms.where(~near, 1.0)


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
    if tensor.is_floating_point() and not bool((labels == tensor).all()):
        row = int((labels != tensor).nonzero()[0, 0])
        raise InputError(
            f"{name}: row {row} has label {tensor[row]:.4g}; labels are whole numbers, positions "
            "in the list of classes"
        )
    wrong = ((labels < 0) | (labels >= n_classes)).nonzero()[:, 0]
    if len(wrong):
        row = int(wrong[0])
        raise InputError(
            f"{name}: row {row} has label {int(labels[row])}, outside 0 .. {n_classes - 1}; "
            "labels are positions in the list of classes"
        )
    return labels


def as_log_probabilities(array: Any, name: str, *, rows: int) -> torch.Tensor:
    """
    log of a (rows, K) matrix of probabilities, float32; a probability of 0 gives -inf.

    A scipy sparse array is first made whole, see `ListedPrior`.

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
    if matrix.dtype != torch.float64:  # whose log fits float32 where the probability does not
        matrix = matrix.to(torch.float32)
    negative = (matrix < 0).any(1)
    if negative.any():
        row = int(negative.nonzero()[0, 0])
        raise InputError(f"{name}: row {row} has a negative probability; scores go in prior_logits")
    totals = matrix.sum(1)
    off = ((totals - 1).abs() > PROBABILITY_TOLERANCE).nonzero()[:, 0]
    if len(off):
        row = int(off[0])
        raise InputError(
            f"{name}: row {row} sums to {totals[row]:.4g}, not 1; scores go in prior_logits"
        )
    return (matrix / totals[:, None]).log().to(torch.float32)


def as_logits(array: Any, name: str, *, rows: int) -> torch.Tensor:
    """log_softmax of a (rows, K) matrix of logits, float32, on the scale a softmax takes."""
    matrix = as_matrix(array, name).to(torch.float32)
    check_rows(matrix, name, rows)
    if not matrix.isfinite().all():
        row = int((~matrix.isfinite().all(1)).nonzero()[0, 0])
        raise InputError(f"{name}: row {row} is too large for float32; rescale the logits")
    return torch.log_softmax(matrix, dim=1)


@dataclass(frozen=True)
class ListedPrior:
    """
    Probabilities of some classes of each row, as a rule its largest, in rows of entries.

    What a row's entries leave of its mass, but at least 1e-6, is spread evenly over the classes
    it does not list: with a probability of 0 they could never be assigned, whatever the images
    say. An entry of 0 counts as not listed.

    Parameters
    ----------
    offsets : array_like (N + 1,) int
        Bounds of each row's entries.
    classes, values : array_like (E,) int, (E,) float
    n_classes : int, optional
        K, where that is known.
    """

    offsets: Any
    classes: Any
    values: Any
    n_classes: int | None = None

    def dense(self, name: str, *, rows: int, n_classes: int | None = None) -> torch.Tensor:
        """
        All probabilities (N, K) float32; `n_classes` where the entries themselves do not know.

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
        heavy = (mass > 1 + PROBABILITY_TOLERANCE).nonzero()[:, 0]
        if len(heavy):
            row = int(heavy[0])
            raise InputError(
                f"{name}: row {row} sums to {mass[row]:.4g}, more than 1; scores go in prior_logits"
            )
        left_out = k - torch.bincount(row_of, minlength=rows)
        rest = torch.where(left_out > 0, (1 - mass).clamp_min(UNLISTED_MASS), 0.0)
        scale = torch.where(mass > 0, ((1 - rest) / mass).clamp_max(1), 1.0)
        whole = (rest / left_out.clamp_min(1)).float()[:, None].repeat(1, k)
        whole[row_of, class_of] = (values * scale[row_of]).float()
        return whole

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
            if wrong.any():
                entry = int(wrong.nonzero()[0, 0])
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


def _not_finite(matrix: torch.Tensor | StoredRows, row: int, name: str) -> InputError:
    values = torch.as_tensor(matrix[row : row + 1])
    if values.isfinite().all():
        return InputError(f"{name}: row {row} is too large for float32; rescale that row")
    kind = "NaN" if values.isnan().any() else "an infinite value"
    return InputError(f"{name}: row {row} contains {kind}; remove or recompute that row")


def check_rows(matrix: Any, name: str, rows: int) -> None:
    """Raise InputError unless there is one row per query."""
    if len(matrix) != rows:
        raise InputError(f"{name}: has {len(matrix)} rows, expected {rows}, one per query")


def _norms(block: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Norm of each row (n,) float64."""
    block = torch.as_tensor(block).to(torch.float32)
    norms: torch.Tensor = torch.linalg.vector_norm(block, dim=1)
    if ((norms - 1).abs() > UNIT_NORM_TOLERANCE / 2).any() or not norms.isfinite().all():
        # Squares can overflow or vanish in float32 while the row itself is fine.
        norms = torch.linalg.vector_norm(block, dim=1, dtype=torch.float64)
    return norms.double()


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


def as_labelled_rows(
    name: str, rows: Any, labels: Any, dim: int, n_classes: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """
    Unit rows (M, d) and their labels (M,) int64, on the CPU; None where neither is given.

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
