"""The published TransCLIP code, imported from a checkout and called as it is.

The checkout (repository MaxZanella/transduction-for-vlms) is named by the environment variable
TRANSCLIP_OFFICIAL. Its licence is AGPL: it is imported here and never copied.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch

VARIABLE = "TRANSCLIP_OFFICIAL"
PACKAGE = "TransCLIP_solver"


def available() -> bool:
    """Return whether the environment names a checkout."""
    return bool(os.environ.get(VARIABLE))


def _modules() -> tuple[ModuleType, ModuleType]:
    """Import the checkout's solver and its helpers."""
    folder = os.environ.get(VARIABLE)
    if not folder or not os.path.isdir(os.path.join(folder, PACKAGE)):
        raise FileNotFoundError(f"{VARIABLE}={folder!r} names no folder that holds {PACKAGE}")
    # First on the path only for the import: the checkout's root also has a `utils` and a `clip`.
    with mock.patch.object(sys, "path", [folder, *sys.path]):
        solver = importlib.import_module(f"{PACKAGE}.TransCLIP")
        helpers = importlib.import_module(f"{PACKAGE}.TransCLIP_utils")
    return solver, helpers


@contextmanager
def published_solver(*, on_cpu: bool) -> Iterator[ModuleType]:
    """Yield the published solver's module, patched to run here, and undo that afterwards.

    Its accuracies are replaced by zero, because they fail on NumPy 2. With `on_cpu` its calls of
    `.cuda()` do nothing.
    """
    solver, helpers = _modules()

    def identity(self: Any, *_: Any, **__: Any) -> Any:
        return self

    def no_accuracy(*_: Any, **__: Any) -> float:
        return 0.0

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for module in (solver, helpers):
            stack.enter_context(mock.patch.object(module, "cls_acc", no_accuracy))
        for owner in (torch.Tensor, torch.nn.Module) if on_cpu else ():
            stack.enter_context(mock.patch.object(owner, "cuda", identity))
        yield solver


def zero_shot(
    features: torch.Tensor, prototypes: torch.Tensor
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return z (N, K) of the published zero-shot method, and the seconds of its stages.

    Features (N, d) and prototypes (K, d) are unit rows, on the device to use; N >= 8 and N >= K.
    Its dense similarities and neighbours are stage "knn", all the rest is "solve".
    """
    n, k = len(features), len(prototypes)
    if n < max(8, k):
        raise ValueError(f"the published code needs at least 8 queries and one a class, not {n}")
    # It counts K from the labels and uses them for accuracies only.
    labels = torch.arange(n, device=features.device) % k
    graph_seconds = 0.0
    with published_solver(on_cpu=features.device.type == "cpu") as module:
        build = module.build_affinity_matrix

        def timed(*arguments: Any) -> Any:
            nonlocal graph_seconds
            start = time.perf_counter()
            graph = build(*arguments)
            graph_seconds = time.perf_counter() - start
            return graph

        with mock.patch.object(module, "build_affinity_matrix", timed), torch.no_grad():
            start = time.perf_counter()
            z, _ = module.TransCLIP_solver(
                None, None, None, None, features, labels, prototypes.T, verbose=False
            )
            seconds = time.perf_counter() - start
    return z, {"knn": graph_seconds, "solve": seconds - graph_seconds}
