"""The demo's CLIP: open_clip's classes with the demo's weights and vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from open_clip import image_transform
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import load_file

from transclip_fast.demo.data import FOLDER
from transclip_fast.encode.architectures import DEMO
from transclip_fast.encode.models import Backbone
from transclip_fast.errors import InputError
from transclip_fast.store.arrays import file_sha256
from transclip_fast.store.atomic import read_json

CONFIG = "model.json"
WEIGHTS = "weights.safetensors"
VOCABULARY = "vocabulary.json"


class TrimmedTokenizer:
    """
    open_clip's tokenizer, restricted to the token ids of the model's vocabulary.

    Parameters
    ----------
    ids : sequence of int
        Ids of open_clip's vocabulary, ascending, because the largest id marks the end of a text.
        Their positions are the new ids.
    context_length : int
        Number of tokens to which texts are padded or cut.
    """

    def __init__(self, ids: Sequence[int], context_length: int) -> None:
        self._tokenizer = SimpleTokenizer(context_length=context_length)
        self._ids = list(ids)
        self._new_ids = {old: new for new, old in enumerate(ids)}
        self.context_length = context_length
        self.vocab_size = len(ids)

    def __call__(
        self, texts: str | Sequence[str], context_length: int | None = None
    ) -> torch.Tensor:
        """
        Return token ids (len(texts), context_length) int64; by default in the model's length.

        Raises
        ------
        InputError
            A text has a word outside the vocabulary.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows = self._tokenizer(texts, context_length).tolist()
        for text, row in zip(texts, rows, strict=True):
            unknown = [token for token in row if token not in self._new_ids]
            if unknown:
                raise InputError(
                    f"text {text!r}: the demo's model does not know "
                    f"{self._tokenizer.decode(unknown).strip()!r}; it reads digits only, "
                    "give --model and --pretrained for anything else"
                )
        return torch.tensor([[self._new_ids[token] for token in row] for row in rows])

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids."""
        text: str = self._tokenizer.decode([self._ids[token] for token in tokens])
        return text


def build(config: dict[str, Any]) -> CLIP:
    """Return an open_clip CLIP with random weights from the content of a `model.json`."""
    return CLIP(config["embed_dim"], dict(config["vision_cfg"]), dict(config["text_cfg"]))


def make_preprocess(config: dict[str, Any]) -> Callable[[Image.Image], torch.Tensor]:
    """Return open_clip's preprocessing of a PIL image to (3, size, size) for a `model.json`."""
    transform: Callable[[Image.Image], torch.Tensor] = image_transform(
        config["vision_cfg"]["image_size"], is_train=False
    )
    return transform


def backbone(folder: str | Path = FOLDER, device: str | torch.device = "cpu") -> Backbone:
    """
    Return the demo's CLIP. Nothing is downloaded.

    Parameters
    ----------
    folder : path
        Output of `python -m bench.demo.train`; by default the shipped files.
    device : str or torch.device

    >>> backbone().tokenizer("nine").shape
    torch.Size([1, 16])
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    ids = read_json(folder / VOCABULARY)["ids"]
    model = build(config)
    # The file is in float16; copying into the model converts to float32.
    model.load_state_dict(load_file(folder / WEIGHTS))
    tokenizer = TrimmedTokenizer(ids, config["text_cfg"]["context_length"])
    identity = {"model": DEMO, "weights": file_sha256(folder / WEIGHTS), "preprocessing": config}
    return Backbone(model.float().eval().to(device), make_preprocess(config), tokenizer, identity)
