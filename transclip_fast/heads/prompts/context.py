"""Prompts with a context to learn: tokens around class names, first vectors, nearest words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from transclip_fast.errors import InputError
from transclip_fast.heads.prompts.tower import Prompts, TextTower

POSITIONS = ("end", "middle", "front")
SPREAD = 0.02  # standard deviation of random first vectors
PLACEHOLDER = "a"  # one token in every vocabulary; its vector is never read
BLOCK = 8192  # words compared at a time


@dataclass(frozen=True)
class ContextSettings:
    """
    What the learned part of a prompt is.

    Parameters
    ----------
    n_ctx : int
        Vectors; with `start`, the number of its tokens.
    class_specific : bool
        Each class has its own vectors, instead of all the same.
    position : str
        Of the class name: "end", "middle" or "front".
    start : str, optional
        Words that the vectors start from, e.g. "a photo of a"; random without.

    Raises
    ------
    InputError
        From `check`: a value that makes no sense.
    """

    n_ctx: int = 16
    class_specific: bool = False
    position: str = "end"
    start: str | None = None

    def check(self) -> None:
        """Raise InputError unless the values make sense."""
        if self.position not in POSITIONS:
            raise InputError(f"position {self.position!r}: choose one of {', '.join(POSITIONS)}")
        if self.n_ctx < 1:
            raise InputError(f"a context of {self.n_ctx} tokens; give at least one")


def class_prompts(
    tower: TextTower, class_names: Sequence[str], n_ctx: int, position: str
) -> Prompts:
    """
    Prompts of n_ctx context tokens around each class name, with a full stop at the end.

    Source: Zhou et al. 2022, Learning to Prompt for Vision-Language Models, equations 2 and 4:
    [V]_1 .. [V]_M [CLASS]. at the end, [V]_1 .. [V]_M/2 [CLASS] [V]_M/2+1 .. [V]_M. in the middle;
    at the front as in the authors' repository (KaiyangZhou/CoOp).

    Raises
    ------
    InputError
        A prompt that is longer than the tower reads.
    """
    # What open_clip's names of classes have for blanks.
    names = [name.replace("_", " ") for name in class_names]
    frame = _Frame(tower)
    (filler,) = frame.contents([PLACEHOLDER])
    bare = frame.contents([f"{PLACEHOLDER} {name}" for name in names])
    stopped = frame.contents([f"{PLACEHOLDER} {name}." for name in names])
    before = {"end": n_ctx, "middle": n_ctx // 2, "front": 0}[position]
    context = filler[:1] * n_ctx
    contents, places = [], []
    for name, whole, stop in zip(names, bare, stopped, strict=True):
        named, end = (whole[1:], stop[len(whole) :])
        if stop[: len(whole)] != whole:  # the stop is part of the last token
            named, end = stop[1:], []
        content = [*context[:before], *named, *context[before:], *end]
        if len(content) > frame.room:
            raise InputError(
                f"class {name!r}: its prompt has {len(content)} tokens with {n_ctx} of context, "
                f"the model reads {frame.room}; shorten the name or the context"
            )
        contents.append(content)
        first = len(frame.head)
        places.append(
            [first + column + (len(named) if column >= before else 0) for column in range(n_ctx)]
        )
    longest = max(len(content) for content in contents)
    tokens = torch.tensor([frame.filled(content, longest) for content in contents])
    return Prompts(tokens.to(tower.device), torch.tensor(places).to(tower.device))


def first_context(
    tower: TextTower, settings: ContextSettings, n_classes: int, seed: int
) -> torch.Tensor:
    """
    Vectors (n_ctx, width), or (K, n_ctx, width) class by class, before they are trained.

    Raises
    ------
    InputError
        `start` without a word in it.
    """
    if settings.start is not None:
        (words,) = _Frame(tower).contents([settings.start])
        if not words:
            raise InputError(f"start {settings.start!r}: holds no words for the context")
        shared = tower.vectors(torch.tensor(words))
        return shared.repeat(n_classes, 1, 1) if settings.class_specific else shared
    like = tower.vectors(torch.zeros(1, dtype=torch.int64))
    shape = (settings.n_ctx, like.shape[1])
    if settings.class_specific:
        shape = (n_classes, *shape)  # type: ignore[assignment]
    draw = torch.Generator().manual_seed(seed)
    return (SPREAD * torch.randn(shape, generator=draw)).to(like)


@torch.no_grad()
def nearest_words(tower: TextTower, context: torch.Tensor) -> list[str]:
    """
    For each vector of a context (..., width) the word whose embedding is nearest, flat.

    Euclidean distance over the tower's vocabulary without its special tokens, as Zhou et al. 2022
    (section 4.4) read their contexts.
    """
    special = set(_Frame(tower).empty)
    ids = torch.tensor([k for k in range(tower.vocabulary_size) if k not in special])
    vectors = context.detach().reshape(-1, context.shape[-1]).to(tower.device)
    nearest = torch.full((len(vectors),), torch.inf, device=tower.device, dtype=vectors.dtype)
    found = torch.zeros(len(vectors), dtype=torch.int64, device=tower.device)
    for block in torch.split(ids, BLOCK):
        distances = torch.cdist(vectors, tower.vectors(block).to(vectors.dtype))
        least, place = distances.min(1)
        found = torch.where(least < nearest, block.to(tower.device)[place], found)
        nearest = torch.minimum(nearest, least)
    return [_word(tower, int(k)) for k in found]


def _word(tower: TextTower, token: int) -> str:
    tokenizer = tower.backbone.tokenizer
    decode = getattr(tokenizer, "decode", None) or tokenizer.tokenizer.decode  # type: ignore[attr-defined]
    return str(decode([token])).strip()


class _Frame:
    """What a tokenizer puts before and behind a text, read off the empty one."""

    def __init__(self, tower: TextTower) -> None:
        self._tower = tower
        self.empty: list[int] = tower.tokenize([""])[0].tolist()
        word: list[int] = tower.tokenize([PLACEHOLDER])[0].tolist()
        same = [a == b for a, b in zip(self.empty, word, strict=True)]
        self.head = self.empty[: same.index(False)]
        self._behind = self.empty[len(self.head) :]
        padding = self.empty[-1]
        marks = sum(token != padding for token in self._behind)
        self._tail = max(marks, 1)  # of padding there is one that ends the text, where it does that
        self.room = len(self._behind) - self._tail

    def contents(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text alone; a text that is too long is cut."""
        first = len(self.head)
        found = []
        for row in self._tower.tokenize(list(texts)).tolist():
            body = row[first:]
            behind = self._behind
            length = next(m for m in range(len(body) + 1) if body[m:] == behind[: len(body) - m])
            found.append(body[:length])
        return found

    def filled(self, content: list[int], longest: int) -> list[int]:
        """The row of a text's tokens, as long as the tower needs where the longest is that long."""
        row = [*self.head, *content, *self._behind]
        needed = len(self.head) + longest + self._tail
        return row[: needed if self._tower.shortens else len(self.empty)]
