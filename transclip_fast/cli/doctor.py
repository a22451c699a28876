"""`transclip-fast doctor`: what is installed here, and what about it will not work."""

from __future__ import annotations

import importlib
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import click

from transclip_fast.cli import common


@dataclass(frozen=True)
class Finding:
    """A subject, whether it is fine, and a line about it with the remedy."""

    subject: str
    ok: bool
    message: str


@click.command("doctor")
@common.json_option
def command(as_json: bool) -> None:
    """Check versions, devices and known conflicts; exit code 1 if something will not work.

    \b
    Example:
      transclip-fast doctor
    """
    findings = [check_torch(), check_faiss(), check_numba(), check_torchvision(), check_open_clip()]
    versions = common.versions()
    summary = {"versions": versions, "findings": [asdict(finding) for finding in findings]}
    lines = [f"{name} {version}" for name, version in versions.items()]
    lines += [""] + [
        f"{'ok     ' if finding.ok else 'PROBLEM'}  {finding.subject}: {finding.message}"
        for finding in findings
    ]
    common.summarise(summary, "\n".join(lines), as_json)
    if not all(finding.ok for finding in findings):
        sys.exit(1)


def check_torch(driver: Path = Path("/proc/driver/nvidia/version")) -> Finding:
    """CUDA devices, or why torch sees none; `driver` is where the NVIDIA driver shows itself."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("torch", True, f"CUDA {torch.version.cuda}: {', '.join(names)}")
    if driver.exists() and torch.version.cuda is None:
        message = (
            f"there is an NVIDIA driver, but torch {torch.__version__} has no CUDA; "
            "install torch from PyPI's default index"
        )
        return Finding("torch", False, message)
    if driver.exists():
        message = (
            f"there is an NVIDIA driver, but torch for CUDA {torch.version.cuda} finds no device; "
            "is the driver too old, or the device hidden by CUDA_VISIBLE_DEVICES?"
        )
        return Finding("torch", False, message)
    return Finding("torch", True, f"no GPU here, {torch.get_num_threads()} CPU threads")


def check_faiss() -> Finding:
    """FAISS: installed once, and importable."""
    names = sorted(
        {
            name
            for dist in metadata.distributions()
            if (name := (dist.metadata["Name"] or "").lower()).startswith("faiss")
        }
    )
    if not names:
        message = "not installed; only bench/speed/graph.py needs it"
        return Finding("faiss", True, message)
    if len(names) > 1:
        message = f"{' and '.join(names)} overwrite each other; uninstall all, install one"
        return Finding("faiss", False, message)
    return _importable("faiss", names[0])


def check_numba() -> Finding:
    """numba, which compiles the loops of sparse assignments on a CPU."""
    return _importable("numba", "numba")


def check_torchvision() -> Finding:
    """torchvision built for this torch: importing it fails otherwise."""
    return _importable("torchvision", "torchvision")


def check_open_clip() -> Finding:
    """open_clip, which gives the backbones."""
    return _importable("open_clip", "open_clip_torch")


def _importable(module: str, distribution: str) -> Finding:
    try:
        importlib.import_module(module)
        return Finding(module, True, f"{distribution} {metadata.version(distribution)}")
    except (ImportError, RuntimeError, OSError) as error:  # torchvision: unknown operators
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        message = f"cannot be imported ({reason}); reinstall {distribution} beside this torch"
        return Finding(module, False, message)
