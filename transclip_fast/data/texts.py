"""Text features of one or several templates."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from transclip_fast.data.checks import as_unit_rows, n_dimensions, unread_matrix
from transclip_fast.data.names import more, repeats
from transclip_fast.errors import InputError, user_level

MEAN_CLASSES = 1024  # at a time: of all classes two more copies of every template would be there
COMPARED_TEXTS = 1024  # at most; each is compared with all of the other order
MOVED = 0.5  # more of a cosine, of texts less their mean, than training or templates change


def ensemble(
    text_features: Any, columns: int | None = None, n_classes: int | None = None
) -> torch.Tensor:
    """
    Prototypes (K, d), unit rows float32, from the texts of one or several templates.

    Parameters
    ----------
    text_features : array_like (K, d), (P, K, d), or a sequence of P arrays (K, d)
        An array may be (K, P, d) where K is known; where it is not, more templates than classes
        warn.
    columns : int, optional
        d.
    n_classes : int, optional
        K, as far as something beside the texts has it.

    Raises
    ------
    InputError
        Another shape, templates of different shapes, an array that has its known number of classes
        on both axes, and as `as_unit_rows`.
    """
    templates = prompt_texts(text_features, n_classes)
    if not templates:
        raise InputError("text_features: holds no template")
    rows = [as_unit_rows(template, "text_features", columns=columns) for template in templates]
    if len({row.shape for row in rows}) != 1:
        shapes = ", ".join(str(tuple(row.shape)) for row in rows[:3])
        raise InputError(f"text_features: templates have different shapes ({shapes}, ...)")
    if len(rows) == 1:
        return rows[0]
    blocks = zip(*(torch.split(row, MEAN_CLASSES) for row in rows), strict=True)
    means = [torch.stack([normalize(row, dim=-1) for row in some]).mean(0) for some in blocks]
    return as_unit_rows(normalize(torch.cat(means), dim=-1), "text_features")


def warn_of_equal_rows(prototypes: torch.Tensor, name: str) -> None:
    """Warn of classes with equal rows (K, d), between which rounding would choose."""
    found = repeats(row.tobytes() for row in prototypes.cpu().numpy())
    if found:
        first, k = found[0]
        warnings.warn(
            f"{name}: class {k} has the row of class {first}{more(found)}; such classes cannot be "
            "told apart: give each a row of its own, or leave it out",
            stacklevel=user_level(),
        )


def prompt_texts(text_features: Any, n_classes: int | None = None) -> list[Any]:
    """The P arrays (K, d) of `text_features`, see `ensemble`; one array if it is (K, d)."""
    if isinstance(text_features, Iterable) and not hasattr(text_features, "ndim"):
        text_features = parts = list(text_features)
        if parts and getattr(parts[0], "ndim", 0) == 2:
            return parts
    if n_dimensions(text_features) != 3:
        return [text_features]
    if not isinstance(text_features, torch.Tensor):
        text_features = np.asarray(text_features)
    return list(templates_first(text_features, n_classes))


def texts_of_fit(text_features: Any, y: Any, X: Any, instead: str | None) -> Any:
    """
    The texts of a fit of the rows X (N, d): `y`, if it is an array (K, d) and there are no others.

    Any other `y` holds labels of the rows, for scores alone; it warns if some are unknown, since
    then the others are meant to be learned from, unless they are given: `instead` is how.

    Raises
    ------
    InputError
        A `y` that is neither, or an X that is no matrix.
    """
    if y is None:
        return text_features
    n_rows, dim = unread_matrix(X, "X").shape
    try:
        values = y if isinstance(y, torch.Tensor) else np.asarray(y)
    except ValueError as error:
        raise InputError("y: expected labels or texts, got rows of different lengths") from error
    shape = tuple(values.shape)
    if text_features is None and len(shape) == 2 and shape[1] == dim:
        return y
    if len(shape) not in (1, 2) or shape[0] != n_rows:
        raise InputError(
            f"y: expected {n_rows} labels, one a row, or texts (classes, {dim}), got shape "
            f"{shape}; give texts as text_features"
        )
    unknown = int(((values == -1) | (values != values)).sum())  # NaN differs from itself
    if unknown and instead:
        warnings.warn(
            f"y: {unknown} labels are -1 or NaN, but y is for scores alone and labels "
            f"nothing; to learn from the others give {instead}",
            stacklevel=user_level(),
        )
    return text_features


def templates_first(text_features: Any, n_classes: int | None) -> Any:
    """
    Texts (P, K, d), also if they are (K, P, d), as far as the known number K of classes tells it.

    Raises
    ------
    InputError
        As many templates as classes, so that it does not.
    """
    if text_features.ndim != 3:
        return text_features
    if n_classes is None:
        n_templates, n_texts = text_features.shape[:2]
        if n_templates > n_texts:
            warnings.warn(
                f"text_features: shape {tuple(text_features.shape)} is taken as {n_templates} "
                f"templates of {n_texts} classes; if it is the other way, swap the first two axes",
                stacklevel=user_level(),
            )
        return text_features
    fits = [size == n_classes for size in text_features.shape[:2]]
    if all(fits) and n_classes > 1:
        raise InputError(
            f"text_features: shape {tuple(text_features.shape)} can be (templates, classes, d) and "
            "(classes, templates, d); give the mean over the templates, (classes, d)"
        )
    return text_features.swapaxes(0, 1) if fits == [True, False] else text_features


def moved_text(texts: torch.Tensor, others: torch.Tensor) -> tuple[int, int] | None:
    """
    A class k, and the class j whose text it has in the other order; None if no class moved.

    `texts` and `others` are (K, d), of one model; templates and training may differ a little. Of
    many classes some are compared.
    """
    ours, theirs = (
        normalize(rows.float() - rows.float().mean(0), dim=1) for rows in (texts, others)
    )
    own = (ours * theirs).sum(1)
    ids = (own < 1 - MOVED).nonzero()[:, 0]
    ids = ids[:: len(ids) // COMPARED_TEXTS + 1]
    if not len(ids):
        return None
    best, places = (ours[ids] @ theirs.T).max(1)
    moved = (best > own[ids] + MOVED).nonzero()[:, 0]
    return (int(ids[moved[0]]), int(places[moved[0]])) if len(moved) else None
