"""Head files: a fitted head as .safetensors, with everything needed to use it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transclip_fast.errors import InputError
from transclip_fast.heads.base import Head, PrototypeHead
from transclip_fast.heads.clip_adapter import AdapterHead
from transclip_fast.heads.prompts.cocoop import ConditionalHead
from transclip_fast.heads.prompts.coop import PromptHead
from transclip_fast.heads.prompts.plot import TransportHead
from transclip_fast.heads.state import StoredState, check_names, check_type, damaged, strings
from transclip_fast.heads.tip_adapter import CacheHead
from transclip_fast.store.tensors import read_tensors, write_tensors

SUFFIX = ".safetensors"
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
    for head in (PrototypeHead, CacheHead, AdapterHead, PromptHead, ConditionalHead, TransportHead)
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
        The file cannot be written, or exists and is not a head.
    """
    check_writable(path)
    tensors, settings = stored.head.state()
    entry = {
        "kind": stored.head.kind,
        "name": stored.name,
        "class_names": stored.class_names,
        "encoder": stored.encoder,
        "training": stored.training,
        "logit_scale": stored.head.logit_scale,
        "parameters": stored.head.parameters,
        "settings": settings,
    }
    write_tensors(path, tensors, None, metadata={ENTRY: json.dumps(entry, ensure_ascii=False)})


def check_writable(path: str | Path) -> None:
    """Raise InputError where a file that is not a head would be replaced."""
    if os.path.lexists(path):
        try:
            read_head(path)
        except InputError as error:
            raise InputError(f"{path}: is there and is no head; name another file") from error


def read_head(path: str | Path) -> StoredHead:
    """
    The head in a file, checked.

    Raises
    ------
    InputError
        The file is missing, truncated or damaged, is not a head, or lacks or contradicts something.
    """
    tensors, metadata = read_tensors(path)
    entry = _entry(path, metadata)
    scale, parameters = entry["logit_scale"], entry["parameters"]
    if scale <= 0:
        raise damaged(path, f"logit_scale is {scale!r}")
    for name, value in parameters.items():
        check_type(path, name, value, float)
    state = StoredState(path, tensors, entry["settings"], scale, parameters)
    head = KINDS[entry["kind"]].from_state(state)
    state.check_nothing_left()
    names, n_classes = entry["class_names"], len(head.text)
    if names is not None and not (strings(names) and len(names) == n_classes):
        raise damaged(path, f"class_names are not {n_classes} strings")
    return StoredHead(head, entry["name"], names, entry["encoder"], entry["training"])


def _entry(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The JSON in the file's metadata, with every entry of its type."""
    if ENTRY not in metadata:
        raise InputError(f"{path}: is no head; `transclip-fast train-head` writes those")
    try:
        entry = json.loads(metadata[ENTRY])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({error}); write or copy it again") from error
    found: dict[str, Any] = entry if isinstance(entry, dict) else {}
    check_names(path, found, ENTRY_TYPES, "metadata")
    for name, kind in ENTRY_TYPES.items():
        check_type(path, name, found[name], kind)
    if found["kind"] not in KINDS:
        known = ", ".join(KINDS)
        raise InputError(f"{path}: holds a head of kind {found['kind']!r}; known are {known}")
    return found
