"""Class names from files of every kind."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from transclip_fast.data.synsets import SYNSET, imagenet_synsets
from transclip_fast.errors import InputError, reading, user_level
from transclip_fast.store.arrays import read_array
from transclip_fast.store.json_text import parse_json
from transclip_fast.store.tables import LABEL, TABLE_SUFFIXES, not_read, read_columns

IMAGENET = "imagenet"  # stands for its 1000 classes
TEXT_SUFFIXES = (".txt", ".names", ".lst")
ARRAY_SUFFIXES = (".npy", ".npz")
COLUMNS = {
    "name": ("name", "class_name", "class"),
    "position": (*LABEL, "index", "id", "class_id", "class_index", "idx"),
    "synset": ("synset", "wnid"),
}
WITH_SYNSET = re.compile(rf"({SYNSET.pattern})\s+(\S.*)")
SEPARATOR = re.compile(r"[,;|\t]")
NUMBER = re.compile(r"\d{1,9}")
NUMBERED = re.compile(r"(\d{1,9})[\s:,;.)]+\S")


@dataclass(frozen=True)
class ClassNames:
    """Names (K,) in the order of the labels, and the synset of each if the file has them."""

    names: list[str]
    synsets: list[str] | None = None


def read_names(path: str | Path) -> ClassNames:
    """
    Class names from a file, or "imagenet" for the 1000 of ImageNet.

    | file | names |
    |---|---|
    | .txt | one a line; or a synset and a name, as `n01440764 tench` |
    | .json | a list; an object of names by number, or of numbers by name; of names by synset |
    | | names as in ImageNet's index, `["n01440764", "tench"]` |
    | .csv, .parquet | the column `name`, in the order of a column `label` if there is one |
    | .npy, .npz | an array of fixed-width strings |

    Raises
    ------
    InputError
        Another file, a missing or damaged one, no names, an empty one, or an order that is not
        clear.
    """
    if str(path) == IMAGENET:
        from open_clip import IMAGENET_CLASSNAMES

        return ClassNames([*IMAGENET_CLASSNAMES], [*imagenet_synsets()])
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".json":
        found = _from_json(path)
    elif suffix in TABLE_SUFFIXES:
        found = _from_table(path)
    elif suffix in ARRAY_SUFFIXES:
        found = ClassNames(as_names(read_array(path, "class_names"), str(path)))
    elif suffix in (*TEXT_SUFFIXES, ""):
        found = _from_lines(path)
    else:
        raise InputError(
            f"{path}: class names are read from .txt (one a line), .json, .csv, .parquet and .npy"
        )
    return ClassNames(check_names(path, found.names), found.synsets)


def check_names(origin: str | Path, names: Sequence[str]) -> list[str]:
    """Names without spaces around them; InputError if there are none, or an empty one."""
    stripped = [name.strip() for name in names]
    if not stripped:
        raise InputError(f"{origin}: holds no class names")
    if "" in stripped:
        raise InputError(
            f"{origin}: {place(origin, stripped.index(''))} is empty; later classes would move up "
            "by one: name it or take it out"
        )
    if (k := next((k for k, name in enumerate(stripped) if "\0" in name), None)) is not None:
        raise InputError(f"{origin}: {place(origin, k)} has a NUL character; write it again")
    if all(SYNSET.fullmatch(name) for name in stripped):
        raise InputError(
            f"{origin}: holds synsets, of which no prompts can be made; give lines such as "
            f"'{stripped[0]} NAME'"
        )
    if (k := next((k for k, name in enumerate(stripped) if SYNSET.match(name)), None)) is not None:
        raise InputError(
            f"{origin}: {place(origin, k)} begins with a synset ({stripped[k]!r}), which would go "
            "into the prompts; give every class one, as lines of a .txt, or none"
        )
    return stripped


def place(path: str | Path, k: int) -> str:
    """Where class k is in a file of names."""
    return f"line {k + 1}" if Path(path).suffix.lower() in TEXT_SUFFIXES else f"class {k}"


def as_names(array: Any, origin: str) -> list[str]:
    """A list, or an array of strings or UTF-8 bytes, as names."""
    if isinstance(array, list):  # of JSON
        if not all(isinstance(name, str) for name in array):
            raise InputError(f"{origin}: expected a list of strings")
        return array
    values = np.asarray(array)
    if values.ndim != 1 or values.dtype.kind not in "US":
        raise InputError(f"{origin}: expected a list of strings, got {values.dtype}")
    if values.dtype.kind == "S":
        with reading(origin, "is no UTF-8 text", "write it again"):
            return [name.decode("utf-8") for name in values.tolist()]
    return [str(name) for name in values]


def _from_lines(path: Path) -> ClassNames:
    with reading(path, "cannot be read as UTF-8 text", "write it again"):
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    if lines[0].startswith(("[", "{")) or (len(lines) == 1 and SEPARATOR.search(lines[0])):
        raise InputError(
            f"{path}: expected one name a line, got {lines[0][:40]!r}; a list in brackets goes in "
            "a .json"
        )
    for first, part in enumerate((lines, lines[1:])):  # with or without a header, as of YAML
        numbers = [int(match[1]) for line in part if (match := NUMBERED.match(line.strip()))]
        if len(part) > 1 and numbers in ([*range(len(part))], [*range(1, len(part) + 1)]):
            raise InputError(
                f"{path}: line {first + 1} begins with a number ({part[0].strip()!r}), which would "
                "go into the prompts; give the names alone"
            )
    pairs = [pair for line in lines if (pair := WITH_SYNSET.fullmatch(line.strip()))]
    if len(pairs) == len(lines):
        return ClassNames([pair[2] for pair in pairs], [pair[1] for pair in pairs])
    return ClassNames(lines if lines != [""] else [])


def _from_json(path: Path) -> ClassNames:
    with reading(path, "is not JSON"):
        content = path.read_text(encoding="utf-8-sig")
        value = parse_json(content)
    match value:
        case [*entries]:
            return _of_entries(path, entries)
        case {} if value and all(NUMBER.fullmatch(key) for key in value):
            numbers = [int(key) for key in value]
            return _of_entries(path, in_order(path, numbers, [*value.values()]))
        case {} if value and all(type(number) is int for number in value.values()):
            return ClassNames(in_order(path, [*value.values()], [*value]))
        case {} if value and all(SYNSET.fullmatch(key) for key in value):
            return _of_entries(path, [[*pair] for pair in value.items()])
    raise InputError(
        f"{path}: expected a list of names, names by number, or numbers by name; class names are "
        "read from these"
    )


def _of_entries(path: Path, entries: Sequence[Any]) -> ClassNames:
    """Names from a list of names, or of pairs of a synset and a name."""
    if all(isinstance(entry, str) for entry in entries):
        return ClassNames([*entries])
    pairs = []
    for k, entry in enumerate(entries):
        match entry:
            case [str(synset), str(name)] if SYNSET.fullmatch(synset):
                pairs.append((synset, name))
            case str():
                continue
            case _:
                raise InputError(
                    f"{path}: class {k} is {entry!r:.60}; expected a name, or a synset and a name"
                )
    if len(pairs) < len(entries):
        raise InputError(f"{path}: has names with synsets and without; give all of them one")
    return ClassNames([name for _, name in pairs], [synset for synset, _ in pairs])


def _from_table(path: Path) -> ClassNames:
    columns, others = read_columns(path, COLUMNS, "name")
    if others and "position" not in columns:
        message = f"{path}: classes are in the order of the lines; {not_read(others)}"
        warnings.warn(message, stacklevel=user_level())
    names = ["" if name is None else name for name in columns["name"]]
    synsets = columns.get("synset")
    for values in (names, synsets or ()):
        for k, value in enumerate(values):
            if not isinstance(value, str):
                raise InputError(f"{path}: class {k} is {value!r:.60}; expected a text")
    if empty := [k for k, synset in enumerate(synsets or ()) if not synset.strip()]:
        raise InputError(f"{path}: class {empty[0]} has no synset; give each class one, or none")
    if "position" in columns:
        with reading(path, "has labels that are no whole numbers", "give each class its position"):
            numbers = [int(number) for number in columns["position"]]
            fractions = [x for x in columns["position"] if isinstance(x, float) and x % 1]
            if fractions:
                raise ValueError(f"{fractions[0]} is a fraction")
        names = in_order(path, numbers, names)
        synsets = synsets and in_order(path, numbers, synsets)
    return ClassNames(names, synsets)


def in_order(path: Path, numbers: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """Values by their numbers; InputError unless these are 0 .. K - 1."""
    for number, found in zip(count(), sorted(numbers)):
        if number != found:
            raise InputError(
                f"{path}: classes have the numbers {min(numbers)} .. {max(numbers)}, of which "
                f"{number} is missing or another twice; labels are positions, 0 .. "
                f"{len(numbers) - 1}"
            )
    return [value for _, value in sorted(zip(numbers, values, strict=True), key=lambda x: x[0])]
