"""Class names and templates to one text prototype a class."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transclip_fast.data.names import (
    LEADING,
    MARKS,
    Odd,
    all_numbered,
    listed,
    more,
    odd_names,
    plain_name,
    positions_by_name,
    repeats,
    same_names,
)
from transclip_fast.encode.models import Backbone
from transclip_fast.errors import InputError, reading
from transclip_fast.store.json_text import parse_json
from transclip_fast.store.names import ClassNames, as_names, check_names, place, read_names

PROMPTS_PER_BATCH = 256
BRACES = frozenset("{}")
ODD_TEMPLATES: Sequence[Odd] = (
    (
        "is code ({0!r}), which goes into the {2}",
        "write the prompt alone, as a photo of a {}.",
        re.compile(r"\blambda\b[^:]*:|^\[|^[frbu]{1,2}[\"']", re.I).search,
    ),
    *MARKS,
    (
        "has other braces than {{}} and {{c}} ({0!r}), which go into the {2}",
        "take them off",
        lambda line: BRACES.intersection(line.replace("{}", "").replace("{c}", "")),
    ),
)
Templates = Callable[[str], Sequence[str]]  # from a class name to its prompts


@dataclass(frozen=True)
class ListedPrompts:
    """The prompts of each class, as a file of CuPL lists them."""

    path: Path
    table: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path, content: str) -> ListedPrompts:
        """The content of a JSON file."""
        with reading(path, "is not JSON"):
            table = parse_json(content)
        if not isinstance(table, Mapping):
            raise InputError(f"{path}: expected an object of class names to lists of prompts")
        return cls(path, table)

    @cached_property
    def _entries(self) -> tuple[list[Any], dict[Any, int | None]]:
        return [*self.table.values()], positions_by_name(self.table)

    def __call__(self, name: str) -> Sequence[str]:
        """The prompts of a class."""
        values, positions = self._entries
        position = positions.get(plain_name(name), -1)
        if position is None:
            raise InputError(f"{self.path}: has several lists of prompts for class {name!r}")
        found = values[position] if position >= 0 else None
        texts = isinstance(found, list) and all(isinstance(prompt, str) for prompt in found)
        if not found or not texts:
            raise InputError(f"{self.path}: has no list of prompts for class {name!r}")
        for prompt in found:
            if not prompt.strip():
                raise InputError(
                    f"{self.path}: has an empty prompt for class {name!r}; take it out"
                )
            if BRACES.intersection(prompt):
                raise InputError(
                    f"{self.path}: has braces in a prompt of class {name!r} ({prompt!r:.60}), "
                    "which no name replaces; write the prompt out"
                )
        return list(found)

    def doubts(self, names: Sequence[str]) -> Iterator[str]:
        """Classes of the file that are none of these."""
        known = {*map(plain_name, names)}
        others = [name for name in self.table if plain_name(name) not in known]
        if others:
            yield (
                f"{self.path}: has prompts of classes that are not in the list, and are not used: "
                f"{len(others):,} ({listed(others)})"
            )


def templates(spec: str) -> Templates:
    """
    Return a function from a class name to its prompts.

    `spec` is "openai" (80 templates) or "simple" (7); a text file with one template a line, each
    with `{}` or `{c}` in place of the name; or a JSON file of prompts by class name, as of CuPL.
    InputError if there is no such file, a template has no place for the name, or is code or has
    marks of a list, or (of the function) a class no prompts.
    """
    if spec in ("openai", "simple"):
        import open_clip

        known = getattr(open_clip, f"{spec.upper()}_IMAGENET_TEMPLATES")
        return lambda name: [template(name) for template in known]
    path = Path(spec)
    if not os.path.exists(path):
        raise InputError(f"{spec}: cannot be read; give openai, simple or a file")
    with reading(path, "cannot be read", "give openai, simple or a file"):
        content = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".json":
        return ListedPrompts.read(path, content)
    return _from_lines(path, content)


@dataclass(frozen=True)
class ClassPrompts:
    """Class names, the prompts of each, the templates' name or file, and the classes' synsets."""

    names: list[str]
    prompts: list[list[str]]
    origin: str
    synsets: list[str] | None = None

    @classmethod
    def read(cls, names: str | Path | Sequence[str], template_spec: str) -> ClassPrompts:
        """
        Combine names, or what `read_names` reads, with what `templates` reads.

        Warns of names and prompts that two classes share, and of what seems to be no name.
        """
        if isinstance(names, str | Path):
            found, origin = read_names(names), str(names)
        else:
            origin = "class names"
            found = ClassNames(check_names(origin, as_names(list(names), origin)))
        prompts = templates(template_spec)
        text = cls(
            found.names, [list(prompts(name)) for name in found.names], template_spec, found.synsets
        )
        for message in text.doubts(origin):
            warnings.warn(f"{origin}: {message}", stacklevel=2)
        for message in prompts.doubts(found.names) if isinstance(prompts, ListedPrompts) else ():
            warnings.warn(message, stacklevel=2)
        return text

    def doubts(self, origin: str) -> Iterator[str]:
        """What is odd about the names in the file `origin` and their prompts."""
        where = partial(place, origin)
        yield from odd_names(self.names, where, "prompts")
        same_prompts = [pair for pair in self.same_prompts() if pair not in same_names(self.names)]
        if same_prompts:
            first, k = same_prompts[0]
            yield (
                f"{where(k)} ({self.names[k]!r}) has the prompts of {where(first)} "
                f"({self.names[first]!r}){more(same_prompts)}; such classes cannot be told apart"
            )

    def same_prompts(self) -> list[tuple[int, int]]:
        """Classes that have the prompts of an earlier one, as `repeats`."""
        # Of their mean the order does not matter; tokenizers fold case and spaces.
        folded = (sorted(" ".join(p.casefold().split()) for p in ps) for ps in self.prompts)
        return repeats(map(tuple, folded))

    def identity(self) -> dict[str, Any]:
        """The manifest's entries: names, origin, hash of the prompts."""
        digest = hashlib.sha256(json.dumps(self.prompts).encode())
        return {
            "class_names": self.names,
            "templates": self.origin,
            "prompts_sha256": digest.hexdigest(),
        }


