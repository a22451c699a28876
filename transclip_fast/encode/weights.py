"""Checkpoint files as tensors by name that stay on disk until they are used."""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from transclip_fast.errors import InputError
from transclip_fast.store.arrays import inside
from transclip_fast.store.atomic import read_json

INDEX = ".index.json"
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
PREFIXES = ("module.", "_orig_mod.", "model.", "clip_model.", "clip.")
NAMES = (  # of a folder's checkpoint, the first there is
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
NOT_WEIGHTS = frozenset({"input_resolution", "context_length", "vocab_size"})  # OpenAI's


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """
    The tensors of a checkpoint, mapped from disk.

    What training scripts wrap around them is taken off: a dictionary under one of `WRAPPERS`, and
    those of `PREFIXES` that all names share.

    Parameters
    ----------
    path : path
        A .safetensors file; a file of `torch.save`; the .index.json of a checkpoint in several
        files.

    Raises
    ------
    InputError
        Missing, damaged, or holding anything but tensors and plain numbers.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    tensors = _sharded(path) if path.name.endswith(INDEX) else _read(path)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in NOT_WEIGHTS}
    while tensors and (shared := _shared_prefix(tensors)):
        tensors = {name.removeprefix(shared): tensor for name, tensor in tensors.items()}
    return tensors


def checkpoint_in(folder: Path) -> Path:
    """
    The checkpoint of a folder: one of `NAMES`, or the only one there is.

    Raises
    ------
    InputError
        None, several, or a link out of the folder.
    """
    found = [name for name in NAMES if (folder / name).is_file()] or sorted(
        file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".pt")
    )
    if not found or (len(found) > 1 and found[0] not in NAMES):
        raise InputError(
            f"{folder}: holds {'several' if found else 'no'} checkpoints; "
            f"call the one to load {NAMES[0]}"
        )
    return inside(folder, found[0])


def checkpoint_files(path: Path) -> list[Path]:
    """
    All files of a checkpoint: itself, and those that it names where it is an index.

    Raises
    ------
    InputError
        An index that is none, or that names a file that is not beside it.
    """
    if not path.name.endswith(INDEX):
        return [path]
    files = sorted(set(_weight_map(path).values()))
    for file in files:
        if not inside(path.parent, file).is_file():
            raise InputError(f"{path.parent / file}: no such file, though {path.name} names it")
    return [path, *(path.parent / file for file in files)]


def _shared_prefix(names: Iterable[str]) -> str:
    return next((p for p in PREFIXES if all(name.startswith(p) for name in names)), "")


def _weight_map(path: Path) -> dict[str, str]:
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise InputError(f"{path}: is not the index of a checkpoint (no weight_map)")
    return files


def _sharded(path: Path) -> dict[str, torch.Tensor]:
    """The tensors that an index names, each from its file beside the index."""
    files, tensors = _weight_map(path), {}
    for part in checkpoint_files(path)[1:]:
        held = _read(part)
        for name in (name for name, file in files.items() if file == part.name):
            if name not in held:
                raise InputError(f"{part}: has no tensor {name!r}, though {path.name} says so")
            tensors[name] = held[name]
    return tensors


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        with warnings.catch_warnings():  # of torch, about damage that the error tells better
            warnings.simplefilter("ignore")
            mapped = zipfile.is_zipfile(path)  # torch's older format cannot be
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: does not load (damaged, or holds pickled Python objects, which are never "
            "loaded; save its state_dict alone)"
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: does not load ({reason})") from error
    return _state_dict(path, loaded)


def _state_dict(path: Path, loaded: Any) -> dict[str, torch.Tensor]:
    while isinstance(loaded, Mapping):
        wrapper = next((w for w in WRAPPERS if isinstance(loaded.get(w), Mapping)), None)
        if wrapper is None:
            break
        loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not loaded:
        raise InputError(f"{path}: does not load (expected tensors by name)")
    for name, tensor in loaded.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise InputError(f"{path}: does not load ({name!r} is not a dense tensor)")
    return {str(name): tensor.detach() for name, tensor in loaded.items()}
