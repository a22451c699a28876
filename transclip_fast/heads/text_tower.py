"""A frozen text tower that encodes prompts in which vectors replace some tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from transclip_fast.encode.models import Backbone

# Activations stored for the backward pass; with more, prompts are encoded again, in chunks.
ACTIVATION_BYTES = 1 << 30
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}
END_POOLINGS = ("argmax", "eos")  # the embedding is that of the end-of-text token


@dataclass(frozen=True)
class Prompts:
    """Token ids of R prompts, and the columns of their context."""

    tokens: torch.Tensor  # (R, L) int64; any ordinary token stands in for the context
    places: torch.Tensor  # (R, n_ctx) int64, columns in the order of the context's vectors

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, which: torch.Tensor | slice) -> Prompts:
        """The chosen prompts, which may repeat."""
        return Prompts(self.tokens[which], self.places[which])


class TextTower:
    """
    The text tower of a backbone, frozen.

    The tower runs unchanged, with its masks, pooling and projection; a hook replaces the token
    embeddings at the places of the context.

    Parameters
    ----------
    backbone : Backbone
        With a text tower of open_clip, its own or one from transformers. Its parameters are frozen.
    precision : str, optional
        "fp32", or "bf16" for matrix products in bfloat16; by default "bf16" on CUDA, else "fp32".
    """

    def __init__(self, backbone: Backbone, precision: str | None = None) -> None:
        self.backbone = backbone
        model: Any = backbone.model
        model.requires_grad_(False).eval()
        self.device = backbone.device
        self.precision = precision or ("bf16" if self.device.type == "cuda" else "fp32")
        # open_clip's CLIP is its own text tower; its other models have one.
        self._name, self._text = (
            ("model.text", model.text) if hasattr(model, "text") else ("model", model)
        )
        self._huggingface = hasattr(self._text, "pooler")
        self.embedding: torch.nn.Embedding = (
            self._text.transformer.get_input_embeddings()
            if self._huggingface
            else self._text.token_embedding
        )
        self._encoder = _Encoder(model)
        self._row_bytes: dict[int, int] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """Model, weights and precision, on which the embeddings depend."""
        return {**self.backbone.identity, "autocast": self.precision}

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        """Token ids (len(texts), context length) int64 of the tower's own tokenizer."""
        return self.backbone.tokenizer(texts)

    @torch.no_grad()
    def vectors(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token embeddings (..., width) of ids (...), float32 or float64."""
        found: torch.Tensor = self.embedding(tokens.to(self.device))
        return found if found.dtype == torch.float64 else found.float()

    @cached_property
    def prompt_size(self) -> int:
        """Activations between two layers of the tower for one prompt."""
        tokens = self.tokenize([""])
        return tokens.shape[1] * self.vectors(tokens[0, :1]).shape[1]

    @property
    def shortens(self) -> bool:
        """
        Whether prompts may be cut after their end-of-text token.

        True if tokens after it cannot influence it (causal or padding mask).
        """
        text = self._text
        if self._huggingface:
            return True
        causal = text.attn_mask is not None and getattr(text, "cls_emb", None) is None
        pooling = text.text_pool_type if hasattr(text, "text_pool_type") else text.pool_type
        return causal and pooling in END_POOLINGS

    def encode(self, prompts: Prompts, context: torch.Tensor) -> torch.Tensor:
        """
        Unit embeddings (R, d) of prompts, with gradients to the context.

        The context (n_ctx, width) is shared by all prompts; (R, n_ctx, width) has one for each. If
        the activations of all prompts take more than `ACTIVATION_BYTES`, they are encoded in
        chunks, and again chunk by chunk in the backward pass.
        """
        size = self.chunk(prompts.tokens.shape[1])
        again = len(prompts) > size and torch.is_grad_enabled() and context.requires_grad
        embed = partial(checkpoint, self._embed, use_reentrant=False) if again else self._embed
        embedded = []
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            some = prompts.rows(part)
            vectors = context if context.ndim == 2 else context[part]
            embedded.append(embed(some.tokens, some.places, vectors))
        return F.normalize(torch.cat(embedded).to(context.dtype), dim=1)

    def chunk(self, length: int) -> int:
        """Number of prompts of this length whose activations take `ACTIVATION_BYTES`."""
        if length not in self._row_bytes:
            one, three = (self._saved_bytes(rows, length) for rows in (1, 3))
            self._row_bytes[length] = max(three - one, 2) // 2
        return max(1, ACTIVATION_BYTES // self._row_bytes[length])

    def _saved_bytes(self, rows: int, length: int) -> int:
        """Bytes that are saved for the backward pass of so many prompts, weights included."""
        tokens = torch.ones(rows, length, dtype=torch.int64, device=self.device)
        places = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
        vectors = self.vectors(tokens[0, :1]).requires_grad_()
        saved: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            self._embed(tokens, places, vectors)
        return sum(saved.values())

    def _embed(
        self, tokens: torch.Tensor, places: torch.Tensor, vectors: torch.Tensor
    ) -> torch.Tensor:
        cast = AUTOCAST[self.precision]
        mixed = torch.autocast(self.device.type, cast) if cast else nullcontext()
        with mixed, self._replacing(places, vectors):
            embedded: torch.Tensor = functional_call(
                self._encoder, self._cut(tokens.shape[1]), (tokens,)
            )
        return embedded

    @contextmanager
    def _replacing(self, places: torch.Tensor, vectors: torch.Tensor) -> Iterator[None]:
        """The token embedding returns these vectors at these places."""
        rows = torch.arange(len(places), device=places.device)[:, None]

        def replace(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return output.index_put((rows, places), vectors.to(output.dtype))

        hook = self.embedding.register_forward_hook(replace)
        try:
            yield
        finally:
            hook.remove()

    def _cut(self, length: int) -> dict[str, torch.Tensor]:
        """The tower's positional tensors, cut to the length of shortened prompts."""
        text = self._text
        if self._huggingface or length == text.context_length:
            return {}
        return {
            f"{self._name}.positional_embedding": text.positional_embedding[:length],
            f"{self._name}.attn_mask": text.attn_mask[:length, :length],
        }


class _Encoder(torch.nn.Module):
    """`encode_text` as a module's forward."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.model.encode_text(tokens)
        return embedded
