"""Backbones: open_clip models by name, with weights by tag, from a file, or random."""

from __future__ import annotations

import difflib
import functools
import hashlib
import logging
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from transclip_fast.errors import InputError
from transclip_fast.store.arrays import DAMAGE

NONE = "none"  # pretrained: random weights, always the same


@dataclass
class Backbone:
    """
    An image tower and a text tower, ready to encode.

    Parameters
    ----------
    model : Module
        With `encode_image` (B, 3, H, W) -> (B, d) and `encode_text` (B, L) -> (B, d).
    preprocess : callable
        PIL image to tensor (3, H, W) float32.
    tokenizer : callable
        List of strings to token ids (B, L) int64.
    identity : dict
        What decides the features, for the manifest: model, pretrained, preprocessing.
    """

    model: Any
    preprocess: Callable[[Any], torch.Tensor]
    tokenizer: Callable[[Sequence[str]], torch.Tensor]
    identity: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @functools.cached_property
    def dim(self) -> int:
        """d, the length of an embedding."""
        with torch.inference_mode():
            return int(self.model.encode_text(self.tokenizer(["a"]).to(self.device)).shape[1])


def load_backbone(model: str, pretrained: str, device: torch.device) -> Backbone:
    """
    An open_clip model in float32, in evaluation mode.

    Parameters
    ----------
    model : str
        A name that open_clip knows, e.g. "ViT-B-32".
    pretrained : str
        A tag that open_clip knows for it, a checkpoint file, or "none": random weights from a
        fixed seed.

    Raises
    ------
    InputError
        Unknown model or tag (with the nearest names), or a checkpoint that does not load.
    """
    import open_clip

    identity = identify(model, pretrained)
    try:
        try:
            with _hub_cache_only():
                net, preprocess, tokenizer = _create(model, pretrained, identity, device)
        except (OSError, ValueError, RuntimeError):
            # Not in the cache, and if it is anything else it fails again.
            net, preprocess, tokenizer = _create(model, pretrained, identity, device)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"model {model}, pretrained {pretrained}: does not load (damaged, or holds pickled "
            "Python objects, which are never loaded; save its state_dict alone)"
        ) from error
    except (*DAMAGE, ImportError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"model {model}, pretrained {pretrained}: does not load ({reason})"
        ) from error
    net.eval()
    identity["preprocessing"] = open_clip.get_model_preprocess_cfg(net)
    return Backbone(net, preprocess, tokenizer, identity)


def _create(
    model: str, pretrained: str, identity: dict[str, Any], device: torch.device
) -> tuple[Any, Any, Any]:
    """Network, preprocessing and tokenizer as open_clip makes them."""
    import open_clip

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        torch.manual_seed(0)
        net, _, preprocess = open_clip.create_model_and_transforms(
            model,
            pretrained=None if identity["weights"] == NONE else pretrained,
            device=device,
            precision="fp32",
            # Weights trained with QuickGELU load into any network, and are wrong in most.
            force_quick_gelu=identity["quick_gelu"],
        )
    return net, preprocess, open_clip.get_tokenizer(model)


@contextmanager
def _hub_cache_only() -> Iterator[None]:
    """Files of the model hub from its cache alone: it is not asked whether they are current."""
    from huggingface_hub import constants

    before, level = constants.HF_HUB_OFFLINE, logging.root.manager.disable
    constants.HF_HUB_OFFLINE = True
    logging.disable()  # of random weights, and of files that a second attempt will download
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        logging.disable(level)


def identify(model: str, pretrained: str) -> dict[str, Any]:
    """
    What a backbone is known by before it is loaded: model, weights by tag or by file hash.

    A checkpoint file does not say whether it wants QuickGELU: the model's name decides
    ("ViT-B-32-quickgelu").

    Raises
    ------
    InputError
        Unknown model or tag (with the nearest names), or no such file.
    """
    import open_clip

    if model not in open_clip.list_models():
        raise _unknown(model, open_clip.list_models(), "model")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained == NONE or pretrained in tags:
        known = open_clip.get_pretrained_cfg(model, pretrained)
        quick_gelu = bool(known.get("quick_gelu", False))
        return {"model": model, "weights": pretrained, "quick_gelu": quick_gelu}
    if os.path.isfile(pretrained):
        return {"model": model, "weights": file_sha256(pretrained), "quick_gelu": False}
    if Path(pretrained).suffix or "/" in pretrained:
        raise InputError(f"{pretrained}: no such file")
    raise _unknown(pretrained, [*tags, NONE], f"weights for {model}")


def _unknown(name: str, names: Sequence[str], what: str) -> InputError:
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.4)
    return InputError(f"unknown {what} {name!r}; nearest: {', '.join(near) or 'none'}")


def file_sha256(path: str | Path) -> str:
    """Hash of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
