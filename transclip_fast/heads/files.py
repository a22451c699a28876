"""Head files: a fitted head as .safetensors, with what it takes to use it elsewhere."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from transclip_fast.errors import InputError
from transclip_fast.heads.clip_adapter import AdapterHead
from transclip_fast.heads.prompts.cocoop import ConditionalHead
from transclip_fast.heads.prompts.coop import PromptHead
from transclip_fast.heads.prompts.plot import TransportHead
from transclip_fast.heads.task import Head, Labelled, PrototypeHead
from transclip_fast.heads.tip_adapter import CacheHead
from transclip_fast.store.tensors import read_tensors, write_tensors

ENTRY = "transclip_fast.head"  # of the file's metadata, in JSON
UNIT = 2e-3  # a prototype's norm is so near to 1


@dataclass(frozen=True)
class Kind:
    """
    What a file holds of one class of heads.

    Parameters
    ----------
    head : type
    tensors : dict
        Shapes it may have, by the name of the field: letters are sizes, the same everywhere. A dot
        leads into `Labelled`. A tensor "M" holds classes.
    settings : dict
        Type of every other field.
    """

    head: type[Head]
    tensors: Mapping[str, tuple[str, ...]]
    settings: Mapping[str, type] = field(default_factory=dict)


TEXT = {"text": ("Kd",)}
KINDS = {
    "prototypes": Kind(PrototypeHead, TEXT),
    "cache": Kind(
        CacheHead,
        TEXT | {"cache.features": ("Md",), "cache.labels": ("M",)},
        {"alpha": float, "beta": float},
    ),
    "adapter": Kind(AdapterHead, TEXT | {"down": ("wd",), "up": ("dw",)}, {"ratio": float}),
    "prompts": Kind(
        PromptHead, TEXT | {"context": ("nv", "Knv")}, {"position": str, "words": list}
    ),
    "conditional": Kind(
        ConditionalHead,
        TEXT
        | {"context": ("nv",), "down": ("wd",), "down_bias": ("w",)}
        | {"up": ("vw",), "up_bias": ("v",)},
        {"position": str, "words": list},
    ),
    "transport": Kind(
        TransportHead,
        TEXT | {"texts": ("KPd",), "contexts": ("Pnv",)},
        {"position": str, "words": list, "patches": int},
    ),
}


@dataclass(frozen=True)
class StoredHead:
    """
    A head as a file has it.

    Parameters
    ----------
    head : Head
    name : str
        Of the method.
    class_names : list of str, optional
    encoder : dict, optional
        Model and weights whose features it reads.
    training : dict
        How it was made, for the reader.
    """

    head: Head
    name: str
    class_names: list[str] | None
    encoder: dict[str, Any] | None
    training: dict[str, Any] = field(default_factory=dict)


def save_head(path: str | Path, stored: StoredHead) -> None:
    """
    Write a head; the file appears whole or not at all.

    Raises
    ------
    InputError
        The file cannot be written, or is there and is none of a head.
    """
    check_writable(path)
    name, kind = next((n, k) for n, k in KINDS.items() if k.head is type(stored.head))
    entry = {
        "kind": name,
        "name": stored.name,
        "class_names": stored.class_names,
        "encoder": stored.encoder,
        "training": stored.training,
        "logit_scale": stored.head.logit_scale,
        "parameters": stored.head.parameters,
        "settings": {setting: getattr(stored.head, setting) for setting in kind.settings},
    }
    tensors = {field: attrgetter(field)(stored.head) for field in kind.tensors}
    write_tensors(path, tensors, None, metadata={ENTRY: json.dumps(entry, ensure_ascii=False)})


def check_writable(path: str | Path) -> None:
    """Raise InputError where another file than a head would be replaced."""
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
        Missing, truncated or damaged, another file, or a head that lacks or contradicts something.
    """
    tensors, metadata = read_tensors(path)
    entry = _entry(path, metadata)
    kind = KINDS[entry["kind"]]
    _check_tensors(path, kind, tensors)
    settings = _checked(path, entry["settings"], kind.settings, "settings")
    names, n_classes = entry["class_names"], len(tensors["text"])
    if names is not None and not (_strings(names) and len(names) == n_classes):
        raise InputError(f"{path}: damaged: class_names are not {n_classes} strings")
    words = settings.get("words")
    context = tensors.get("context", tensors.get("contexts"))
    if context is not None and not (
        words and _strings(words) and len(words) == context.shape[:-1].numel()
    ):
        raise InputError(f"{path}: damaged: words are not one for each vector of the context")
    if not (_is(entry["logit_scale"], float) and entry["logit_scale"] > 0):
        raise InputError(f"{path}: damaged: logit_scale is {entry['logit_scale']!r}")
    parameters = entry["parameters"]
    _checked(path, parameters, dict.fromkeys(parameters, float), "parameters")
    fields: dict[str, Any] = {name: t for name, t in tensors.items() if "." not in name}
    for group in {name.partition(".")[0] for name in tensors if "." in name}:
        fields[group] = Labelled(tensors[f"{group}.features"], tensors[f"{group}.labels"])
    head = kind.head(**fields, **settings, logit_scale=entry["logit_scale"], parameters=parameters)
    return StoredHead(head, entry["name"], names, entry["encoder"], entry["training"])


