"""Checks of a user's arrays; each failure is one line that names the row."""

from __future__ import annotations

import warnings
from numbers import Integral
from typing import Any

import numpy as np
import torch

from transclip_fast.data.npy_shards import StoredRows
from transclip_fast.errors import InputError, one_line, user_level

# fp16 rows are off by up to 6e-4; renormalising those would move z by up to 3e-2.
UNIT_NORM_TOLERANCE = 2e-3
SMALLEST_NORM = 1e-36  # below, float32 has few digits of a row's entries, or none
ROWS_PER_CHECK = 4096
ALIGNMENT = 64  # bytes


# What follows where labels are no numbers.
POSITIONS = "give labels as positions in the list of classes, whole numbers from 0"


def check_number(name: str, value: object, minimum: int) -> None:
    """Raise InputError unless a parameter is a whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise InputError(f"{name} must be a whole number >= {minimum}, got {value!r}")


def as_matrix(array: Any, name: str, *, columns: int | None = None) -> torch.Tensor:
    """
    A finite two-dimensional tensor from a numpy array, a torch tensor or nested lists, in its type.

    Raises
    ------
    InputError
        Not two-dimensional, no rows, wrong number of columns, not numeric, NaN or infinite;
        with the `name` of the array.
    """
    matrix = _in_memory(unread_matrix(array, name, columns))
    for start in range(0, len(matrix), ROWS_PER_CHECK):
        block = matrix[start : start + ROWS_PER_CHECK]
        if torch.isfinite(block.float().sum()):  # a single NaN or infinity makes the sum one
            continue
        row = first_row(~torch.isfinite(block).all(1))
        if row is not None:
            raise _not_finite(matrix, start + row, name)
    return matrix


def unread_matrix(array: Any, name: str, columns: int | None = None) -> torch.Tensor | StoredRows:
    """A matrix as of `as_matrix` whose entries are not checked; rows in files stay there."""
    matrix = array if isinstance(array, StoredRows) else as_tensor(array, name)
    if len(matrix.shape) != 2 or 0 in matrix.shape:
        remedy = "; one row is array.reshape(1, -1)" if len(matrix.shape) == 1 else ""
        raise InputError(
            f"{name}: expected a non-empty (rows, columns) array, got shape "
            f"{tuple(matrix.shape)}{remedy}"
        )
    if columns is not None and matrix.shape[1] != columns:
        raise InputError(
            f"{name}: has {matrix.shape[1]} columns, expected {columns}; encode both with one model"
        )
    return matrix


def as_unit_rows(
    array: Any, name: str, *, columns: int | None = None, first: int = 0
) -> torch.Tensor:
    """
    A float32 matrix whose rows have unit norm; `array` itself is never modified.

    Rows whose norm is within 2e-3 of 1 are used as they are, rows further off are divided by
    their norm in float64, with one warning. Messages call the first row `first`.

    Raises
    ------
    InputError
        As `as_matrix`, and for a row that is all zero, or too large or too small for float32.
    """
    matrix = _in_memory(unread_matrix(array, name, columns))
    divisors = unit_divisors(matrix, name, first)
    matrix = _aligned(matrix.to(torch.float32))
    if divisors is not None:
        matrix = matrix.clone()
        for off in torch.split((divisors != 1).nonzero()[:, 0], ROWS_PER_CHECK):
            matrix[off] = _divided(matrix[off], divisors[off])
    return matrix


def unit_divisors(
    matrix: torch.Tensor | StoredRows, name: str, first: int = 0
) -> torch.Tensor | None:
    """
    The divisors (N,) float64 that make unit rows of (N, d): norms further than 2e-3 from 1, else 1.

    None if all are 1, otherwise with one warning. Messages call the first row `first`.

    Raises
    ------
    InputError
        A row that is all zero, not finite, or too large or too small for float32.
    """
    norms = torch.empty(len(matrix), dtype=torch.float64)
    for start in range(0, len(matrix), ROWS_PER_CHECK):
        block = slice(start, start + ROWS_PER_CHECK)
        norms[block] = _norms(matrix[block])
    if (row := first_row(~norms.isfinite())) is not None:
        raise _not_finite(matrix, row, name, first)
    if (row := first_row(norms < SMALLEST_NORM)) is not None:
        if torch.as_tensor(matrix[row : row + 1]).any():
            raise InputError(
                f"{name}: row {first + row} is too small for float32; rescale that row"
            )
        raise InputError(f"{name}: row {first + row} is all zero; remove or recompute that row")
    far = (norms - 1).abs() > UNIT_NORM_TOLERANCE
    if (row := first_row(far)) is None:
        return None
    warnings.warn(
        f"{name}: {int(far.sum())} of {len(matrix)} rows were not unit vectors and were "
        f"normalised (row {first + row} has norm {norms[row]:.4g})",
        stacklevel=user_level(),
    )
    return norms.where(far, 1.0)


def unit_sample(matrix: torch.Tensor | StoredRows, ids: torch.Tensor) -> torch.Tensor:
    """
    Some rows of an `unread_matrix` as unit rows, with the bits of `Rows(matrix)[ids]`.

    Checks and warnings come later, when all rows are read. The result
    (n, d) float32 is where the matrix is; rows in files come to the CPU.
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


