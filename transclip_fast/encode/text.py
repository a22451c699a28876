"""Class names and templates to one text prototype a class."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transclip_fast.encode.models import Backbone
from transclip_fast.errors import InputError, reading
from transclip_fast.store.features import read_names

PROMPTS_PER_BATCH = 256
SHOWN_NAMES = 5  # of classes, in a warning
Templates = Callable[[str], Sequence[str]]  # from a class name to its prompts


def class_names(spec: str) -> list[str]:
    """Read class names: one a line of a text file, or "imagenet" for the 1000 of ImageNet."""
    if spec == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES

        return list(IMAGENET_CLASSNAMES)
    names = read_names(spec)
    if not names:
        raise InputError(f"{spec}: holds no class names")
    return names


def templates(spec: str) -> Templates:
    """
    Return a function from a class name to its prompts.

    `spec` is "openai" (80 templates) or "simple" (7); a text file with one template a line, each
    with `{}` or `{c}` in place of the name; or a JSON file of prompts by class name, as of CuPL.
    InputError if there is no such file, a template has no place for the name, or (of the function)
    a class no prompts.
    """
    if spec in ("openai", "simple"):
        import open_clip

        known = getattr(open_clip, f"{spec.upper()}_IMAGENET_TEMPLATES")
        return lambda name: [template(name) for template in known]
    path = Path(spec)
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{spec}: cannot be read ({error}); give openai, simple or a file"
        ) from error
    return _from_json(path, content) if path.suffix == ".json" else _from_lines(path, content)


@dataclass(frozen=True)
class ClassPrompts:
    """Class names, the prompts of each, and the templates' name or file."""

    names: list[str]
    prompts: list[list[str]]
    origin: str

    @classmethod
    def read(cls, names: str | Path | Sequence[str], template_spec: str) -> ClassPrompts:
        """Combine names, or what `class_names` reads, with what `templates` reads."""
        listed = class_names(str(names)) if isinstance(names, str | Path) else list(names)
        prompts = templates(template_spec)
        return cls(listed, [list(prompts(name)) for name in listed], template_spec)

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
    rows, cut = [], set[str]()
    with torch.inference_mode():
        for start in range(0, len(flat), PROMPTS_PER_BATCH):
            prompts = flat[start : start + PROMPTS_PER_BATCH]
            tokens = backbone.tokenizer(prompts)
            cut |= _cut_prompts(backbone.tokenizer, prompts, tokens)
            embedded = backbone.model.encode_text(tokens.to(backbone.device)).float()
            rows.append(torch.nn.functional.normalize(embedded, dim=1).cpu())
    _warn_of_cuts(backbone.tokenizer, text, cut)
    parts = torch.split(torch.cat(rows), [len(of_class) for of_class in text.prompts])
    means = torch.stack([part.mean(0) for part in parts])
    unit: np.ndarray = torch.nn.functional.normalize(means, dim=1).numpy()
    for name, row in zip(text.names, unit, strict=True):
        if not np.isfinite(row).all():
            raise InputError(f"class {name!r}: its text embedding is {backbone.not_finite}")
    backbone.weights.check()
    return unit


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
        f"longer than {tokenizer.context_length} tokens and were cut ({_listed(names)})"
    )
    for names in equal.values():
        if len(names) > 1:
            message += f"; the classes {_listed(names)} have the same prompts then"
    warnings.warn(message, stacklevel=2)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")


def _from_lines(path: Path, content: str) -> Templates:
    found = []
    for number, line in enumerate(map(str.strip, content.splitlines()), 1):
        if line and "{}" not in line and "{c}" not in line:
            raise InputError(f"{path}: line {number} has no {{}} for the class name: {line!r}")
        found += [line] if line else []
    if not found:
        raise InputError(f"{path}: holds no templates")
    return lambda name: [line.replace("{}", name).replace("{c}", name) for line in found]


def _from_json(path: Path, content: str) -> Templates:
    with reading(path, "is not JSON"):
        table = json.loads(content)
    if not isinstance(table, Mapping):
        raise InputError(f"{path}: expected an object of class names to lists of prompts")

    def prompts(name: str) -> Sequence[str]:
        match table.get(name):
            case [*found] if found and all(isinstance(prompt, str) for prompt in found):
                return found
        raise InputError(f"{path}: has no list of prompts for class {name!r}")

    return prompts
