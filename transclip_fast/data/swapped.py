"""Image and text features in each other's place: lengths of other arrays can prove it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

from transclip_fast.errors import InputError, user_level

OF_IMAGES, OF_TEXTS = re.compile("image|img", re.I), re.compile("text|class", re.I)


def check_not_swapped(
    n_rows: int,
    n_texts: int,
    of_rows: Mapping[str, int],
    of_classes: Mapping[str, int],
    origin: str,
) -> None:
    """
    Refuse features (n_rows, d) and texts (n_texts, d) if other arrays prove them to be swapped.

    Those arrays have one entry a row or one a class; `of_rows` and `of_classes` are their lengths
    by name. Some fit the other way round, and none fits as it is.
    """
    fit = [*map(n_rows.__eq__, of_rows.values()), *map(n_texts.__eq__, of_classes.values())]
    swapped = [name for name, n in of_rows.items() if n == n_texts]
    swapped += [name for name, n in of_classes.items() if n == n_rows]
    if swapped and not any(fit):
        raise InputError(
            f"{origin}: image and text features look swapped: there are {n_rows:,} and "
            f"{n_texts:,}, and {' and '.join(swapped)} for {n_texts:,} and {n_rows:,}; exchange "
            "them"
        )


def warn_of_names(images: Path, texts: Path, n_rows: int, n_texts: int) -> None:
    """Warn if images are fewer than texts, and each file is named as if it were the other."""

    def kinds(file: Path) -> tuple[bool, bool]:
        return bool(OF_IMAGES.search(file.stem)), bool(OF_TEXTS.search(file.stem))

    if n_rows < n_texts and kinds(images) == (False, True) and kinds(texts) == (True, False):
        warnings.warn(
            f"{images}: is taken for {n_rows:,} images, and {texts} for {n_texts:,} texts; if it "
            "is the other way, exchange the files",
            stacklevel=user_level(),
        )
