"""ImageNet's synsets: their names, and the classes of a list that they are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from transclip_fast.data.names import plain_name, positions_by_name

SYNSET = re.compile(r"n\d{8}")
# A list of 1000 names has ImageNet's order if so many have a known name, almost all in place.
KNOWN_SHARE, IN_PLACE_SHARE = 0.5, 0.98


@lru_cache
def imagenet_synsets() -> tuple[str, ...]:
    """The synsets of ImageNet's 1000 classes, in their order."""
    return tuple(_described("imagenet-1k"))


@lru_cache
def synset_names() -> dict[str, list[str]]:
    """The names of ImageNet's synsets, plain: open_clip's, then WordNet's, whole and one by one."""
    from open_clip import IMAGENET_CLASSNAMES

    described = _described("imagenet-22k") | _described("imagenet-1k")
    names = {synset: [text, *text.split(",")] for synset, text in described.items()}
    for synset, name in zip(imagenet_synsets(), IMAGENET_CLASSNAMES, strict=True):
        names[synset].insert(0, name)
    return {synset: [plain_name(name) for name in known] for synset, known in names.items()}


def _described(subset: str) -> dict[str, str]:
    """WordNet's names of the synsets of a subset of ImageNet, in its order."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo(subset)
    names = info.label_descriptions()
    return dict(zip(info.label_names(), names, strict=True))  # type: ignore[no-untyped-call]


def synset_positions(synsets: Iterable[str], names: Sequence[str]) -> dict[str, int | None]:
    """
    The class of each synset, by its names; None if it has none, or not for sure.

    Where 1000 names are ImageNet's in their order, as far as they are known, a synset whose name is
    not known has its place.
    """
    positions, found = positions_by_name(names), {}
    for synset in synsets:
        found[synset] = _class_of(synset, positions)
    order = imagenet_synsets()
    if None in found.values() and len(names) == len(order):
        all_classes = {synset: _class_of(synset, positions) for synset in order}
        if _in_order(all_classes):
            taken = {*all_classes.values()}
            found |= {s: k for k, s in enumerate(order) if s in found and k not in taken}
    claims = Counter(found.values())
    return {synset: k if claims[k] == 1 else None for synset, k in found.items()}


def _class_of(synset: str, positions: Mapping[str, int | None]) -> int | None:
    """The class that has the first of a synset's names that is in the list."""
    known = synset_names().get(synset, [])
    return next((positions[name] for name in known if name in positions), None)


def _in_order(classes: Mapping[str, int | None]) -> bool:
    """Whether the known ones of ImageNet's classes, by synset in their order, are in place."""
    known = [k == place for place, k in enumerate(classes.values()) if k is not None]
    return len(known) >= KNOWN_SHARE * len(classes) and sum(known) >= IN_PLACE_SHARE * len(known)