def as_labels(
    array: Any, name: str, *, rows: int, n_classes: int | None, lowest: int = 0
) -> torch.Tensor:
    """
    Class indices (rows,) as int64, from numbers (rows,) or (rows, 1), or one-hot (rows, classes).

    `lowest` -1 allows rows of unknown class, which have -1 or NaN. Where the number of classes is
    None, those who know it check the labels again.

    Raises
    ------
    InputError
        Wrong length, a mask, one-hot of another number of classes, not whole numbers, or outside
        lowest .. n_classes - 1.
    """
    tensor = as_tensor(array, name, POSITIONS)
    if tensor.ndim == 2 and len(tensor) == rows:
        width = tensor.shape[1]
        tensor = tensor[:, 0] if width == 1 else hot_columns(tensor, name)
        if width > 1 and n_classes not in (None, width):
            raise InputError(
                f"{name}: is one-hot of {width} classes, there are {n_classes}; give positions in "
                "the list of classes"
            )
    if tensor.shape != (rows,):
        raise InputError(
            f"{name}: expected {rows} labels, one a row, got shape {tuple(tensor.shape)}"
        )
    if tensor.dtype == torch.bool:
        raise a_mask(name)
    if tensor.is_floating_point() and lowest < 0:
        tensor = tensor.where(~tensor.isnan(), lowest)
    labels = tensor.to(torch.int64)
    if tensor.is_floating_point() and (row := first_row(labels != tensor)) is not None:
        raise InputError(
            f"{name}: row {row} has label {tensor[row]:.4g}; labels are whole numbers, positions "
            "in the list of classes"
        )
    last = torch.iinfo(torch.int64).max if n_classes is None else n_classes - 1
    if (row := first_row((labels < lowest) | (labels > last))) is not None:
        raise InputError(
            f"{name}: row {row} has label {int(labels[row])}, outside {lowest} .. {last}; "
            "labels are positions in the list of classes"
            + (", -1 where unknown" if lowest == -1 else "")
        )
    return labels


def a_mask(name: str) -> InputError:
    """The error of labels that are true and false."""
    return InputError(
        f"{name}: is a mask of true and false, no labels; give positions in the list of classes"
    )


