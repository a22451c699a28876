"""Head files: a fitted head as .safetensors, with everything needed to use it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from transclip_fast.data.checks import UNIT_NORM_TOLERANCE
from transclip_fast.errors import InputError, reading
from transclip_fast.heads.base import Head, PrototypeHead
from transclip_fast.heads.clip_adapter import AdapterHead, BothAdaptersHead, TextAdapterHead
from transclip_fast.heads.clip_adapter_blend import BlendedHead
from transclip_fast.heads.prompts.cocoop import ConditionalHead
from transclip_fast.heads.prompts.coop import PromptHead
from transclip_fast.heads.prompts.plot import TransportHead
from transclip_fast.heads.tip_adapter import CacheHead
from transclip_fast.heads.unmix_clip import ProjectedHead
from transclip_fast.store.json_text import parse_json, value_of
from transclip_fast.store.tensors import check_writable, read_tensors, write_tensors

ENTRY = "transclip_fast.head"  # key of the JSON in the file's metadata
ENTRY_TYPES: dict[str, Any] = {
    "kind": str,
    "name": str,
    "class_names": (list, type(None)),
    "encoder": (dict, type(None)),
    "training": dict,
    "logit_scale": float,
    "parameters": dict,
    "settings": dict,
}
KINDS: dict[str, type[Head]] = {
    head.kind: head
    for head in (
        PrototypeHead,
        CacheHead,
        AdapterHead,
        TextAdapterHead,
        BothAdaptersHead,
        BlendedHead,
        ProjectedHead,
        PromptHead,
        ConditionalHead,
        TransportHead,
    )
}


@dataclass(frozen=True)
class StoredHead:
    """The content of a head file."""

    head: Head
    name: str  # of the method
    class_names: list[str] | None
    encoder: dict[str, Any] | None  # model and weights of the features that the head reads
    training: dict[str, Any] = field(default_factory=dict)  # shots, seed and version


def save_head(path: str | Path, stored: StoredHead) -> None:
    """
    Write a head file, which appears whole or not at all.

    Raises
    ------
    InputError
        As of `check_head_file`, or if the file cannot be written.
    """
    check_head_file(path)
    head = stored.head
    entry = {
        "kind": head.kind,
        "name": stored.name,
        "class_names": stored.class_names,
        "encoder": stored.encoder,
        "training": stored.training,
        "logit_scale": head.logit_scale,
        "parameters": head.parameters,
        "settings": {name: getattr(head, name) for name in head.stored_settings},
    }
    tensors = {name: attrgetter(name)(head) for name in head.stored_tensors}
    write_tensors(path, tensors, None, metadata={ENTRY: json.dumps(entry, ensure_ascii=False)})


def check_head_file(path: str | Path) -> None:
    """Raise InputError if a head cannot have this name, or would replace another file."""
    check_writable(path, "head", read_head)


def read_head(path: str | Path) -> StoredHead:
    """
    The head in a file, checked.

    Raises
    ------
    InputError
        The file is missing, truncated or damaged, is not a head, or lacks or contradicts something.
    """
    tensors, metadata = read_tensors(path)
    if ENTRY not in metadata:
        raise InputError(f"{path}: is no head; `transclip-fast train-head` writes those")
    with reading(path, "damaged"):
        entry = parse_json(metadata[ENTRY])
    try:
        return _stored_head(tensors, entry if isinstance(entry, dict) else {})
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _stored_head(tensors: Mapping[str, torch.Tensor], entry: Mapping[str, Any]) -> StoredHead:
    _check_values("metadata", entry, ENTRY_TYPES)
    scale, parameters, settings = entry["logit_scale"], entry["parameters"], entry["settings"]
    if scale <= 0:
        raise InputError(f"damaged: logit_scale is {scale!r}")
    if entry["kind"] not in KINDS:
        raise InputError(f"holds a head of kind {entry['kind']!r}; known are {', '.join(KINDS)}")
    kind = KINDS[entry["kind"]]
    _check_values("parameters", parameters, dict.fromkeys(parameters, float))
    _check_values("settings", settings, kind.stored_settings)
    _check_tensors(tensors, kind.stored_tensors)
    head = kind.from_stored(**tensors, **settings, logit_scale=scale, parameters=parameters)
    names, n_classes = entry["class_names"], len(head.text)
    if names is not None and [type(name) for name in names] != [str] * n_classes:
        raise InputError(f"damaged: class_names are not {n_classes} strings")
    return StoredHead(head, entry["name"], names, entry["encoder"], entry["training"])


def _check_names(what: str, found: Iterable[str], wanted: Iterable[str]) -> None:
    """Raise InputError unless both have the same names."""
    missing, extra = sorted({*wanted} - {*found}), sorted({*found} - {*wanted})
    wrong = [f"lacks {', '.join(missing)}"] * bool(missing)
    wrong += [f"also has {', '.join(extra)}"] * bool(extra)
    if wrong:
        raise InputError(f"is no head of this version: its {what} {' and '.join(wrong)}")


def _check_values(what: str, found: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    """Raise InputError unless JSON values have these names and types."""
    _check_names(what, found, types)
    for name, kind in types.items():
        value_of(found, name, kind, what)


def _check_tensors(tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, str]) -> None:
    """Raise InputError unless tensors are as `Head.stored_tensors`; labels are of K classes."""
    _check_names("tensors", tensors, wanted)
    sizes: dict[str, int] = {}
    for name, shapes in wanted.items():
        tensor, is_labels = tensors[name], name.endswith("labels")
        shape = next((shape for shape in shapes.split() if len(shape) == tensor.ndim), None)
        own = dict(zip(shape or "", tensor.shape, strict=False))
        if shape is None or any(sizes.get(letter, size) != size for letter, size in own.items()):
            expected = " or ".join(f"({', '.join(shape)})" for shape in shapes.split())
            known = ", ".join(f"{letter} = {size}" for letter, size in sizes.items())
            raise InputError(
                f"damaged: {name} has shape {tuple(tensor.shape)}, expected {expected}"
                + (f" with {known}" if known else "")
            )
        sizes |= own
        if tensor.dtype != (torch.int64 if is_labels else torch.float32):
            raise InputError(f"damaged: {name} holds {tensor.dtype}")
        if is_labels and ((tensor < 0) | (tensor >= sizes["K"])).any():
            raise InputError(f"damaged: {name} has classes beyond the {sizes['K']}")
        if not tensor.isfinite().all():
            raise InputError(f"damaged: {name} has values that are no numbers")
    norms = tensors["text"].norm(dim=1)
    if not len(norms) or float((norms - 1).abs().max()) > UNIT_NORM_TOLERANCE:
        raise InputError("damaged: text holds no unit rows")
