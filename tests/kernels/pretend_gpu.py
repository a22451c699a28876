"""A GPU that is not here: tensors that lie on the CPU, say "cuda", and mix with no others."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU, CPU = torch.device("cuda"), torch.device("cpu")
MOVES = ("to", "cpu", "copy_", "type_as")
STREAMS = ("Stream", "Event", "stream", "current_stream")  # all work is done at once
INDEXES = ("__getitem__", "__setitem__", "index_put_")


class OnGpu(torch.Tensor):
    """A tensor of the GPU."""


class PretendGpu(TorchFunctionMode):
    """
    Torch with a GPU: what a real one refuses raises, and what is on it stays there.

    Operands on both devices, and NumPy's view of a tensor there. A scalar may come from the CPU.
    """

    def __torch_function__(self, function, types, arguments=(), named=None):
        named, name = dict(named or {}), function.__name__
        if function is torch.device:
            return function(*arguments, **named)
        if name in ("__get__", "__set__", "__delete__"):
            name = function.__self__.__name__
        operands = [x for x in tree_leaves((arguments, named)) if isinstance(x, torch.Tensor)]
        here = any(isinstance(x, OnGpu) for x in operands)
        if name == "device":
            return GPU if here else CPU
        if name == "is_cuda":
            return here
        if here and name in ("numpy", "__array__"):
            raise TypeError("a tensor of the GPU has no array")
        if name == "to":
            arguments = tuple(torch.device(x) if isinstance(x, str) else x for x in arguments)
        wanted, arguments, named = _without_devices(arguments, named)
        if name == "cpu":
            wanted = CPU
        if _mixed(name, arguments, operands):
            raise RuntimeError(f"{name}: operands on cuda and cpu")
        if named.pop("out_dtype", None) is not None:  # of torch.mm, which a CPU does not have
            arguments = [x.float() for x in arguments]
        if name == "copy_":
            here = isinstance(arguments[0], OnGpu)
        target = wanted or (GPU if here else CPU)
        moved = name in MOVES and wanted is not None and here != (wanted.type == "cuda")
        with torch._C.DisableTorchFunctionSubclass():
            found = function(*arguments, **named)
            if moved:
                found = found.clone()
        return tree_map(lambda x: _placed(x, target), found)


def _mixed(name, arguments, operands):
    """Whether a GPU refuses these operands."""
    if name in MOVES:
        return False
    if name in INDEXES:
        whole, indices = arguments[0], tree_leaves(arguments[1])
        indices = [x for x in indices if isinstance(x, torch.Tensor)]
        if not isinstance(whole, OnGpu):
            return any(isinstance(x, OnGpu) for x in indices)
        # Indices may be on the CPU, and so may what is copied to a slice.
        operands = [whole, *arguments[2:3]] if indices else [whole]
    operands = [x for x in operands if isinstance(x, torch.Tensor)]
    return len({isinstance(x, OnGpu) for x in operands if x.dim() or isinstance(x, OnGpu)}) > 1


def _without_devices(arguments, named):
    """The device that a call names, and its arguments with the CPU in its place."""
    named.pop("pin_memory", None)
    wanted = named.get("device")
    for x in arguments:
        if isinstance(x, torch.device):
            wanted = x
    if wanted is None:
        return None, arguments, named
    arguments = tuple(CPU if isinstance(x, torch.device) else x for x in arguments)
    if "device" in named:
        named["device"] = CPU
    return torch.device(wanted), arguments, named


def _placed(x, device):
    if not isinstance(x, torch.Tensor):
        return x
    return x.as_subclass(OnGpu if device.type == "cuda" else torch.Tensor)


@contextmanager
def pretend_gpu():
    """Let torch have a GPU, on which Triton's interpreter runs kernels."""
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def on_gpu(self, *arguments, grid, warmup, **named):
        operands = [x for x in (*arguments, *named.values()) if isinstance(x, torch.Tensor)]
        if not all(isinstance(x, OnGpu) for x in operands):
            raise ValueError(f"{self.__name__}: a pointer to the CPU")
        with torch._C.DisableTorchFunction():
            plain = [x.as_subclass(torch.Tensor) if isinstance(x, OnGpu) else x for x in arguments]
            return run(self, *plain, grid=grid, warmup=warmup, **named)

    with (
        mock.patch.object(InterpretedFunction, "run", on_gpu),
        mock.patch.object(torch.cuda, "device", nullcontext),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.multiple(torch.cuda, **dict.fromkeys(STREAMS, mock.MagicMock())),
        mock.patch.object(torch.Tensor, "record_stream"),
        PretendGpu(),
    ):
        yield
