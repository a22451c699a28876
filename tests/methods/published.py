"""
The published code of methods, imported from checkouts and called as it is, never copied.

TRANSCLIP_PUBLISHED names a folder of checkouts by the names of their repositories:
transduction-for-vlms and StatA (MaxZanella), transductive-CLIP (SegoleneMartin), ZLaP
(vladan-stojnic) and ECALP (Yushu-Li).
"""

from __future__ import annotations

import importlib
import os
import sys
import types
import warnings
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

VARIABLE = "TRANSCLIP_PUBLISHED"
OWN = ("baselines", "solvers", "src", "utils")  # names that modules of several checkouts have


def checkout(repository):
    """The folder of a repository, or None."""
    folder = os.environ.get(VARIABLE)
    path = None if not folder else Path(folder) / repository
    return path if path is not None and path.is_dir() else None


@contextmanager
def imported(repository, name, stubs=()):
    """A module of a checkout, with stand-ins for modules it imports; `.cuda()` does nothing."""
    before = set(sys.modules)
    for stub, entries in dict(stubs).items():
        if stub not in before:
            sys.modules[stub] = types.SimpleNamespace(**entries)
    with (
        mock.patch.object(sys, "path", [str(checkout(repository)), *sys.path]),
        mock.patch.object(torch.Tensor, "cuda", lambda self, *_, **__: self),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            yield importlib.import_module(name)
        finally:
            for module in sys.modules.keys() - before:
                if module in dict(stubs) or module.split(".")[0] in OWN:
                    del sys.modules[module]
