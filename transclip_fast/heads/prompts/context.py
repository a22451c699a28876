"""Prompts with a learned context: tokens around class names, initial vectors, nearest words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from transclip_fast.errors import InputError
from transclip_fast.heads.base import Head
from transclip_fast.heads.prompting import ContextSettings
from transclip_fast.heads.text_tower import Prompts, TextTower

INITIAL_DEVIATION = 0.02  # standard deviation of random initial vectors
PLACEHOLDER = "a"  # one token in every vocabulary; its vector is replaced
VOCABULARY_BLOCK = 8192  # words compared at a time


@dataclass(frozen=True, kw_only=True)
class ContextHead(Head):
    """A head that a text tower made of class names in learned contexts."""

    stored_settings: ClassVar = {"position": str, "words": list}
    vectors: ClassVar[str] = "context"  # the field of the contexts (..., width)

    position: str  # of the class name: "end", "middle" or "front"
    words: list[str]  # nearest word of each vector of the contexts, flat

    def words_by_context(self, class_names: Sequence[str]) -> dict[str, list[str]]:
        n_ctx = int(self.parameters["n_ctx"])
        groups = [self.words[start : start + n_ctx] for start in range(0, len(self.words), n_ctx)]
        return dict(zip(self.context_names(class_names), groups, strict=True))

    @classmethod
    def from_stored(cls, **fields: Any) -> Head:
        words, n_vectors = fields["words"], fields[cls.vectors].shape[:-1].numel()
        if not words or len(words) != n_vectors or not all(isinstance(word, str) for word in words):
            raise InputError("damaged: words are not one for each vector of the context")
        return cls(**fields)

    def context_names(self, class_names: Sequence[str]) -> Sequence[str]:
        """Names of the contexts, in their order."""
        return ["all"]


def class_prompts(
    tower: TextTower, class_names: Sequence[str], n_ctx: int, position: str
) -> Prompts:
    """
    Prompts of n_ctx context tokens around each class name, with a full stop at the end.

    Source: Zhou et al. 2022, Learning to Prompt for Vision-Language Models, equations 2 and 4:
    [V]_1 .. [V]_M [CLASS]. at the end, [V]_1 .. [V]_M/2 [CLASS] [V]_M/2+1 .. [V]_M. in the middle;
    at the front as in the authors' repository (KaiyangZhou/CoOp).
    """
    # open_clip's class names have underscores for blanks.
    names = [name.replace("_", " ") for name in class_names]
    frame = _Frame(tower)
    (filler,) = frame.contents([PLACEHOLDER])
    bare = frame.contents([f"{PLACEHOLDER} {name}" for name in names])
    stopped = frame.contents([f"{PLACEHOLDER} {name}." for name in names])
    before = {"end": n_ctx, "middle": n_ctx // 2, "front": 0}[position]
    context = filler[:1] * n_ctx
    contents, places = [], []
    for name, whole, stop in zip(names, bare, stopped, strict=True):
        class_tokens, end = whole[1:], stop[len(whole) :]
        if stop[: len(whole)] != whole:  # the stop is part of the last token
            class_tokens, end = stop[1:], []
        content = [*context[:before], *class_tokens, *context[before:], *end]
        if len(content) > frame.room:
            raise InputError(
                f"class {name!r}: its prompt has {len(content)} tokens with {n_ctx} of context, "
                f"the model reads {frame.room}; shorten the name or the context"
            )
        contents.append(content)
        first, after = len(frame.head), len(frame.head) + len(class_tokens)
        places.append([*range(first, first + before), *range(after + before, after + n_ctx)])
    longest = max(len(content) for content in contents)
    tokens = torch.tensor([frame.filled(content, longest) for content in contents])
    return Prompts(tokens.to(tower.device), torch.tensor(places).to(tower.device))


def first_context(
    tower: TextTower, settings: ContextSettings, n_classes: int, seed: int
) -> torch.Tensor:
    """Initial vectors (n_ctx, width), or (K, n_ctx, width) if they are class-specific."""
    if settings.start is not None:
        (words,) = _Frame(tower).contents([settings.start])
        if not words:
            raise InputError(f"start {settings.start!r}: holds no words for the context")
        shared = tower.vectors(torch.tensor(words))
        return shared.repeat(n_classes, 1, 1) if settings.class_specific else shared
    like = tower.vectors(torch.zeros(1, dtype=torch.int64))
    classes = [n_classes] if settings.class_specific else []
    shape = (*classes, settings.n_ctx, like.shape[1])
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=draw, dtype=torch.float32)
    return (INITIAL_DEVIATION * noise).to(like)


@torch.no_grad()
def nearest_words(tower: TextTower, context: torch.Tensor) -> list[str]:
    """
    The word with the nearest embedding for each vector of a context (..., width), flat.

    Distances are Euclidean, over the tower's vocabulary without its special tokens, as in Zhou et
    al. 2022, section 4.4.
    """
    special = set(_Frame(tower).empty)
    ids = torch.tensor([k for k in range(tower.embedding.num_embeddings) if k not in special])
    vectors = context.detach().reshape(-1, context.shape[-1]).to(tower.device)
    nearest = torch.full((len(vectors),), torch.inf, device=tower.device, dtype=vectors.dtype)
    found = torch.zeros(len(vectors), dtype=torch.int64, device=tower.device)
    for block in torch.split(ids, VOCABULARY_BLOCK):
        distances = torch.cdist(vectors, tower.vectors(block).to(vectors.dtype))
        closest, place = distances.min(1)
        found = torch.where(closest < nearest, block.to(tower.device)[place], found)
        nearest = torch.minimum(nearest, closest)
    tokenizer: Any = tower.backbone.tokenizer
    decode = getattr(tokenizer, "decode", None) or tokenizer.tokenizer.decode
    return [str(decode([token])).strip() for token in found.tolist()]


class _Frame:
    """The tokens that a tokenizer puts before and after a text, found from the empty text."""

    def __init__(self, tower: TextTower) -> None:
        self._tower = tower
        self.empty: list[int] = tower.tokenize([""])[0].tolist()
        word: list[int] = tower.tokenize([PLACEHOLDER])[0].tolist()
        same = [a == b for a, b in zip(self.empty, word, strict=True)]
        self.head = self.empty[: same.index(False)]
        self._after = self.empty[len(self.head) :]
        padding = self.empty[-1]
        marks = sum(token != padding for token in self._after)
        self._tail = max(marks, 1)  # one token of padding, if that marks the end
        self.room = len(self._after) - self._tail

    def contents(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text without those around it; a text that is too long is cut."""
        found = []
        for row in self._tower.tokenize(list(texts)).tolist():
            body, after = row[len(self.head) :], self._after
            length = next(m for m in range(len(body) + 1) if body[m:] == after[: len(body) - m])
            found.append(body[:length])
        return found

    def filled(self, content: list[int], longest: int) -> list[int]:
        """The row of a text, cut to the tokens of the longest if the tower allows that."""
        row = [*self.head, *content, *self._after]
        needed = len(self.head) + longest + self._tail
        return row[: needed if self._tower.shortens else len(self.empty)]
