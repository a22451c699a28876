"""Checkpoint files as tensors by name, mapped from disk; none of them runs code."""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from transclip_fast.errors import InputError, reading
from transclip_fast.store.archives import check_torch_zip
from transclip_fast.store.arrays import as_numbers, inside
from transclip_fast.store.atomic import read_json
from transclip_fast.store.tensors import by_number, map_tensors

SUFFIXES = (".safetensors", ".bin", ".pt")
INDEX_SUFFIX = ".index.json"
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
PREFIXES = ("module.", "_orig_mod.", "model.", "clip_model.", "clip.")
FOLDER_CHECKPOINTS = (  # of a folder, the first that exists
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
NOT_WEIGHTS = frozenset({"input_resolution", "context_length", "vocab_size"})  # in OpenAI's files
TORCHSCRIPT_RECORD = "constants.pkl"  # that archives of `torch.save` do not have
BESIDE_WEIGHTS = (  # of what training scripts save: NumPy's numbers and arrays, and their options
    "numpy.dtype",
    "numpy.ndarray",
    *(
        f"{module}.multiarray.{name}"  # of NumPy 1 and 2
        for module in ("numpy.core", "numpy._core")
        for name in ("scalar", "_reconstruct")
    ),
    "argparse.Namespace",
)


@dataclass(frozen=True)
class WatchedFiles:
    """Files that must stay as they are while they are used, and their state at the start."""

    states: Mapping[Path, tuple[int, ...]]

    @classmethod
    def of(cls, files: Iterable[Path]) -> WatchedFiles:
        """Watch these files from now on."""
        return cls({file: _state(file) for file in files})

    def check(self) -> None:
        """Raise InputError if a file was written, replaced or removed since."""
        for file, state in self.states.items():
            if _state(file) != state:
                raise InputError(
                    f"{file}: changed while it was in use; put the former file back and run again, "
                    "or name a new --out"
                )

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Check at the end, and where a block that reads the files finds anything wrong."""
        try:
            yield
        except InputError:
            self.check()
            raise
        self.check()


def _state(file: Path) -> tuple[int, ...]:
    with suppress(OSError):
        found = os.stat(file)
        # The last also changes where a copy sets the time of writing back.
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    return ()


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """
    Map the tensors of a checkpoint from disk. Read each by `unmapped`, as the system kills a
    process that reads the map of a file that was cut; `WatchedFiles` notice other changes.

    It is a .safetensors file, a file of `torch.save`, or the .index.json of several files.
    Dictionaries that training scripts wrap around the tensors (`WRAPPERS`) and prefixes that all
    names share (`PREFIXES`) are removed; what they save beside them (`BESIDE_WEIGHTS`), such as
    the learning rates of an optimizer, is left out, and nothing of it is built. InputError if the
    file is missing, damaged, or holds other objects.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    tensors = _read_parts(path) if path.name.endswith(INDEX_SUFFIX) else _read_file(path)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in NOT_WEIGHTS}
    while tensors and (shared := [p for p in PREFIXES if all(n.startswith(p) for n in tensors)]):
        tensors = {name.removeprefix(shared[0]): tensor for name, tensor in tensors.items()}
    return tensors


def checkpoint_in(folder: Path) -> Path:
    """The checkpoint of a folder: one of `FOLDER_CHECKPOINTS`, or the only one there is."""
    found = [name for name in FOLDER_CHECKPOINTS if (folder / name).is_file()] or sorted(
        file.name for file in folder.iterdir() if file.suffix in SUFFIXES
    )
    if not found or (len(found) > 1 and found[0] not in FOLDER_CHECKPOINTS):
        raise InputError(
            f"{folder}: holds {'several' if found else 'no'} checkpoints; "
            f"call the one to load {FOLDER_CHECKPOINTS[0]}"
        )
    return inside(folder, found[0])


def cached_files(known: Mapping[str, Any]) -> list[Path]:
    """The weights of an open_clip tag that are on disk, by what it knows of the tag."""
    from huggingface_hub import snapshot_download

    found = [Path(known["file"])] if known.get("file") else []
    if known.get("url"):
        found.append(Path("~/.cache/clip").expanduser() / os.path.basename(known["url"]))
    if repository := os.path.split(known.get("hf_hub") or "")[0]:
        with suppress(OSError, ValueError):  # not in the hub's cache
            folder = Path(snapshot_download(repository, local_files_only=True))
            found += [file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES]
    return [file for file in found if os.path.isfile(file)]


def checkpoint_files(path: Path) -> list[Path]:
    """All files of a checkpoint: the file itself and, if it is an index, those that it names."""
    if not path.name.endswith(INDEX_SUFFIX):
        return [path]
    files = sorted(set(_weight_map(path).values()))
    for file in files:
        if not os.path.isfile(inside(path.parent, file)):  # no error for a name that is too long
            raise InputError(f"{path.parent / file}: no such file, though {path.name} names it")
    return [path, *(path.parent / file for file in files)]


def _weight_map(path: Path) -> dict[str, str]:
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise InputError(f"{path}: is not the index of a checkpoint (no weight_map)")
    return files


def _read_parts(path: Path) -> dict[str, torch.Tensor]:
    """The tensors that an index names, each from its file beside the index."""
    parts = {part: _read_file(part) for part in checkpoint_files(path)[1:]}
    tensors = {}
    for name, file in _weight_map(path).items():
        part = path.parent / file
        if name not in parts[part]:
            raise InputError(f"{part}: has no tensor {name!r}, though {path.name} names it")
        tensors[name] = parts[part][name]
    return tensors


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    with reading(path, "does not load", "save its state_dict alone"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of damage that the error describes better
        if path.suffix == ".safetensors":
            return map_tensors(path)
        mapped = zipfile.is_zipfile(path)  # torch's older format cannot be
        if mapped and _is_torchscript(path):
            raise InputError(
                f"{path}: is a TorchScript archive, as OpenAI's are, which holds code and is never "
                "run; give --pretrained openai, or save its weights alone: "
                "torch.save(torch.jit.load(FILE, 'cpu').state_dict(), NEW_FILE)"
            )
        if mapped:
            check_torch_zip(path)
        left_out = torch.serialization.safe_globals([(_LeftOut, name) for name in BESIDE_WEIGHTS])
        with left_out, open(path, "rb") as file:
            file_name = by_number(file)
            tensors: Any = torch.load(file_name, map_location="cpu", weights_only=True, mmap=mapped)
        while inner := _wrapped(tensors):
            tensors = inner
        if not isinstance(tensors, Mapping) or not tensors:
            raise ValueError("expected tensors by name")
        return {str(name): as_numbers(path, tensor) for name, tensor in tensors.items()}


class _LeftOut:
    """Takes the place of an object of `BESIDE_WEIGHTS`, and keeps nothing of it."""

    def __init__(self, *parts: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith(f"/{TORCHSCRIPT_RECORD}") for name in archive.namelist())


def _wrapped(loaded: Any) -> Mapping[str, Any] | None:
    """The dictionary under the first of `WRAPPERS`, if there is one."""
    values = (loaded.get(key) for key in WRAPPERS) if isinstance(loaded, Mapping) else ()
    return next((value for value in values if isinstance(value, Mapping)), None)
