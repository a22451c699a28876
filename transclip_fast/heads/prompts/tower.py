"""A frozen text tower that reads prompts some of whose tokens are vectors instead of words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from transclip_fast.encode.models import Backbone

# Of activations that wait for the backward pass: with more, they are computed again, in chunks.
ACTIVATION_BYTES = 1 << 30
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}
ENDS = ("argmax", "eos")  # poolings of the end token, which nothing behind it reaches


@dataclass(frozen=True)
class Prompts:
    """
    Token ids of R prompts, and where in them the context goes.

    Parameters
    ----------
    tokens : Tensor (R, L) int64
        With any ordinary token at the places of the context.
    places : Tensor (R, n_ctx) int64
        Columns, in the order of the context's vectors.
    """

    tokens: torch.Tensor
    places: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, which: torch.Tensor | slice) -> Prompts:
        """Some of the prompts, or some of them several times."""
        return Prompts(self.tokens[which], self.places[which])


class TextTower:
    """
    The text tower of a backbone, frozen.

    The tower runs as it is, masks, pooling and projection included: what its token embedding gives
    at the places of the context is replaced on the way.

    Parameters
    ----------
    backbone : Backbone
        Any with open_clip's towers: its own transformers, with or without class embedding, and
        those of transformers. Its parameters no longer take gradients.
    precision : str, optional
        "fp32", or "bf16" for matrix products in bfloat16; "bf16" on CUDA where not given.
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
        self.embedding: torch.nn.Module = (
            self._text.transformer.get_input_embeddings()
            if self._huggingface
            else self._text.token_embedding
        )
        self._encoder = _Encoder(model)
        self._row_bytes: dict[int, int] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """What the prototypes depend on, beside the prompts."""
        return {**self.backbone.identity, "autocast": self.precision}

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        """Token ids (len(texts), context length) int64 as the tower's own tokenizer gives them."""
        return self.backbone.tokenizer(texts)

    @torch.no_grad()
    def vectors(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the token embedding gives for ids (...): (..., width), float32 or float64."""
        found: torch.Tensor = self.embedding(tokens.to(self.device))
        return found if found.dtype == torch.float64 else found.float()

    @property
    def vocabulary_size(self) -> int:
        """Tokens that the embedding knows."""
        return int(self.embedding.num_embeddings)  # type: ignore[arg-type]

    @cached_property
    def prompt_size(self) -> int:
        """Numbers between two layers of the tower for one prompt."""
        tokens = self.tokenize([""])
        return tokens.shape[1] * self.vectors(tokens[0, :1]).shape[1]

    @property
    def shortens(self) -> bool:
        """
        Whether prompts may be cut behind their ends.

        True where nothing there reaches the embedding: behind a causal mask, or one of padding.
        """
        text = self._text
        if self._huggingface:
            return True
        causal = text.attn_mask is not None and getattr(text, "cls_emb", None) is None
        pooling = text.text_pool_type if hasattr(text, "text_pool_type") else text.pool_type
        return causal and pooling in ENDS

    def encode(self, prompts: Prompts, context: torch.Tensor) -> torch.Tensor:
        """
        Unit embeddings (R, d) of prompts, with gradients to the context.

        Prompts whose activations take more than `ACTIVATION_BYTES` are encoded in chunks, which the
        backward pass encodes again, one at a time.

        Parameters
        ----------
        prompts : Prompts
        context : Tensor (n_ctx, width) or (R, n_ctx, width)
            The same for all prompts, or of each.
        """
        size = self.chunk(prompts.tokens.shape[1])
        again = len(prompts) > size and torch.is_grad_enabled() and context.requires_grad
        embedded = []
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            some = prompts.rows(part)
            vectors = context if context.ndim == 2 else context[part]
            if again:
                embedded.append(
                    checkpoint(self._embed, some.tokens, some.places, vectors, use_reentrant=False)
                )
            else:
                embedded.append(self._embed(some.tokens, some.places, vectors))
        return F.normalize(torch.cat(embedded).to(context.dtype), dim=1)

    def chunk(self, length: int) -> int:
        """Prompts of that many tokens whose activations take `ACTIVATION_BYTES`."""
        if length not in self._row_bytes:
            one, three = (self._saved_bytes(rows, length) for rows in (1, 3))
            self._row_bytes[length] = max(three - one, 2) // 2
        return max(1, ACTIVATION_BYTES // self._row_bytes[length])

    def _saved_bytes(self, rows: int, length: int) -> int:
        """Bytes that the backward pass of some prompts would need, weights included."""
        tokens = torch.ones(rows, length, dtype=torch.int64, device=self.device)
        places = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
        vectors = self.vectors(tokens[0, :1]).requires_grad_()
        saved: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
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
        """The token embedding gives these vectors at those places."""
        rows = torch.arange(len(places), device=places.device)[:, None]

        def replace(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return output.index_put((rows, places), vectors.to(output.dtype))

        hook = self.embedding.register_forward_hook(replace)
        try:
            yield
        finally:
            hook.remove()

    def _cut(self, length: int) -> dict[str, torch.Tensor]:
        """The tower's tensors over positions, as shortened prompts need them."""
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
