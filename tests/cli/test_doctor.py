"""`doctor`: what is fine here, and the known conflicts."""

from __future__ import annotations

import importlib
import json
from types import ModuleType, SimpleNamespace

import pytest
import torch

from transclip_fast.cli import doctor


def test_fine_here(succeeds):
    summary = json.loads(succeeds("doctor", "--json"))
    assert all(finding["ok"] for finding in summary["findings"])
    subjects = {finding["subject"] for finding in summary["findings"]}
    assert subjects == {"torch", "faiss", "numba", "torchvision", "open_clip"}
    assert summary["versions"].keys() >= {"python", "transclip_fast", "torch", "numpy"}
    text = succeeds("doctor")
    assert "PROBLEM" not in text
    assert torch.__version__.split("+")[0] in text


@pytest.fixture
def distributions(monkeypatch):
    """Pretend that these distributions are installed."""

    def install(*names):
        found = [SimpleNamespace(metadata={"Name": name}) for name in names]
        monkeypatch.setattr("importlib.metadata.distributions", lambda: found)

    return install


def test_two_faiss(distributions, cli):
    distributions("faiss-cpu", "faiss-gpu", "numpy")
    ran = cli("doctor", "--json")
    findings = {f["subject"]: f for f in json.loads(ran.out)["findings"]}
    assert ran.code == 1
    assert not findings["faiss"]["ok"]
    assert "faiss-cpu and faiss-gpu" in findings["faiss"]["message"]
    assert "uninstall" in findings["faiss"]["message"]
    assert [f for f in findings.values() if not f["ok"]] == [findings["faiss"]]


def test_no_faiss(distributions):
    distributions("numpy")
    finding = doctor.check_faiss()
    assert finding.ok
    assert "not installed" in finding.message


@pytest.mark.parametrize(("cuda", "expected"), [(None, "has no CUDA"), ("13.0", "finds no device")])
def test_a_driver_that_torch_does_not_use(cuda, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    (tmp_path / "version").touch()
    finding = doctor.check_torch(tmp_path / "version")
    assert not finding.ok
    assert expected in finding.message
    assert doctor.check_torch(tmp_path / "none").ok


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operator torchvision::nms does not exist\nmore"),
        ImportError(),
        OSError("libcudart.so"),
        ValueError("numpy.dtype size changed, may indicate binary incompatibility"),
        SystemError("initialization of _internal failed without raising an exception"),
        AttributeError("module 'torch.library' has no attribute 'register_fake'"),
    ],
)
@pytest.mark.parametrize("module", ["torchvision", "faiss", "open_clip"])
def test_imports_that_fail(module, error, distributions, cli, monkeypatch):
    import_module = importlib.import_module

    def fail(name, *args):
        if name == module:
            raise error
        return import_module(name, *args)

    distributions("faiss-cpu")
    monkeypatch.setattr(importlib, "import_module", fail)
    ran = cli("doctor")
    line = next(line for line in ran.out.splitlines() if line.startswith(f"PROBLEM  {module}: "))
    assert ran.code == 1
    assert (str(error).split("\n")[0] or "ImportError") in line
    assert "reinstall" in line


def test_the_distribution_that_is_here_is_repaired(distributions, monkeypatch):
    def fail(name):
        raise ImportError("libcublas.so.12")

    distributions("faiss-gpu")
    monkeypatch.setattr(importlib, "import_module", fail)
    finding = doctor.check_faiss()
    assert not finding.ok
    assert finding.message.endswith("pip install --force-reinstall --no-deps faiss-gpu")


def test_what_is_left_of_two_faiss(distributions, monkeypatch):
    distributions("faiss-cpu")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.12")
    monkeypatch.setattr(importlib, "import_module", ModuleType)
    finding = doctor.check_faiss()
    assert not finding.ok
    assert "uninstall all, install one" in finding.message