def encode_text(backbone: Backbone, text: ClassPrompts) -> np.ndarray:
    """
    Unit prototypes (K, d) float32, the normalized mean of each class's unit embeddings.

    A warning counts the prompts that are cut at the context length, and names classes that are
    equal then. InputError if a prototype is not finite.
    """
    flat = [prompt for of_class in text.prompts for prompt in of_class]
    rows, cut = embed_texts(backbone, flat)
    _warn_of_cuts(backbone.tokenizer, text, cut)
    _warn_of_equal_tokens(backbone.tokenizer, text, cut)
    parts = torch.split(rows, [len(of_class) for of_class in text.prompts])
    means = torch.stack([part.mean(0) for part in parts])
    unit: np.ndarray = torch.nn.functional.normalize(means, dim=1).numpy()
    for name, row in zip(text.names, unit, strict=True):
        if not np.isfinite(row).all():
            raise InputError(f"class {name!r}: its text embedding is {backbone.not_finite}")
    backbone.weights.check()
    return unit


def embed_texts(
    backbone: Backbone,
    texts: Sequence[str],
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[torch.Tensor, set[str]]:
    """Unit embeddings (len(texts), d) float32, and the texts that the context length cuts."""
    rows, cut = [], set[str]()
    with torch.inference_mode():
        for start in range(0, len(texts), PROMPTS_PER_BATCH):
            prompts = texts[start : start + PROMPTS_PER_BATCH]
            tokens = backbone.tokenizer(prompts)
            cut |= _cut_prompts(backbone.tokenizer, prompts, tokens)
            embedded = backbone.model.encode_text(tokens.to(backbone.device)).float()
            rows.append(torch.nn.functional.normalize(embedded, dim=1).cpu())
            progress(start + len(prompts), len(texts))
    return torch.cat(rows), cut


def _cut_prompts(tokenizer: Any, prompts: Sequence[str], tokens: torch.Tensor) -> set[str]:
    """The prompts whose `tokens` (P, L) would go on in a longer context."""
    length = getattr(tokenizer, "context_length", None)
    if length is None:  # nothing is cut
        return set()
    empty, longer = tokenizer([""]), tokenizer([""], context_length=length + 1)
    # Some tokenizers put a token at the end of the context, which moves with it.
    columns = torch.nonzero(empty[0] == longer[0, :length])[:, 0]
    ends = columns[-2:]  # of a prompt with room to spare, padding
    full = torch.nonzero((tokens[:, ends] != empty[:, ends]).any(1))[:, 0].tolist()
    cut = set()
    for row in full:
        longer = tokenizer([prompts[row]], context_length=length + 1)
        if not torch.equal(longer[0, columns], tokens[row, columns]):
            cut.add(prompts[row])
    return cut


def _warn_of_cuts(tokenizer: Any, text: ClassPrompts, cut: set[str]) -> None:
    if not cut:
        return
    flat = [prompt for prompts in text.prompts for prompt in prompts]
    names, equal = [], dict[bytes, list[str]]()
    for name, prompts in zip(text.names, text.prompts, strict=True):
        if cut.intersection(prompts):
            names.append(name)
            equal.setdefault(tokenizer(prompts).numpy().tobytes(), []).append(name)
    message = (
        f"{text.origin}: {sum(prompt in cut for prompt in flat):,} of {len(flat):,} prompts are "
        f"longer than {tokenizer.context_length} tokens and were cut ({listed(names)})"
    )
    for names in equal.values():
        if len(names) > 1:
            message += f"; the classes {listed(names)} have the same prompts then"
    warnings.warn(message, stacklevel=2)


def _warn_of_equal_tokens(tokenizer: Any, text: ClassPrompts, cut: set[str]) -> None:
    """Warn of classes whose prompts only the tokenizer makes equal."""
    known = {*text.same_prompts(), *same_names(text.names)}

    def tokens(k: int) -> list[bytes]:
        return sorted(row.tobytes() for row in tokenizer(text.prompts[k]).numpy())

    firsts = tokenizer([prompts[0] for prompts in text.prompts]).numpy()
    found = [
        (first, k)
        for first, k in repeats(row.tobytes() for row in firsts)
        if (first, k) not in known
        and not cut.intersection(text.prompts[k])
        and tokens(first) == tokens(k)
    ]
    if found:
        first, k = found[0]
        warnings.warn(
            f"class {k} ({text.names[k]!r}) has the tokens of class {first} "
            f"({text.names[first]!r}){more(found)}; such classes cannot be told apart",
            stacklevel=2,
        )


def _from_lines(path: Path, content: str) -> Templates:
    found = []
    for number, line in enumerate(map(str.strip, content.split("\n")), 1):
        if not line:
            continue
        for what, remedy, is_odd in ODD_TEMPLATES:
            if is_odd(line):
                shown = what.format(line, "template", "prompts")
                raise InputError(f"{path}: line {number} {shown}; {remedy}")
        if "{}" not in line and "{c}" not in line:
            raise InputError(f"{path}: line {number} has no {{}} for the class name: {line!r}")
        found.append(line)
    if not found:
        raise InputError(f"{path}: holds no templates")
    if all_numbered(found, LEADING):
        raise InputError(
            f"{path}: each line begins with another number ({found[0]!r}), which goes into the "
            "prompts; take it off"
        )
    return lambda name: [line.replace("{}", name).replace("{c}", name) for line in found]
