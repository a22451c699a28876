"""The device of a computation, and true float32 on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import Lock

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
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        # No CUDA, no such device, or no name of one.
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


class _TrueProducts:
    """
    True float32 matrix products, a setting that all threads of the process share.

    The first thread in saves what the user has set, and the last one out restores it.
    """

    def __init__(self) -> None:
        self._lock, self._inside = Lock(), 0
        self._settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = [setting.fp32_precision for setting in self._settings]
                try:
                    self._legacy = torch.get_float32_matmul_precision()
                except RuntimeError:  # it disagrees with `fp32_precision`, which the user has set
                    self._legacy = "highest"
            self._inside += 1
            torch.set_float32_matmul_precision("highest")  # `fp32_precision`, too

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside:
                return
            torch.set_float32_matmul_precision(self._legacy)
            for setting, precision in zip(self._settings, self._before, strict=True):
                setting.fp32_precision = precision


_true_products = _TrueProducts()


@contextmanager
def exact_float32() -> Iterator[None]:
    """
    Matrix products in true float32 (no tf32, no bf16), no autocast, no gradients, no inference
    tensors.
    """
    _true_products.enter()
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
        _true_products.leave()


@contextmanager
def current_device(device: torch.device) -> Iterator[None]:
    """Make a GPU the current one: Triton launches kernels there, wherever their operands are."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        yield
