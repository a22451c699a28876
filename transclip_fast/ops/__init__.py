"""The solver's operations on all N rows, and the choice of their backend."""

from __future__ import annotations

import importlib
import os
import warnings
from typing import TYPE_CHECKING

import torch

from transclip_fast.errors import InputError, user_level

if TYPE_CHECKING:
    from transclip_fast.ops.torch_backend import TorchOps
    from transclip_fast.types import Truncation

__all__ = ["BACKENDS", "backend_class", "choose_backend"]

BACKENDS = ("auto", "torch", "triton", "numba")


def choose_backend(name: str, device: torch.device, truncation: Truncation | None) -> str:
    """
    The backend of a run, from one of `BACKENDS`. "auto" is torch for dense assignments, for which
    `truncation` is None; for sparse ones triton on a GPU and numba on a CPU, if installed.

    Raises
    ------
    InputError
        A backend that is not installed, or does not run on the device or with dense assignments.
    """
    wanted = name
    if name == "auto":
        sparse = {"cuda": "triton", "cpu": "numba"}.get(device.type, "torch")
        wanted = "torch" if truncation is None else sparse
    if wanted == "numba" and device.type != "cpu":
        raise InputError(f"backend={name!r} runs on a CPU only, not on {device}")
    if wanted == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError(
            f"backend={name!r} runs on a GPU, not on {device}; choose backend='torch', or set "
            "TRITON_INTERPRET=1 for a very slow trial"
        )
    if wanted == "torch":
        return wanted
    if truncation is None:
        raise InputError(f"backend={name!r} has no dense assignments; choose backend='torch'")
    try:
        importlib.import_module(wanted)
    except ImportError as error:
        if name == wanted:
            raise InputError(f"backend={name!r}: {error}; pip install {name}") from error
        message = f"computed in torch, slower: {error}; pip install {wanted}"
        warnings.warn(message, stacklevel=user_level())
        return "torch"
    return wanted


def backend_class(name: str) -> type[TorchOps]:
    """The operations of a backend that `choose_backend` returned; imports it."""
    module = importlib.import_module(f"transclip_fast.ops.{name}_backend")
    operations: type[TorchOps] = getattr(module, f"{name.capitalize()}Ops")
    return operations
