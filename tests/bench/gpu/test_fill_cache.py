"""A cache that is filled without a GPU: what is in it, and how it is found."""

import importlib
import os
import pkgutil
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from bench.gpu import fill_cache
from transclip_fast import kernels

# Names of the kernels that are compiled for class sums, where arrays are on DEVICE.
SUMS = """
import torch
from bench.gpu.fill_cache import compile_kernels
from transclip_fast.kernels.class_sums import class_sums
from transclip_fast.types import Assignments, Truncation

def launch():
    z = Assignments.empty(40, 7, Truncation(4, 4), torch.device("DEVICE"))
    class_sums(z, torch.zeros(40, 16, device="DEVICE"))

compile_kernels(launch, ARCH, print)
"""


def compiled(folder, device, arch):
    """The kernels that a process compiles, where the cache is the folder "cache" of `folder`."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TRITON_CACHE_DIR": "cache",
        "TRITON_STORE_BINARY_ONLY": "1",
    }
    program = SUMS.replace("DEVICE", device).replace("ARCH", str(arch))
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.split()


def test_a_launch_finds_what_was_compiled_without_memory(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    both = ["piece_kernel", "total_kernel"]
    assert compiled(here, "meta", 90) == both
    here.rename(there)
    assert compiled(there, "cpu", 90) == []
    assert compiled(there, "cpu", 80) == both
    assert len(list(there.rglob("*.cubin"))) == 4
    assert not list(there.rglob("*.ptx"))


def test_every_kernel_is_launched(monkeypatch):
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    names = set()
    monkeypatch.setattr(driver, "set_active", lambda _: None)
    monkeypatch.setattr(JITFunction, "run", lambda self, *_, **__: names.add(self.fn.__name__))
    fill_cache.compile_kernels(fill_cache.launch_all, 90, print)
    modules = (
        importlib.import_module(f"transclip_fast.kernels.{module.name}")
        for module in pkgutil.iter_modules(kernels.__path__)
    )
    known = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert names == known
