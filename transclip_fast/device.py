"""The device of a computation, and true float32 on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from transclip_fast.errors import InputError

MAX_INT8_DIM = 1 << 17  # of a row: so many products of two int8 fit in an int32


def resolve_device(name: str) -> torch.device:
    """
    The device of that name; "auto" is CUDA if there is a GPU, else the CPU.

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


def multiplies_bytes(dim: int) -> bool:
    """
    Whether torch multiplies rows of `dim` bytes several times faster than float32 on this CPU.

    That needs oneDNN and a CPU with AVX512-VNNI; oneDNN does not take rows of a single byte.
    """
    onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled  # type: ignore[no-untyped-call]
    vnni = torch.cpu.get_capabilities().get("avx512_vnni", False)
    return bool(onednn and vnni and 1 < dim <= MAX_INT8_DIM)


@contextmanager
def exact_float32() -> Iterator[None]:
    """
    Matrix products in true float32 (no tf32, no bf16), no autocast, no gradients, no inference
    tensors.
    """
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # it disagrees with `fp32_precision`, which the user has set
        legacy = "highest"
    torch.set_float32_matmul_precision("highest")  # `fp32_precision`, too
    try:
        # Inference mode belongs to a thread: no other one could write to tensors made in it.
        with (
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(legacy)
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


@contextmanager
def current_device(device: torch.device) -> Iterator[None]:
    """Make a GPU the current one: Triton launches kernels there, wherever their operands are."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        yield