def _entry(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the file says of its head: all entries there, each of its type."""
    if ENTRY not in metadata:
        raise InputError(f"{path}: is no head; `transclip-fast train-head` writes those")
    try:
        entry = json.loads(metadata[ENTRY])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({error}); write or copy it again") from error
    types: dict[str, Any] = {
        "kind": str,
        "name": str,
        "class_names": (list, type(None)),
        "encoder": (dict, type(None)),
        "training": dict,
        "logit_scale": float,
        "parameters": dict,
        "settings": dict,
    }
    found = _checked(path, entry if isinstance(entry, dict) else {}, types, "metadata")
    if found["kind"] not in KINDS:
        known = ", ".join(KINDS)
        raise InputError(f"{path}: holds a head of kind {found['kind']!r}; known are {known}")
    return found


def _check_tensors(path: str | Path, kind: Kind, tensors: Mapping[str, torch.Tensor]) -> None:
    """Names, types, shapes that fit each other, and values that a head can have."""
    _check_names(path, tensors, kind.tensors, "tensors")
    sizes: dict[str, int] = {}
    for name, shapes in kind.tensors.items():
        tensor = tensors[name]
        fitting = [shape for shape in shapes if len(shape) == tensor.ndim]
        measured = dict(zip(fitting[0], tensor.shape, strict=True)) if fitting else {}
        if not fitting or any(sizes.get(k, size) != size for k, size in measured.items()):
            expected = " or ".join(f"({', '.join(shape)})" for shape in shapes)
            known = ", ".join(f"{k} = {size}" for k, size in sizes.items())
            raise InputError(
                f"{path}: damaged: {name} has shape {tuple(tensor.shape)}, expected {expected}"
                + (f" with {known}" if known else "")
            )
        sizes |= measured
        labels = shapes == ("M",)
        if tensor.dtype != (torch.int64 if labels else torch.float32):
            raise InputError(f"{path}: damaged: {name} holds {tensor.dtype}")
        if not (((tensor >= 0) & (tensor < sizes["K"])) if labels else tensor.isfinite()).all():
            what = f"classes beyond the {sizes['K']}" if labels else "values that are no numbers"
            raise InputError(f"{path}: damaged: {name} has {what}")
    norms = tensors["text"].norm(dim=1)
    if not len(norms) or float((norms - 1).abs().max()) > UNIT:
        raise InputError(f"{path}: damaged: text holds no unit rows")


def _checked(
    path: str | Path, found: Mapping[str, Any], types: Mapping[str, Any], what: str
) -> dict[str, Any]:
    _check_names(path, found, types, what)
    for name, kind in types.items():
        if not _is(found[name], kind):
            raise InputError(f"{path}: damaged: {name} is {str(found[name])[:40]!r}")
    return dict(found)


def _check_names(
    path: str | Path, found: Mapping[str, Any], wanted: Mapping[str, Any], what: str
) -> None:
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    told = [f"lacks {', '.join(missing)}"] * bool(missing) + [
        f"also has {', '.join(extra)}"
    ] * bool(extra)
    if told:
        raise InputError(f"{path}: is no head of this version: its {what} {' and '.join(told)}")


def _is(value: Any, kind: Any) -> bool:
    if kind is float:  # JSON writes whole ones as integers
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value)
    return isinstance(value, kind)


def _strings(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
