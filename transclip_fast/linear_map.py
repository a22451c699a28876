"""Linear maps trained beside a frozen encoder, on its embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from transclip_fast.errors import InputError
from transclip_fast.inputs import as_matrix

BLOCK_ROWS = 8192


def linear_map(
    rows: Any, weight: Any, bias: Any = None, *, names: tuple[str, str] = ("rows", "weight")
) -> torch.Tensor:
    """
    unit(A x + b) of each row x, as LABCLIP maps text embeddings (arXiv:2502.03566).

    Parameters
    ----------
    rows : array_like (n, d)
        Embeddings; unit rows or not, they are mapped as they are.
    weight : array_like (e, d)
        A, as in `torch.nn.Linear`.
    bias : array_like (e,), optional
        b.
    names : tuple of str
        What rows and weight are called in errors.

    Returns
    -------
    Tensor (n, e) float32

    Raises
    ------
    InputError
        Arrays that do not fit each other, that are not finite, or a row that is mapped to zero.
    """
    matrix = as_matrix(rows, names[0])
    a = as_matrix(weight, names[1])
    if a.shape[1] != matrix.shape[1]:
        raise InputError(
            f"{names[1]}: has {a.shape[1]} columns, expected {matrix.shape[1]}, those of "
            f"{names[0]}; was it trained on another model?"
        )
    b = torch.zeros(1, len(a))
    if bias is not None:
        row = bias[None] if isinstance(bias, torch.Tensor) else np.asarray(bias)[None]
        b = as_matrix(row, f"{names[1]}: bias", columns=len(a))
    mapped = torch.empty(len(matrix), len(a))
    for start in range(0, len(matrix), BLOCK_ROWS):
        block = matrix[start : start + BLOCK_ROWS].double() @ a.double().T + b.double()
        norms = torch.linalg.vector_norm(block, dim=1, keepdim=True)
        wrong = ~((norms > 0) & norms.isfinite())
        if wrong.any():
            first = start + int(wrong.nonzero()[0, 0])
            raise InputError(f"{names[1]}: maps row {first} of {names[0]} to no direction")
        mapped[start : start + BLOCK_ROWS] = (block / norms).float()
    return mapped