def hot_columns(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The column of the 1 in each one-hot row."""
    wrong = ((tensor == 1).sum(1) != 1) | ((tensor != 0).sum(1) != 1)
    if (row := first_row(wrong)) is not None:
        raise InputError(f"{name}: row {row} is not one-hot; give class indices (rows,)")
    return (tensor == 1).int().argmax(1)


def as_row_weights(array: Any, name: str, rows: int) -> np.ndarray | None:
    """Weights (rows,) float64, finite and >= 0 but not all 0; None if there are none."""
    if array is None:
        return None
    weights = as_tensor(array, name).double().cpu().numpy()
    if weights.shape != (rows,):
        raise InputError(f"{name}: expected {rows} weights, one a row, got shape {weights.shape}")
    if not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
        raise InputError(f"{name}: weights are finite numbers >= 0, and not all of them 0")
    return weights


def check_rows(matrix: Any, name: str, rows: int) -> None:
    """Raise InputError unless there is one row per query."""
    if len(matrix) != rows:
        raise InputError(f"{name}: has {len(matrix)} rows, expected {rows}, one per query")


def check_unmasked(array: Any, name: str) -> None:
    """Refuse masked values, which would count as the numbers below their mask."""
    parts = array if isinstance(array, list | tuple) else [array]
    if masked := sum(np.ma.getmaskarray(x).sum() for x in parts if np.ma.is_masked(x)):
        raise InputError(
            f"{name}: has masked values ({masked:,}); leave out their rows, or fill them"
        )


def as_tensor(array: Any, name: str, remedy: str = "") -> torch.Tensor:
    """A tensor of numbers, without a copy if there is none to make; `remedy` where they are not."""
    if isinstance(array, torch.Tensor):
        return _dense(array.detach(), name)
    values = as_array(array, name, remedy)
    with warnings.catch_warnings():  # of a read-only array; nothing here writes to it
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        return torch.from_numpy(values)


def as_array(array: Any, name: str, remedy: str = "") -> np.ndarray:
    """As `as_tensor`, but a numpy array of a type and of strides that torch takes."""
    if isinstance(array, torch.Tensor):
        tensor = _dense(array.detach(), name).cpu()
        found: np.ndarray = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        return found
    check_unmasked(array, name)
    try:
        values = np.asarray(array)
    except ValueError as error:
        raise InputError(f"{name}: expected an array, got rows of different lengths") from error
    except (TypeError, RuntimeError) as error:  # of tensors that numpy cannot read
        raise InputError(f"{name}: expected an array ({one_line(error)})") from error
    if values.dtype.kind not in "fiub":
        kind = f"{name}: expected numbers, got an array of {values.dtype}"
        raise InputError(f"{kind}; {remedy}" if remedy else kind)
    odd = any(stride < 0 or stride % values.itemsize for stride in values.strides)
    if values.dtype.byteorder == ">" or odd:
        values = np.ascontiguousarray(values.astype(values.dtype.newbyteorder("=")))
    if values.dtype.kind == "f" and values.dtype.itemsize > 8:
        values = values.astype(np.float64)
    if values.dtype.kind == "u" and values.dtype.itemsize > 1:  # torch computes little in these
        if values.size and values.max() > np.iinfo(np.int64).max:
            raise InputError(f"{name}: holds whole numbers beyond int64")
        values = values.astype(np.int64)
    return values


def _dense(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The tensor, if its entries are real numbers that can be read one by one."""
    if tensor.layout != torch.strided:
        raise InputError(f"{name}: is a sparse tensor; give a dense one, as of to_dense()")
    if tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else "meta"
        raise InputError(f"{name}: is a {kind} tensor; give one with an entry for each number")
    if tensor.is_complex():
        raise InputError(f"{name}: expected real numbers, got {tensor.dtype}")
    return tensor


def first_row(wrong: torch.Tensor) -> int | None:
    """The first True of (n,) bool, or None."""
    return int(wrong.nonzero()[0, 0]) if wrong.any() else None


def is_aligned(matrix: torch.Tensor) -> bool:
    """Whether float32 rows can be used where they are."""
    # The order of a BLAS library's sums depends on the alignment of its operands.
    return (
        matrix.dtype == torch.float32
        and matrix.is_contiguous()
        and matrix.data_ptr() % ALIGNMENT == 0
    )


def _aligned(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if is_aligned(matrix) else matrix.clone(memory_format=torch.contiguous_format)


def _in_memory(matrix: torch.Tensor | StoredRows) -> torch.Tensor:
    return torch.from_numpy(np.asarray(matrix)) if isinstance(matrix, StoredRows) else matrix


def _not_finite(
    matrix: torch.Tensor | StoredRows, row: int, name: str, first: int = 0
) -> InputError:
    values = torch.as_tensor(matrix[row : row + 1])
    row += first
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


def n_dimensions(array: Any) -> int:
    """Number of dimensions of an array, a tensor on any device, nested lists or None."""
    try:
        return int(array.ndim if hasattr(array, "ndim") else np.asarray(array).ndim)
    except ValueError:  # lists of different lengths, which the check of text features refuses
        return 2
