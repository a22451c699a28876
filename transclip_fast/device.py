"""Where the arithmetic runs, and what float32 means there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from transclip_fast.errors import InputError


def resolve_device(name: str) -> torch.device:
    """
    The device of a name; "auto" is CUDA where there is one.

    Raises
    ------
    InputError
        No such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # no CUDA, no such device
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used: {reason}") from error
    return device


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; on the CPU, what is used for nothing at all."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def exact_float32() -> Iterator[None]:
    """Matrix products in true float32 (no tf32, no bf16) and without gradients."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(before)
